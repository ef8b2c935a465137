"""The rows of several segments on one grid: numbered from one end to the other, and mapped as one matrix."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import sys
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..pages import zeros
from .frames import ROWS_HEAD_BYTES

__all__ = ["ROW_BITS", "Grid", "can_map"]

ROW_BITS: Final = 32
"""A place is the number of a segment, then the number of a row in it."""

_MAP_FIXED: Final = 0x10  # on Linux and macOS; Python has no name for it
_MAP_NORESERVE: Final = 0x4000 if sys.platform == "linux" else 0
_FAILED: Final = ctypes.c_void_p(-1).value
_PAGE: Final = mmap.PAGESIZE


def can_map() -> bool:
    """Whether files can be mapped side by side here."""
    return _libc() is not None


@dataclass(slots=True)
class _Slot:
    """Where the rows of a segment lie on the grid: from a row on, with room for so many, so many mapped."""

    start: int
    room: int
    mapped: int = 0


class Grid:
    """Rows of equal size of several segments, with their checksums, in one range of row numbers.

    Where rows are mapped, `rows` is a matrix over all of them. A row may be read from it only if it is within
    its file at that moment: reading beyond the end of a file kills the process.

    Args:
        row_bytes: the bytes of one row.
        mapped: whether the rows are mapped.
    """

    def __init__(self, row_bytes: int, *, mapped: bool) -> None:
        self.shifts: npt.NDArray[np.int64] = np.zeros(0, np.int64)  # from a place to a row on the grid, by segment
        self.unchecked = 0  # at most so many rows were not compared with their checksum yet
        self.sums: npt.NDArray[np.uint64] = zeros((0,), np.uint64)
        self.checked: npt.NDArray[np.bool_] = zeros((0,), np.bool_)
        self.rows: npt.NDArray[np.uint8] | None = None
        self._row_bytes = row_bytes
        self._mapped = mapped and row_bytes > 0 and can_map()
        # A file is mapped from its first byte on, so a segment begins at the beginning of a page.
        self._quantum = _PAGE // math.gcd(_PAGE, row_bytes) if self._mapped else 1
        self._head_rows = -(-ROWS_HEAD_BYTES // row_bytes) if self._mapped else 0
        self._slots: dict[int, _Slot] = {}
        self._used = 0
        self._range: _Range | None = None

    @property
    def mapped(self) -> bool:
        """Whether rows can be had from the matrix."""
        return self._mapped

    def fit(self, number: int, count: int) -> int:
        """Makes room for so many rows of a segment; the number of its first row on the grid."""
        slot = self._slots.get(number)
        # With room for the head too: else the last page of this file would be mapped over the next one's first.
        if slot is not None and count + self._head_rows <= slot.room:
            return slot.start
        room = self._rounded(count if slot is None else max(count, 2 * slot.room))
        if slot is not None and slot.start + slot.room == self._used and slot.start + room <= len(self.sums):
            self._used, slot.room = slot.start + room, room
            return slot.start
        if self._used + room > len(self.sums):
            self._rebuild(number, room)
        else:
            self._move(number, room)
        return self._slots[number].start

    def mapped_rows(self, number: int) -> int:
        """How many rows of a segment can be had from the matrix."""
        return self._slots[number].mapped

    def map(self, number: int, count: int, file: int) -> bool:
        """Maps the first rows of a segment, as far as they are not; whether they are mapped now."""
        slot = self._slots[number]
        if count <= slot.mapped:
            return True
        if self._range is None and not self._reserve():
            return False
        assert self._range is not None
        done = slot.mapped * self._row_bytes // _PAGE * _PAGE if slot.mapped else 0
        end = ROWS_HEAD_BYTES + count * self._row_bytes
        assert end <= slot.room * self._row_bytes, (count, slot)  # beyond lies the next segment
        if not self._range.map(slot.start * self._row_bytes + done, end - done, file, done):
            self._mapped, self.rows, self._range = False, None, None
            return False
        slot.mapped = count
        return True

    def drop(self, number: int) -> None:
        """Forgets a segment, so that nothing keeps its file on the disk."""
        slot = self._slots.pop(number, None)
        if slot is not None:
            self._unmap(slot)
            self.checked[slot.start : slot.start + slot.room] = False

    def _rounded(self, count: int) -> int:
        return -(-(count + self._head_rows) // self._quantum) * self._quantum

    def _move(self, number: int, room: int) -> None:
        old, new = self._slots.get(number), _Slot(self._used, room)
        if old is not None:
            self._copy(old, new, self.sums, self.checked)
            self.drop(number)
        self._used += room
        self._note(number, new)

    def _rebuild(self, number: int, room: int) -> None:
        """Moves everything to a larger grid; it is mapped again when it is needed."""
        rooms = {other: slot.room for other, slot in self._slots.items()} | {number: room}
        capacity = self._rounded(2 * sum(rooms.values()))
        sums, checked = zeros((capacity,), np.uint64), zeros((capacity,), np.bool_)
        old, self._slots, self._used = self._slots, {}, 0
        self._range, self.rows = None, None
        for other, wanted in rooms.items():
            slot = _Slot(self._used, wanted)
            if other in old:
                self._copy(old[other], slot, sums, checked)
            self._used += wanted
            self._note(other, slot)
        self.sums, self.checked = sums, checked

    def _copy(self, old: _Slot, new: _Slot, sums: npt.NDArray[np.uint64], checked: npt.NDArray[np.bool_]) -> None:
        sums[new.start : new.start + old.room] = self.sums[old.start : old.start + old.room]
        checked[new.start : new.start + old.room] = self.checked[old.start : old.start + old.room]

    def _note(self, number: int, slot: _Slot) -> None:
        if number >= len(self.shifts):
            self.shifts = np.concatenate([self.shifts, np.zeros(number + 1, np.int64)])
        self.shifts[number] = slot.start - (number << ROW_BITS)
        self._slots[number] = slot

    def _reserve(self) -> bool:
        size = len(self.sums) * self._row_bytes
        self._range = _Range.of(size + _PAGE) if self._mapped else None
        if self._range is None:
            self._mapped = False
            return False
        self.rows = self._range.matrix(ROWS_HEAD_BYTES, size).reshape(-1, self._row_bytes)
        return True

    def _unmap(self, slot: _Slot) -> None:
        if self._range is not None and slot.mapped:
            self._range.clear(slot.start * self._row_bytes, slot.room * self._row_bytes)
        slot.mapped = 0


class _Range:
    """A range of addresses of our own, in which files are mapped at places of our choice."""

    def __init__(self, libc: Any, address: int, size: int) -> None:
        self._libc, self._address, self._size = libc, address, size

    @classmethod
    def of(cls, size: int) -> _Range | None:
        """So many bytes of addresses without memory, or None where they are not to be had."""
        libc = _libc()
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        address = libc.mmap(None, size, 0, flags, -1, 0)
        return None if address in (None, _FAILED) else cls(libc, address, size)

    def __del__(self) -> None:
        self._libc.munmap(self._address, self._size)

    def matrix(self, start: int, size: int) -> npt.NDArray[np.uint8]:
        """The bytes of a part; whoever has them must not outlive the range."""
        memory = (ctypes.c_char * size).from_address(self._address + start)
        return np.frombuffer(memoryview(memory), np.uint8)

    def map(self, start: int, size: int, file: int, offset: int) -> bool:
        """Maps a part of a file, whole pages, over what is there; whether it worked."""
        if start + size > self._size:  # never over what is not ours
            return False
        flags = mmap.MAP_SHARED | _MAP_FIXED
        address = self._libc.mmap(self._address + start, size, mmap.PROT_READ, flags, file, offset)
        return address not in (None, _FAILED)

    def clear(self, start: int, size: int) -> None:
        """Lets go of the files that are mapped in a part."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        self._libc.mmap(self._address + start, size, 0, flags, -1, 0)


@functools.cache
def _libc() -> Any:
    """The C library, where its calls are known to look as they do here."""
    if sys.platform not in ("linux", "darwin") or ctypes.sizeof(ctypes.c_void_p) != 8:
        return None
    libc = ctypes.CDLL(None)
    try:
        libc.mmap.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int64,
        ]
        libc.mmap.restype = ctypes.c_void_p
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    except AttributeError:
        return None
    return libc
