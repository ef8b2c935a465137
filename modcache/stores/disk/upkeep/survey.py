"""What lies in the segments of a cache directory, read without a store: facts only, and nothing is changed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from ....errors import UsageError
from ...index import KEY_BYTES
from ..catalogue import Catalogue, Entry
from ..directory import Directory
from ..frames import (
    DROPPED,
    ROWS,
    ROWS_HEAD_BYTES,
    DamageError,
    Frame,
    SegmentHeader,
    frames_behind,
    parse_frames,
    parse_rows_head,
)
from ..manifest import read_manifest
from ..names import CATALOGUE, SegmentName, folder_of
from ..segment import read_all, read_header
from .strange import is_there

__all__ = ["Folder", "SegmentFacts", "Standing", "entries_of", "opened", "standing_of", "survey", "survey_folder"]

_MANY: Final = 1 << 62


@dataclass(frozen=True, slots=True)
class SegmentFacts:
    """One segment as it was found.

    Args:
        name: of its files.
        alive: its writer may still write.
        header: what its rows have in common; None where that cannot be read.
        problem: why nothing of it can be believed; None where something can.
        frames: what it commits.
        behind: later commits that no reader believes, because the log is damaged before them or their rows are gone.
        log_end: where the believed part of the log ends.
        log_bytes: of the file.
        rows_bytes: of the file.
        changed: when it was written last, in seconds since the epoch.
    """

    name: SegmentName
    alive: bool
    header: SegmentHeader | None
    problem: str | None
    frames: tuple[Frame, ...]
    behind: tuple[Frame, ...]
    log_end: int
    log_bytes: int
    rows_bytes: int
    changed: float

    @property
    def title(self) -> str:
        """The name of its files, without the ending."""
        return self.name.rows.removesuffix(".rows")

    @property
    def bytes(self) -> int:
        """Of both files."""
        return self.log_bytes + self.rows_bytes

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return self.header.layout.row_bytes if self.header is not None else 0

    @property
    def committed(self) -> int:
        """Rows that readers believe."""
        return sum(frame.count for frame in self.frames if frame.kind == ROWS)

    @property
    def rows_end(self) -> int:
        """Where the rows file would end if nothing were left over."""
        return ROWS_HEAD_BYTES + self.committed * self.row_bytes

    @property
    def leftover_bytes(self) -> int:
        """What was written and never committed; all of it where a killed writer got no further."""
        if self.header is None:
            return 0 if self.problem is not None else self.bytes
        if self.problem is not None or self.behind:
            return 0
        return self.log_bytes - self.log_end + max(0, self.rows_bytes - self.rows_end)

    @property
    def told(self) -> tuple[Frame, ...]:
        """All that it says, whether or not a reader believes it."""
        return self.frames + self.behind

    @property
    def is_orphan(self) -> bool:
        """Whether it is what a writer leaves that was killed before it could commit anything."""
        return self.header is None and self.problem is None

    @property
    def damage(self) -> str | None:
        """What is wrong with it, in a few words."""
        if self.problem is not None or not self.behind:
            return self.problem
        rows = max((frame.first + frame.count for frame in self.behind if frame.kind == ROWS), default=0)
        if ROWS_HEAD_BYTES + rows * self.row_bytes > self.rows_bytes:
            return "its rows file is cut off"
        return "a commit in its log is damaged, and the later ones are unseen by readers"


@dataclass(frozen=True, slots=True)
class Folder:
    """One namespace as it was found.

    Args:
        folder: the name of its folder.
        namespace: its name; that of the folder where it cannot be told.
        segments: in the order of their names.
        manifest: the readable description.
        last_used: seconds since the epoch.
    """

    folder: str
    namespace: str
    segments: tuple[SegmentFacts, ...]
    manifest: dict[str, object] | None
    last_used: float

    @property
    def bytes(self) -> int:
        """Of its segments."""
        return sum(segment.bytes for segment in self.segments)


def opened(path: str | os.PathLike[str]) -> Directory:
    """A cache directory that is there.

    Raises:
        UsageError: there is no cache directory.
        FormatVersionError: it was written by a newer modcache.
    """
    directory = Directory(path)
    directory.check()
    if not directory.path.is_dir():
        raise UsageError(f"There is no directory {str(path)!r}.")
    if directory.format() is None and not directory.folders():
        raise UsageError(f"{str(path)!r} is no cache directory: it holds nothing that modcache wrote.")
    return directory


def survey(directory: Directory, folders: Iterable[str] | None = None) -> tuple[Folder, ...]:
    """All namespaces of a directory, or those in these folders."""
    entries = Catalogue(directory.path / CATALOGUE, writable=False).entries()
    used = {folder_of(namespace): entry.last_used for namespace, entry in entries.items()}
    names = directory.folders() if folders is None else folders
    return tuple(survey_folder(directory, folder, used.get(folder, 0.0)) for folder in names)


def entries_of(folders: Iterable[Folder]) -> dict[str, Entry]:
    """What the catalogue should say of these namespaces."""
    return {
        folder.namespace: Entry(folder.last_used, standing_of(folder.segments).rows, folder.bytes) for folder in folders
    }


def survey_folder(directory: Directory, folder: str, last_used: float = 0.0) -> Folder:
    """One namespace.

    Args:
        directory: in which it lies.
        folder: its name there.
        last_used: the least that the answer may say.
    """
    segments = tuple(
        _read(directory, folder, name) for name in directory.segments(folder) if is_there(directory, folder, name)
    )
    manifest = read_manifest(directory.place_of(folder))
    told = [segment.header.namespace for segment in segments if segment.header is not None]
    told += [str((manifest or {}).get("namespace"))]
    namespace = next((name for name in told if folder_of(name) == folder), folder)
    changed = max((segment.changed for segment in segments), default=0.0)
    return Folder(folder, namespace, segments, manifest, max(changed, last_used))


def _read(directory: Directory, folder: str, name: SegmentName) -> SegmentFacts:
    place = directory.place_of(folder)
    alive = directory.is_alive(name.writer)  # before anything is looked at: who is dead by now changes it no more
    sizes, changed = {}, 0.0
    for file in (name.log, name.rows):
        try:
            found = os.lstat(place / file)
        except OSError:
            continue
        if stat.S_ISREG(found.st_mode):
            sizes[file], changed = found.st_size, max(changed, found.st_mtime)
    log_bytes, rows_bytes = sizes.get(name.log, 0), sizes.get(name.rows, 0)

    def nothing(problem: str | None, header: SegmentHeader | None = None) -> SegmentFacts:
        return SegmentFacts(name, alive, header, problem, (), (), 0, log_bytes, rows_bytes, changed)

    start = 0
    try:
        begun = read_header(directory, folder, name) if log_bytes else None
        if begun is None:
            # A writer begins with the heads of both files, so whoever has rows had a whole header.
            lost = log_bytes and rows_bytes > ROWS_HEAD_BYTES and not alive
            return nothing("its log is cut off" if lost else None)
        header, start = begun
        with directory.opened_segment(folder, name.rows) as rows, directory.opened_segment(folder, name.log) as log:
            head = os.pread(rows, ROWS_HEAD_BYTES, 0)
            data = read_all(log, start, os.fstat(log).st_size - start)
            if len(head) < ROWS_HEAD_BYTES and not data:
                return nothing(None)
            if parse_rows_head(head) != header.segment:
                return nothing("its rows file belongs to another segment", header)
            size = header.layout.row_bytes
            most = (os.fstat(rows).st_size - ROWS_HEAD_BYTES) // size if size else _MANY
    except DamageError as error:
        return nothing(str(error))
    except FileNotFoundError:  # half a pair, or it was unlinked just now
        half = (
            log_bytes > start > 0 and not alive and os.path.lexists(place / name.log)
        )  # whoever unlinks begins with it
        return nothing("its rows file is missing" if half else None)
    except OSError as error:
        return nothing(f"it cannot be read: {error.strerror}")
    frames, end = parse_frames(data, header.segment, start, 0, most)
    behind = frames_behind(data[end - start :], header.segment, end, _MANY)
    return SegmentFacts(
        name, alive, header, None, tuple(frames), tuple(behind), end, start + len(data), rows_bytes, changed
    )


# --- which rows count -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Standing:
    """Which of the committed rows of a namespace can be got.

    Args:
        counts: for each segment, a flag for each of its rows.
    """

    counts: tuple[npt.NDArray[np.bool_], ...]

    @property
    def rows(self) -> int:
        """How many rows can be got."""
        return sum(int(flags.sum()) for flags in self.counts)


def standing_of(segments: Sequence[SegmentFacts]) -> Standing:
    """Which rows count: of several statements about a key the latest, if it is a row and not a drop."""
    counts = tuple(np.ones(segment.committed, np.bool_) for segment in segments)
    frames = [(place, frame) for place, segment in enumerate(segments) for frame in segment.frames]
    if not frames:
        return Standing(counts)
    keys = np.frombuffer(b"".join(frame.keys for _, frame in frames), np.uint64).reshape(-1, KEY_BYTES // 8)
    lengths = [frame.count for _, frame in frames]
    doubtful = _told_twice(keys[:, 0])
    if not len(doubtful):
        return Standing(counts)

    def spread(values: list[int]) -> npt.NDArray[np.int64]:
        return np.repeat(np.array(values, np.int64), lengths)[doubtful]

    begun = np.cumsum([0, *lengths[:-1]]).tolist()
    row = doubtful - spread(begun) + spread([frame.first for _, frame in frames])
    stamps = spread([frame.stamp for _, frame in frames])
    is_drop = spread([frame.kind == DROPPED for _, frame in frames])
    at, some = spread([place for place, _ in frames]), keys[doubtful]
    order = np.lexsort((doubtful, is_drop, stamps, some[:, 1], some[:, 0]))
    last = np.ones(len(order), np.bool_)
    last[:-1] = (some[order[1:]] != some[order[:-1]]).any(axis=1)
    for place, flags in enumerate(counts):
        mine = order[(at[order] == place) & (is_drop[order] == 0) & ~last]
        flags[row[mine]] = False
    return Standing(counts)


def _told_twice(halves: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """The places of keys that may be there more than once, by half a key; most are there once."""
    order = np.argsort(halves, kind="stable")
    same = halves[order[1:]] == halves[order[:-1]]
    if not same.any():
        return np.zeros(0, np.int64)
    twice = np.zeros(len(order), np.bool_)
    twice[1:] |= same
    twice[:-1] |= same
    return np.sort(order[twice])
