"""The rows of one namespace: an index over all segments of all writers, which follows them as they grow."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np

from ...rows import Layout
from ..index import KEY_BYTES, Places
from ..protocol import Found
from .descriptors import Descriptors
from .directory import Directory
from .frames import DROPPED, ROWS, SEGMENT_ID_BYTES, Frame
from .group import Group, Taken
from .names import SegmentName
from .rowfiles import LostError
from .segment import Segment
from .segments import Segments
from .statements import Statements
from .window import ROW_BITS

__all__ = ["Reading"]

_NO_ROWS: Final = Layout("null", ())
_TRIES: Final = 8  # files that vanish under our hands, again and again


class Reading:
    """One namespace, as far as it was read. Not safe in threads.

    Args:
        directory: that it lies in.
        namespace: its name.
        descriptors: of open files, shared with other namespaces.
        mapped: whether small rows are mapped.
    """

    def __init__(self, directory: Directory, namespace: str, descriptors: Descriptors, *, mapped: bool) -> None:
        self.namespace = namespace
        self.troubles: list[tuple[str, str]] = []  # what a user should hear of
        self.latest = 0  # stamp that was seen
        self._left = False  # nobody looks at it any more
        self._directory = directory
        self._descriptors = descriptors
        self._mapped = mapped
        self._said = Statements(self._stamps_of)
        self._groups: dict[Layout, Group] = {}
        self._segments = Segments(directory, namespace)
        self._open: dict[Layout, Segment] = {}  # segments of our own that are being written

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return self._segments.folder

    def __len__(self) -> int:
        return len(self._said)

    @property
    def row_bytes(self) -> int:
        """The bytes of all rows in the segments, those that were overwritten included."""
        return sum(segment.assigned * segment.row_bytes for segment in self._segments)

    # --- looking --------------------------------------------------------------------------------------

    def contains(self, keys: Sequence[bytes]) -> Places:
        """The place of each row, -1 where it is absent."""
        places, complete = self._said.locate(keys)
        if not complete and self.refresh():
            places, _ = self._said.locate(keys)
        return places

    def get(self, keys: Sequence[bytes]) -> tuple[Found, ...]:
        """The rows of these keys in fresh memory, by layout; a row that is damaged or gone is absent."""
        places, complete = self._said.locate(keys)
        if not complete and self.refresh():
            places, complete = self._said.locate(keys)
        if not complete and self._segments.damages:  # nobody need hear of them as long as no row is missed
            for text in self._segments.damages:
                self.troubles.append(("damaged segment", text))
            self._segments.damages = []
        for _ in range(_TRIES):
            found = self._found(keys, places, complete)
            if found is not None:
                return found
            self.refresh()
            places, complete = self._said.locate(keys)
        return ()

    def keys(self) -> list[bytes]:
        """The keys of all rows."""
        return self._said.keys()

    def refresh(self) -> bool:
        """Looks for what other processes did since the last look; whether there is anything new."""
        gone, new = self._segments.look()
        self._lose(gone)
        for segment in new:
            self._join(segment)
        changed = bool(gone or new)
        for segment in self._segments.growing():
            changed |= self._follow(segment)
        return changed

    # --- changing -------------------------------------------------------------------------------------

    def open_segment(self, layout: Layout | None, more: int, make_name: Callable[[], SegmentName]) -> Segment:
        """A segment of our own that takes so many rows more, or with no layout one that takes what is dropped."""
        if layout is None:
            opened = next(iter(self._open.values()), None)
            layout = next(iter(self._groups), _NO_ROWS) if opened is None else opened.layout
        opened = self._open.get(layout)
        if opened is not None and not opened.closed and (not opened.assigned or opened.assigned + more <= opened.most):
            return opened
        opened = self._join(self._segments.add(make_name(), os.urandom(SEGMENT_ID_BYTES), layout))
        opened.own = True
        self._open[layout] = opened
        return opened

    def expect(self, segment: Segment, joined: bytes, matrix: np.ndarray) -> int:
        """Takes in rows that are to be written to a segment of our own; the number of the first one."""
        first = segment.assigned
        segment.waiting.append((first, matrix))
        segment.assigned += len(matrix)
        self._said.set(joined, first | (segment.number << ROW_BITS))
        return first

    def committed(self, segment: Segment, first: int, stamp: int, sums: bytes) -> None:
        """Rows of our own are in the file now."""
        count = len(sums) // 8
        if not self._left:
            self._groups[segment.layout].note(segment, first, np.frombuffer(sums, np.uint64))
        segment.commit(first, count, stamp)
        while segment.waiting and segment.waiting[0][0] < segment.committed:
            segment.waiting.pop(0)
        self._said.settle()

    def settle(self) -> None:
        """Brings the index up to date; whoever asks for rows does it otherwise."""
        self._said.settle(least=0)

    def left_of(self, segment: Segment, first: int, joined: bytes) -> Places:
        """Which of some rows that wait for a segment still count, by their place among them."""
        places = np.arange(first, first + len(joined) // KEY_BYTES) | (segment.number << ROW_BITS)
        return np.flatnonzero(self._said.at(joined, places))

    def give_up(self, segment: Segment, joined: bytes | None = None) -> int:
        """The rows that wait for this segment will not be written, nor any others; how many of them counted.

        Args:
            segment: of our own.
            joined: their keys, in order; without these, all keys there are have to be looked through.
        """
        segment.closed = True
        low, count = segment.committed, segment.assigned - segment.committed
        if not count:
            return 0
        if joined is not None and len(joined) == count * KEY_BYTES:
            left = self.left_of(segment, low, joined)
            self._said.forget([joined[i * KEY_BYTES : (i + 1) * KEY_BYTES] for i in left.tolist()])
            gone = len(left)
        else:  # unless an interrupt came while rows got their place, this is for many rows at once
            gone = self._said.forget_segments([segment.number], low)
        segment.assigned, segment.waiting = low, []
        return gone

    def delete(self, keys: Sequence[bytes], stamp: int) -> int:
        """Drops rows; how many there were."""
        self.refresh()
        return self._said.delete(keys, stamp)

    def hide(self, stamp: int) -> int:
        """Drops all rows that were put until now; how many there were."""
        self.refresh()
        self.end_segments()
        return self._said.hide(stamp)

    def end_segments(self) -> None:
        """Nothing more is written to the segments of our own, also of what waits for them."""
        for segment in self._open.values():
            segment.closed = True

    @property
    def waits(self) -> bool:
        """Whether rows wait to be written to segments of our own."""
        return any(segment.waiting for segment in self._open.values() if not segment.closed)

    def leave(self) -> None:
        """It may be half-changed, so nobody looks at it any more; what waits to be written still is."""
        self._left = True
        self._said, self._groups = Statements(self._stamps_of), {}

    def close(self) -> None:
        """Closes all files."""
        for segment in self._segments:
            self._remove(segment)

    # --- rows -----------------------------------------------------------------------------------------

    def _found(self, keys: Sequence[bytes], places: Places, complete: bool) -> tuple[Found, ...] | None:
        """The rows at these places, or None where a segment was gone, which is then forgotten."""
        try:
            if complete and keys and len(self._groups) == 1:  # as is the rule
                return self._right(keys, np.arange(len(keys)), self._take(next(iter(self._groups.values())), places))
            return tuple(self._gather(keys, places))
        except LostError as error:
            self._lose(error.args[0])
            return None
        except OSError as error:
            text = f"rows of namespace {self.namespace!r} cannot be read, and count as missing: {error}"
            self.troubles.append(("reading", text))
            return ()

    def _gather(self, keys: Sequence[bytes], places: Places) -> Iterator[Found]:
        there = np.flatnonzero(places >= 0)
        for group, at in self._by_group(places[there]):
            positions = there if at is None else there[at]
            yield from self._right(keys, positions, self._take(group, places[positions]))

    def _take(self, group: Group, places: Places) -> Taken:
        return group.take(places, self._directory, self._descriptors)

    def _right(self, keys: Sequence[bytes], positions: Places, taken: Taken) -> tuple[Found, ...]:
        """What was taken, without the rows that are damaged; their keys are forgotten."""
        if not len(taken.wrong):
            return (Found(positions, taken.rows),)
        self._note_damage([keys[i] for i in positions[taken.wrong].tolist()])
        right = np.setdiff1d(np.arange(len(positions)), taken.wrong)
        return (Found(positions[right], taken.rows.take(right.tolist())),) if len(right) else ()

    def _by_group(self, places: Places) -> Iterator[tuple[Group, Places | None]]:
        """For each layout that is meant: which of the places mean it, ascending; None where all do."""
        if not len(places):
            return
        if len(self._groups) == 1:
            yield next(iter(self._groups.values())), None
            return
        numbers = places >> ROW_BITS
        names = np.unique(numbers).tolist()
        mine: dict[Layout, list[int]] = {}
        for number in names:
            mine.setdefault(self._segments[number].layout, []).append(number)
        if len(mine) == 1:
            yield self._groups[next(iter(mine))], None
            return
        for layout, those in mine.items():
            meant = numbers == those[0] if len(those) == 1 else np.isin(numbers, those)
            yield self._groups[layout], np.flatnonzero(meant)

    def _note_damage(self, keys: list[bytes]) -> None:
        self._said.forget(keys)
        text = (
            f"{len(set(keys))} stored row(s) of namespace {self.namespace!r} do not have their checksum any more: "
            "the file was changed or damaged. They count as missing and are stored anew"
        )
        self.troubles.append(("damaged row", text))

    # --- segments -------------------------------------------------------------------------------------

    def _join(self, segment: Segment) -> Segment:
        """Puts a segment that was not known to the others of its layout."""
        if segment.layout not in self._groups:
            self._groups[segment.layout] = Group(segment.layout, mapped=self._mapped)
        self._groups[segment.layout].segments[segment.number] = segment
        return segment

    def _follow(self, segment: Segment) -> bool:
        """Takes in what a segment commits since the last look; whether there is anything."""
        changed = False
        try:
            for frames in self._segments.news(segment):
                changed = True
                self._take_in(segment, frames)
        except OSError:
            self._lose([segment.number])
            return True
        return changed

    def _take_in(self, segment: Segment, frames: Sequence[Frame]) -> None:
        """Frames of one kind."""
        joined = b"".join([frame.keys for frame in frames])
        counts = [frame.count for frame in frames]
        stamps = np.repeat(np.array([frame.stamp for frame in frames], np.int64), counts)
        self.latest = max(self.latest, *(frame.stamp for frame in frames))
        if frames[0].kind == DROPPED:
            self._said.take_out(joined, stamps)
            return
        assert frames[0].kind == ROWS
        first, sums = segment.committed, b"".join([frame.sums for frame in frames])
        self._groups[segment.layout].note(segment, first, np.frombuffer(sums, np.uint64))
        for frame in frames:
            segment.commit(frame.first, frame.count, frame.stamp)
        self._said.take_in(joined, np.arange(first, segment.committed) | (segment.number << ROW_BITS), stamps)

    def _stamps_of(self, places: Places) -> Places:
        stamps, numbers = np.empty(len(places), np.int64), places >> ROW_BITS
        for number in np.unique(numbers).tolist():
            mine = numbers == number
            stamps[mine] = self._segments[number].stamps_of(places[mine] & ((1 << ROW_BITS) - 1))
        return stamps

    def _lose(self, numbers: Sequence[int]) -> None:
        """Segments are gone: so are their rows."""
        if numbers:
            self._said.forget_segments(numbers, 0)
            for number in numbers:
                self._segments[number].closed = True
                self._remove(self._segments[number])

    def _remove(self, segment: Segment) -> None:
        self._segments.remove(segment)
        group = self._groups[segment.layout]
        group.drop(segment, self._descriptors)
        if not group.segments:
            del self._groups[segment.layout]
