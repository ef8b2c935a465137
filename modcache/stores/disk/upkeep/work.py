"""Changing a cache directory: one process at a time, signed in like a writer, and never what a living writer has."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from ....rows import Layout
from ...index import KEY_BYTES
from ..catalogue import Catalogue
from ..directory import Directory
from ..frames import DROPPED, ROWS
from ..locks import locked
from ..names import CATALOGUE, new_writer
from ..room import floor_of
from .rewrite import Flags, among, chunks_of, rewriting
from .survey import Folder, SegmentFacts

__all__ = ["Work", "at_work", "drops_to_keep", "layout_of"]

_LOCK: Final = "upkeep"  # beside the traces of writers, none of which has such a name
_RECENT: Final = 3600 * 10**9  # ns; a row may be committed so much later than it was stamped


@dataclass(frozen=True, slots=True)
class Work:
    """The right to change a directory, for the time of a block.

    Args:
        directory: that may be changed.
        writer: the name under which new segments are written.
        catalogue: in which namespaces are forgotten.
    """

    directory: Directory
    writer: str
    catalogue: Catalogue

    def has_room_for(self, wanted: int) -> bool:
        """Whether so many bytes may be written before others are freed."""
        usage = shutil.disk_usage(self.directory.path)
        return usage.free - wanted > floor_of(usage.total)

    def cut(self, folder: Folder, segment: SegmentFacts) -> int:
        """Cuts what a dead writer left behind its last commit; the bytes."""
        freed = 0
        for name, end in ((segment.name.log, segment.log_end), (segment.name.rows, segment.rows_end)):
            with self.directory.opened_segment(folder.folder, name, os.O_RDWR) as file:
                left = os.fstat(file).st_size - end
                if left > 0:
                    os.ftruncate(file, end)
                    freed += left
        return freed

    def rewrite(
        self,
        folder: Folder,
        segments: Sequence[SegmentFacts],
        keep: Mapping[str, Flags],
        without: frozenset[bytes] = frozenset(),
        *,
        all_drops: bool = False,
    ) -> int:
        """Puts new segments in the place of some of dead writers, and unlinks those; the bytes more than before.

        Args:
            folder: of the namespace.
            segments: that are replaced, all of one layout.
            keep: for the title of each, which of its committed rows are kept if they have their checksum. Rows
                committed behind damage are kept as well.
            without: keys of which no row and no word is kept.
            all_drops: keep every word of a drop; needed where rows are kept that do not count.
        """
        layout = layout_of(segments[0])
        with rewriting(self.directory, self.writer, folder.folder, folder.namespace, layout) as rewriter:
            for segment in segments:
                flags = keep[segment.title]
                for chunk in chunks_of(self.directory, folder.folder, segment, segment.told):
                    wanted = np.ones(len(chunk.good), np.bool_)
                    of_these = flags[chunk.first : chunk.first + len(wanted)]
                    wanted[: len(of_these)] = of_these
                    rewriter.add(chunk, wanted & chunk.good & ~among(chunk.keys, without))
            for stamp, keys in drops_to_keep(folder.segments, segments, without, everything=all_drops):
                rewriter.drop(keys, stamp)
            rewriter.finish()
        return rewriter.bytes - sum(self.directory.remove_segment(folder.folder, segment.name) for segment in segments)

    def drop_keys(self, folder: Folder, keys: Sequence[bytes], stamp: int) -> None:
        """Says that these keys count no more, where their rows are in files that somebody else writes."""
        layout = layout_of(next(segment for segment in folder.segments if segment.header is not None))
        with rewriting(self.directory, self.writer, folder.folder, folder.namespace, layout) as rewriter:
            rewriter.drop(b"".join(keys), stamp)
            rewriter.finish()

    def remove(self, folder: Folder, segments: Sequence[SegmentFacts]) -> int:
        """Unlinks segments; the bytes that were freed."""
        return sum(self.directory.remove_segment(folder.folder, segment.name) for segment in segments)

    def forget(self, folder: Folder) -> None:
        """Removes what is left of a namespace that has no segment any more."""
        self.directory.remove_folder(folder.folder)
        self.catalogue.forget(folder.namespace)


@contextlib.contextmanager
def at_work(directory: Directory) -> Iterator[Work]:
    """The right to change a directory.

    Raises:
        BlockingIOError: somebody else is at it.
        OSError: it cannot be written.
    """
    directory.make_folder(("writers",))
    with directory.opened(("writers",), _LOCK, os.O_RDWR | os.O_CREAT) as file:
        if not locked(file, wait=False):
            raise BlockingIOError(errno.EWOULDBLOCK, "Another process is looking after it", str(directory.path))
        writer = new_writer()
        alive = directory.sign_in(writer)
        try:
            yield Work(directory, writer, Catalogue(directory.path / CATALOGUE, writable=True))
        finally:
            directory.sign_out(writer, alive)


def drops_to_keep(
    known: Sequence[SegmentFacts],
    replaced: Sequence[SegmentFacts],
    without: frozenset[bytes] = frozenset(),
    now: int | None = None,
    *,
    everything: bool = False,
) -> list[tuple[int, bytes]]:
    """What replaced segments say was dropped and is still worth saying: stamps, and keys joined.

    A drop matters as long as another segment has an earlier row of its key, or may have.

    Args:
        known: all segments of the namespace.
        replaced: those of them that go.
        without: keys that nothing is said about any more.
        now: in nanoseconds; drops are kept as long as an earlier row may still be committed.
        everything: keep all that are not in ``without``.
    """
    titles = {segment.title for segment in replaced}
    others = [segment for segment in known if segment.title not in titles]
    hidden = everything or any(segment.behind for segment in replaced)
    hidden |= any(segment.damage is not None or segment.alive for segment in others)
    drops: dict[bytes, int] = {}
    for key, stamp in _told(replaced, DROPPED):
        drops[key] = max(stamp, drops.get(key, 0))
    earlier: dict[bytes, int] = {}
    for key, stamp in _told(others, ROWS, frozenset(drops)) if drops else ():
        earlier[key] = min(stamp, earlier.get(key, stamp))
    since = (time.time_ns() if now is None else now) - _RECENT
    kept: dict[int, list[bytes]] = {}
    for key, stamp in drops.items():
        matters = hidden or stamp >= since or earlier.get(key, stamp + 1) <= stamp
        if matters and key not in without:
            kept.setdefault(stamp, []).append(key)
    return [(stamp, b"".join(kept[stamp])) for stamp in sorted(kept)]


def _told(
    segments: Sequence[SegmentFacts], kind: int, only: frozenset[bytes] | None = None
) -> Iterator[tuple[bytes, int]]:
    """What segments say of this kind: keys and stamps."""
    for segment in segments:
        for frame in segment.told:
            if frame.kind == kind:
                keys = np.frombuffer(frame.keys, np.uint8).reshape(-1, KEY_BYTES)
                for key in keys if only is None else keys[among(keys, only)]:
                    yield bytes(key), frame.stamp


def layout_of(segment: SegmentFacts) -> Layout:
    """Of the rows of a segment that can be read."""
    assert segment.header is not None, segment
    return segment.header.layout
