"""The rows of one layout in a namespace: gathered out of many segments, checked, and made into tensors."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from ...digest import checksum
from ...rows import Rows, tensor_of
from ..index import Places
from .gathering import read_rows
from .rowfiles import LostError, RowFiles, is_whole, opened
from .window import ROW_BITS, Grid

if TYPE_CHECKING:
    from ...rows import Layout
    from .descriptors import Descriptors
    from .directory import Directory
    from .segment import Segment

__all__ = ["Group", "Taken"]

_ROW_MASK: Final = (1 << ROW_BITS) - 1
_LARGE: Final = 64 << 10  # bytes of a row from which on reading is as quick as mapping, and cannot kill the process
_LINKED: Final = 0.005  # seconds for which a file that was not unlinked counts as not unlinked
_FEW: Final = 8  # segments that are looked at sooner than it is found out which of them are meant

_Matrix = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Taken:
    """Rows, and which of them do not have the checksum that they were committed with.

    Args:
        rows: all that was asked for, in fresh memory.
        wrong: places among them.
    """

    rows: Rows
    wrong: Places


class Group:
    """All rows of one layout in a namespace.

    Args:
        layout: of the rows.
        mapped: whether small rows are mapped; large ones are always read.
    """

    def __init__(self, layout: Layout, *, mapped: bool) -> None:
        self.layout = layout
        self.segments: dict[int, Segment] = {}
        sizes = layout.leaf_bytes
        self._row_bytes = sum(sizes)
        self._edges = [0, *itertools.accumulate(sizes)]
        self._linked_until = 0.0
        self.grid = Grid(self._row_bytes, mapped=mapped and self._row_bytes < _LARGE)

    def note(self, segment: Segment, first: int, sums: npt.NDArray[np.uint64]) -> None:
        """Takes in the checksums of rows that were committed to a segment of this layout."""
        start = self.grid.fit(segment.number, first + len(sums)) + first
        self.grid.sums[start : start + len(sums)] = sums
        self.grid.unchecked += len(sums)

    def drop(self, segment: Segment, descriptors: Descriptors) -> None:
        """Forgets a segment."""
        self.segments.pop(segment.number, None)
        self.grid.drop(segment.number)
        descriptors.drop(segment)

    def take(self, places: Places, directory: Directory, descriptors: Descriptors) -> Taken:
        """The rows at these places, at least one, all of this layout.

        Raises:
            LostError: some of the segments that they lie in can no longer be read.
        """
        used = self._used(places)
        for segment in used:
            if segment.waiting:
                return self._take_mixed(places, used, directory, descriptors)
        at = self._spots(places, used, directory, descriptors)
        if self.grid.mapped and self._map(used, directory, descriptors):
            assert self.grid.rows is not None
            matrix = self.grid.rows.take(at, axis=0)
            return Taken(self._rows_of(matrix), self._check(matrix, at))
        # Large rows of several leaves go straight to where their leaves stand together.
        sizes = np.diff(self._edges).tolist() if self._row_bytes >= _LARGE else [self._row_bytes]
        columns, wrong = self._read(RowFiles(used, directory, descriptors), places, at, sizes)
        return Taken(self._rows_of(columns[0]) if len(columns) == 1 else self._tensors_of(columns), wrong)

    def _used(self, places: Places) -> list[Segment]:
        """The segments that are meant, and perhaps some others."""
        if len(self.segments) <= _FEW:
            return list(self.segments.values())
        numbers = np.flatnonzero(np.bincount(places >> ROW_BITS)).tolist()
        return [self.segments[number] for number in numbers]

    def _spots(self, places: Places, used: list[Segment], directory: Directory, descriptors: Descriptors) -> Places:
        """The rows on the grid; it was seen that all of them are in their files."""
        now = time.monotonic()
        linked = now < self._linked_until
        lost = [
            segment.number
            for segment in used
            if segment.committed and not is_whole(segment, directory, descriptors, linked=linked)
        ]
        if not linked:
            self._linked_until = now + _LINKED
        if lost:
            raise LostError(lost)
        shifts = self.grid.shifts
        return places + (shifts[used[0].number] if len(used) == 1 else shifts.take(places >> ROW_BITS))

    def _take_mixed(self, places: Places, used: list[Segment], directory: Directory, descriptors: Descriptors) -> Taken:
        """Some of the rows, or all or none, still wait in memory to be written."""
        matrix, numbers = np.empty((len(places), self._row_bytes), np.uint8), places >> ROW_BITS
        there = np.ones(len(places), np.bool_)
        for segment in used:
            here = np.flatnonzero((numbers == segment.number) & (places & _ROW_MASK >= segment.committed))
            segment.waiting_rows(places[here] & _ROW_MASK, matrix, here)
            there[here] = False
        rest = np.flatnonzero(there)
        wrong = rest[:0]
        if len(rest):
            matrix[rest], wrong_there = self._take_written(places[rest], used, directory, descriptors)
            wrong = rest[wrong_there]
        return Taken(self._rows_of(matrix), wrong)

    def _take_written(
        self, places: Places, used: list[Segment], directory: Directory, descriptors: Descriptors
    ) -> tuple[_Matrix, Places]:
        at = self._spots(places, used, directory, descriptors)
        if self.grid.mapped and self._map(used, directory, descriptors):
            assert self.grid.rows is not None
            matrix = self.grid.rows.take(at, axis=0)
            return matrix, self._check(matrix, at)
        (matrix,), wrong = self._read(RowFiles(used, directory, descriptors), places, at, [self._row_bytes])
        return matrix, wrong

    # --- files ----------------------------------------------------------------------------------------

    def _map(self, used: list[Segment], directory: Directory, descriptors: Descriptors) -> bool:
        return all(
            not segment.committed
            or segment.committed <= self.grid.mapped_rows(segment.number)
            or self.grid.map(
                segment.number,
                segment.committed,
                opened(segment, directory, descriptors),
            )
            for segment in used
        )

    def _read(self, files: RowFiles, places: Places, at: Places, sizes: Sequence[int]) -> tuple[list[_Matrix], Places]:
        todo = self._unchecked(at)
        columns, sums = read_rows(files, places, sizes, todo)
        return columns, self._wrong(at, todo, sums)

    # --- checksums ------------------------------------------------------------------------------------

    def _unchecked(self, at: Places) -> Places:
        """Which rows are to be compared with their checksum: each is, once in a process."""
        if not self.grid.unchecked:
            return _NONE
        return np.flatnonzero(~self.grid.checked.take(at))

    def _check(self, matrix: _Matrix, at: Places) -> Places:
        """Which rows of a matrix are not what was committed."""
        todo = self._unchecked(at)
        return self._wrong(at, todo, [checksum(matrix[i]) for i in todo.tolist()])

    def _wrong(self, at: Places, todo: Places, sums: list[int]) -> Places:
        """Which of these rows do not have the checksum that they were committed with."""
        if not len(todo):
            return _NONE
        right = np.array(sums, np.uint64) == self.grid.sums[at[todo]]
        spots = np.unique(at[todo[right]])
        self.grid.unchecked -= int((~self.grid.checked[spots]).sum())
        self.grid.checked[spots] = True
        wrong: Places = todo[~right]
        return wrong

    # --- from bytes to tensors ------------------------------------------------------------------------

    def _rows_of(self, matrix: _Matrix) -> Rows:
        if len(self._edges) == 2:
            dtype, shape = self.layout.leaves[0]
            return Rows(self.layout, (tensor_of(matrix, dtype, shape),))
        return self._tensors_of([matrix[:, a:b].copy() for a, b in itertools.pairwise(self._edges)])

    def _tensors_of(self, columns: Sequence[_Matrix]) -> Rows:
        pairs = zip(columns, self.layout.leaves, strict=True)
        return Rows(self.layout, tuple([tensor_of(column, dtype, shape) for column, (dtype, shape) in pairs]))


_NONE: Final[Places] = np.empty(0, np.int64)
