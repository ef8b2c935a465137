"""The segments of a namespace: which there are, and what is wrong with those that are not believed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from .frames import DamageError, Frame
from .names import SegmentName, folder_of
from .segment import Segment, check_rows, read_header
from .tails import damage_behind, is_cut_off

if TYPE_CHECKING:
    from ...rows import Layout
    from .directory import Directory

__all__ = ["Segments"]

_RACY: Final = 2_000_000_000  # nanoseconds within which a folder may change without another time of change


class Segments:
    """All segments of a namespace, of our own and of others, by number. Not safe in threads.

    Args:
        directory: that they lie in.
        namespace: that they belong to.
    """

    def __init__(self, directory: Directory, namespace: str) -> None:
        self.damages: list[str] = []  # what was found, in words
        self.folder = folder_of(namespace)
        self._directory, self._namespace = directory, namespace
        self._by_number: dict[int, Segment] = {}
        self._by_name: dict[SegmentName, Segment] = {}
        self._odd: dict[SegmentName, tuple[int, ...]] = {}  # damaged segments, as they looked then
        self._next = 0
        self._listed: int | None = None  # time of change of the folder, where it was listed and may be trusted

    def __iter__(self) -> Iterator[Segment]:
        return iter(list(self._by_number.values()))

    def __getitem__(self, number: int) -> Segment:
        return self._by_number[number]

    def add(self, name: SegmentName, segment: bytes, layout: Layout) -> Segment:
        """A segment that was not known; it gets the next number."""
        added = Segment(self._next, self.folder, name, segment, layout)
        self._next += 1
        self._by_number[added.number] = self._by_name[name] = added
        return added

    def remove(self, segment: Segment) -> None:
        """Forgets a segment; should it be there all the same, the next look finds it."""
        self._by_number.pop(segment.number, None)
        self._by_name.pop(segment.name, None)
        self._listed = None

    def look(self) -> tuple[list[int], list[Segment]]:
        """The numbers of segments that vanished, which are not removed yet, and segments that appeared."""
        try:
            found = os.stat(self._directory.place_of(self.folder), follow_symlinks=False).st_mtime_ns
        except OSError:
            found = -1
        if found == self._listed:
            return [], []
        self._listed = found if abs(time.time_ns() - found) > _RACY or found < 0 else None
        names = self._directory.names_in(self.folder)
        gone = [
            segment.number
            for name, segment in self._by_name.items()
            if not {name.log, name.rows} <= names.keys() and (segment.committed or not segment.own)
        ]
        new = sorted(
            {name for name in names.values() if name not in self._by_name and {name.log, name.rows} <= names.keys()}
        )
        return gone, [segment for name in new if (segment := self._load(name)) is not None]

    def growing(self) -> list[Segment]:
        """Those to which others may have added something; which of them will not grow any more is found out, too."""
        growing = [segment for segment in self if not segment.own and not segment.ended]
        # Before any log is looked at: what nobody writes any more by now will not grow.
        writers = frozenset(self._directory.writers() if growing else ())
        for segment in growing:
            segment.ended = segment.name.writer not in writers
        return growing

    def news(self, segment: Segment) -> Iterator[Sequence[Frame]]:
        """What a segment commits since the last look, in frames of one kind; each is to be noted at once.

        Raises:
            OSError: it cannot be read, or is gone.
        """
        for frames in segment.news(self._directory):
            start = 0
            for end in range(1, len(frames) + 1):
                if end == len(frames) or frames[end].kind != frames[start].kind:
                    yield frames[start:end]
                    start = end
        damage = damage_behind(self._directory, segment) if segment.doubtful else None
        if damage is not None:
            text = f"rows of namespace {self._namespace!r} count as missing: {damage} ({segment.name.log})"
            self.damages.append(text)

    def _load(self, name: SegmentName) -> Segment | None:
        """Begins to follow a segment, if it can be read."""
        looks: tuple[int, ...] = ()
        try:
            found = os.stat(self._directory.place_of(self.folder) / name.log, follow_symlinks=False)
            looks = (found.st_ino, found.st_size, found.st_mtime_ns)
            if self._odd.get(name) == looks:
                return None
            read = read_header(self._directory, self.folder, name)
            if read is None:
                if is_cut_off(self._directory, self.folder, name):
                    raise DamageError("its log is cut off")
                self._listed = None  # its writer is just about to write it, or was killed
                return None
            header, end = read
            if header.namespace != self._namespace:
                raise DamageError("the log belongs to another namespace")
            with self._directory.opened_segment(self.folder, name.rows) as file:
                check_rows(file, header.segment)
        except OSError:
            self._listed = None
            return None
        except DamageError as error:
            self._odd[name] = looks
            self.damages.append(f"a segment of namespace {self._namespace!r} is passed over: {error} ({name.log})")
            return None
        segment = self.add(name, header.segment, header.layout)
        segment.begin_log(end)
        return segment
