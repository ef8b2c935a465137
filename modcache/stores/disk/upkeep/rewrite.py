"""Rows that are worth keeping, copied into new segments with the stamps that they had."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Final

import numpy as np
import numpy.typing as npt

from ....digest import checksum
from ....rows import Layout
from ...index import KEY_BYTES
from ..directory import Directory
from ..frames import (
    DROPPED,
    ROWS,
    ROWS_HEAD_BYTES,
    SEGMENT_ID_BYTES,
    SUM_BYTES,
    Frame,
    SegmentHeader,
    pack_frame,
    pack_log_header,
    pack_rows_head,
)
from ..names import SegmentName
from ..segment import read_into
from .survey import SegmentFacts

__all__ = ["Chunk", "Progress", "Rewriter", "among", "chunks_of", "rewriting"]

Progress = Callable[[int], None]
"""Takes how many bytes more were dealt with."""

Flags = npt.NDArray[np.bool_]

_CHUNK_BYTES: Final = 16 << 20
_SEGMENT_BYTES: Final = 1 << 30
_NEW: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some committed rows of a segment, in their order.

    Args:
        first: the number of the first.
        rows: their bytes, as a matrix.
        keys: theirs, as a matrix.
        sums: the checksums that were committed.
        stamps: when each was committed.
        good: whether each has its checksum; where the file ends before, the row is read as zeros.
    """

    first: int
    rows: npt.NDArray[np.uint8]
    keys: npt.NDArray[np.uint8]
    sums: npt.NDArray[np.uint64]
    stamps: npt.NDArray[np.int64]
    good: Flags


def chunks_of(
    directory: Directory, folder: str, segment: SegmentFacts, frames: Sequence[Frame], progress: Progress | None = None
) -> Iterator[Chunk]:
    """The rows that these frames of a segment commit, a few megabytes at a time, each compared with its checksum."""
    size, name = segment.row_bytes, segment.name.rows
    if not any(frame.kind == ROWS for frame in frames):
        return
    most = max(1, _CHUNK_BYTES // max(size, KEY_BYTES + SUM_BYTES))
    with directory.opened_segment(folder, name) as file:
        for frames_together in _runs(frames, most):
            keys = np.frombuffer(b"".join(frame.keys for frame in frames_together), np.uint8).reshape(-1, KEY_BYTES)
            sums = np.frombuffer(b"".join(frame.sums for frame in frames_together), np.uint64)
            counts = [frame.count for frame in frames_together]
            stamps = np.repeat(np.array([frame.stamp for frame in frames_together], np.int64), counts)
            for begin in range(0, len(keys), most):  # one frame may be larger than a chunk
                some = slice(begin, min(begin + most, len(keys)))
                first = frames_together[0].first + begin
                rows = np.zeros((some.stop - begin, size), np.uint8)
                if size:
                    read_into(file, ROWS_HEAD_BYTES + first * size, [rows.reshape(-1).data])
                yield Chunk(first, rows, keys[some], sums[some], stamps[some], _sums_of(rows) == sums[some])
                if progress is not None:
                    progress(rows.nbytes)


def _sums_of(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    return np.fromiter((checksum(row.data) for row in rows), np.uint64, len(rows))


def among(keys: npt.NDArray[np.uint8], some: frozenset[bytes]) -> Flags:
    """Which of these keys are among some."""
    found = np.zeros(len(keys), np.bool_)
    if some and len(keys):
        # By half a key first: a loop over millions would take seconds.
        halves = np.frombuffer(b"".join(some), np.uint64)[:: KEY_BYTES // 8]
        for place in np.flatnonzero(np.isin(np.ascontiguousarray(keys).view(np.uint64)[:, 0], halves)).tolist():
            found[place] = bytes(keys[place]) in some
    return found


def _runs(frames: Sequence[Frame], most: int) -> Iterator[list[Frame]]:
    """Frames of rows that lie one after the other, as many together as make a chunk."""
    run: list[Frame] = []
    for frame in frames:
        if frame.kind != ROWS:
            continue
        joined = sum(known.count for known in run) if len(run) < 2 else run[-1].first + run[-1].count - run[0].first
        if run and (frame.first != run[-1].first + run[-1].count or joined + frame.count > most):
            yield run
            run = []
        run.append(frame)
    if run:
        yield run


@dataclass(slots=True)
class _Written:
    """A new segment that is being filled."""

    name: SegmentName
    segment: bytes
    file: int
    rows: int = 0
    frames: list[Frame] = field(default_factory=list)


@contextlib.contextmanager
def rewriting(directory: Directory, writer: str, folder: str, namespace: str, layout: Layout) -> Iterator[Rewriter]:
    """A `Rewriter` for the time of a block; if the block fails, what was written is unlinked."""
    rewriter = Rewriter(directory, writer, folder, namespace, layout)
    try:
        yield rewriter
    except BaseException:
        rewriter.undo()
        raise
    finally:
        rewriter.close()


class Rewriter:
    """Makes new segments of the rows of old ones; readers see them once their logs are whole.

    Nothing of it is believed before `finish`.

    Args:
        directory: in which it works.
        writer: a name that is signed in, so that nobody takes what is half written for left over.
        folder: of the namespace.
        namespace: of the rows.
        layout: of the rows.
    """

    def __init__(self, directory: Directory, writer: str, folder: str, namespace: str, layout: Layout) -> None:
        self._directory = directory
        self._writer = writer
        self._folder = folder
        self._namespace = namespace
        self._layout = layout
        self._written: list[_Written] = []
        self.bytes = 0

    def undo(self) -> None:
        """Unlinks what was written."""
        for written in self._written:
            with contextlib.suppress(OSError):
                self._directory.remove_segment(self._folder, written.name)

    def close(self) -> None:
        """Closes the files."""
        for written in self._written:
            os.close(written.file)

    def add(self, chunk: Chunk, keep: Flags) -> int:
        """Copies some rows of a chunk; how many."""
        for run in _same_stamps(chunk.stamps, np.flatnonzero(keep)):
            written = self._room_for(len(run) * self._layout.row_bytes)
            frame = Frame(
                ROWS,
                int(chunk.stamps[run[0]]),
                written.rows,
                chunk.keys[run].tobytes(),
                chunk.sums[run].tobytes(),
            )
            _write_all(
                written.file, ROWS_HEAD_BYTES + written.rows * self._layout.row_bytes, chunk.rows[run].reshape(-1).data
            )
            written.rows += frame.count
            written.frames.append(frame)
        return int(keep.sum())

    def drop(self, keys: bytes, stamp: int) -> None:
        """Says again that these keys were dropped."""
        if keys:
            written = self._room_for(0)
            written.frames.append(Frame(DROPPED, stamp, written.rows, keys))

    def finish(self) -> list[SegmentName]:
        """Makes everything that was copied visible, once it is certain to last; the new segments.

        Raises:
            OSError: it cannot be written.
        """
        for written in self._written:
            os.fsync(written.file)
            made = datetime.now(timezone.utc).isoformat(timespec="seconds")
            header = SegmentHeader(written.segment, self._namespace, self._layout, self._writer, made)
            content = bytearray(pack_log_header(header))
            for frame in written.frames:
                content += pack_frame(frame, written.segment, len(content))
            with self._directory.opened_segment(self._folder, written.name.log, _NEW) as log:
                _write_all(log, 0, memoryview(content))
                os.fsync(log)
            self.bytes += len(content) + os.fstat(written.file).st_size
        _fsync_folder(self._directory, self._folder)
        return [written.name for written in self._written]

    def _room_for(self, more: int) -> _Written:
        last = self._written[-1] if self._written else None
        if last is not None and (not more or last.rows * self._layout.row_bytes + more <= _SEGMENT_BYTES):
            return last
        taken = [name.number for name in self._directory.segments(self._folder) if name.writer == self._writer]
        name, segment = SegmentName(self._writer, max(taken, default=-1) + 1), os.urandom(SEGMENT_ID_BYTES)
        file = self._directory.open_segment(self._folder, name.rows, _NEW)
        self._written.append(_Written(name, segment, file))
        _write_all(file, 0, memoryview(pack_rows_head(segment)))
        return self._written[-1]


def _same_stamps(stamps: npt.NDArray[np.int64], places: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """The places, parted wherever the stamp changes."""
    if not len(places):
        return []
    return np.split(places, np.flatnonzero(np.diff(stamps[places])) + 1)


def _write_all(file: int, offset: int, view: memoryview) -> None:
    while view.nbytes:
        done = os.pwrite(file, view[: 1 << 30], offset)
        view, offset = view[done:], offset + done


def _fsync_folder(directory: Directory, folder: str) -> None:
    with contextlib.suppress(OSError):  # not every system has descriptors of folders
        file = os.open(directory.place_of(folder), os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
