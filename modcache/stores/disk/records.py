"""Rows as records: the bytes of all their leaves side by side, in one matrix that nobody else holds."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from ...digest import checksum
from ...tensors import memory_of
from ..index import Places

if TYPE_CHECKING:
    from ...rows import Rows

__all__ = ["Buffers", "matrix_of", "sums_of"]

_PART: Final = 1 << 19  # bytes that are copied at once: they are still in the cache when they are summed up
_SMALLEST: Final = 1 << 16
_PAGE: Final = 1 << 12
_SHEET: Final = 8 << 20  # is asked for at once, and cut into pieces
_KEPT: Final = 64 << 20

_Bytes = npt.NDArray[np.uint8]


class Buffers:
    """Memory that was used before: fresh memory costs more than the copy into it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._free: list[_Bytes] = []

    def take(self, size: int) -> _Bytes:
        """At least so many bytes."""
        with self._lock:
            for place in reversed(range(len(self._free))):  # what was given last is in the cache still
                if size <= self._free[place].size <= 2 * size + _SMALLEST:
                    return self._free.pop(place)
            # Pages that appear when they are touched cost more than the copy, unless they are huge.
            size = -(-max(size, _SMALLEST) // _PAGE) * _PAGE
            pieces = max(1, min(_SHEET, _KEPT - sum(free.size for free in self._free)) // size)
            first, *rest = np.split(np.empty(size * pieces, np.uint8), pieces)
            self._free += rest
            return first

    def give(self, buffer: _Bytes) -> None:
        """Takes memory back, which nobody uses any more."""
        with self._lock:
            if buffer.size + sum(free.size for free in self._free) <= _KEPT:
                self._free.append(buffer)

    def clear(self) -> None:
        """Gives all memory back to the system."""
        with self._lock:
            self._free.clear()


def matrix_of(rows: Rows, chosen: Places, buffer: _Bytes) -> tuple[_Bytes, bytes]:
    """The bytes of some of the rows, copied into a buffer, one record a row; and their checksums, joined.

    >>> import torch
    >>> from modcache.rows import SINGLE, Layout, Rows
    >>> pairs = Rows(Layout(SINGLE, ((torch.uint8, (2,)),)), (torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8),))
    >>> matrix, sums = matrix_of(pairs, np.array([1]), np.empty(2, np.uint8))
    >>> matrix, sums == sums_of(matrix)
    (array([[3, 4]], dtype=uint8), True)
    """
    sizes = rows.layout.leaf_bytes
    tensors = [tensor.detach().resolve_conj().resolve_neg().cpu().contiguous() for tensor in rows.tensors]
    sources = [
        np.frombuffer(memory_of(tensor), np.uint8).reshape(len(tensor), size)
        for tensor, size in zip(tensors, sizes, strict=True)
    ]  # the tensors are kept until these are read
    count, row_bytes = len(chosen), sum(sizes)
    matrix = buffer[: count * row_bytes].reshape(count, row_bytes)
    whole = all(len(source) == count for source in sources)  # then no look at the places is needed
    some, sums = max(1, _PART // max(1, row_bytes)), []
    for start in range(0, count, some):
        part, place = matrix[start : start + some], 0
        for source, size in zip(sources, sizes, strict=True):
            if size:
                which = slice(start, start + some) if whole else chosen[start : start + some]
                part[:, place : place + size] = source[which]
            place += size
        sums.append(sums_of(part))
    return matrix, b"".join(sums)


def sums_of(matrix: _Bytes) -> bytes:
    """The checksum of each record, joined."""
    return np.fromiter(map(checksum, matrix), "<u8", len(matrix)).tobytes()
