"""Rows as records: the bytes of all their leaves side by side, in one matrix that nobody else holds."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from ...digest import checksum
from ...tensors import is_plain, memory_of, plain_memory
from ..index import Places

if TYPE_CHECKING:
    import torch

    from ...rows import Rows

__all__ = ["Buffers", "Records", "records_of", "sums_of"]

_PIECE: Final = 4 << 20  # bytes that are handed on at once
_PART: Final = 1 << 19  # bytes that are copied at once: they are still in the cache when they are summed up
_SMALLEST: Final = 1 << 16
_PAGE: Final = 1 << 12
_SHEET: Final = 8 << 20  # is asked for at once, and cut into pieces
_HUGE: Final = 2 << 20
_KEPT: Final = 32 << 20

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
            first, *rest = np.split(_sheet(size * pieces), pieces)
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


def _sheet(size: int) -> _Bytes:
    """So many bytes, from the beginning of a huge page on."""
    memory = np.empty(size + _HUGE, np.uint8)
    start = -memory.ctypes.data % _HUGE
    return memory[start : start + size]


@dataclass(frozen=True, slots=True)
class Records:
    """Some rows of a batch, one record behind the other.

    Args:
        places: of these rows in the batch.
        matrix: their bytes.
        sums: the checksum of each record, joined.
        buffer: the memory that the matrix is in.
    """

    places: Places
    matrix: _Bytes
    sums: bytes
    buffer: _Bytes


def records_of(rows: Rows, chosen: Places, take: Callable[[int], _Bytes]) -> Iterator[Records]:
    """Copies of some of the rows, a few megabytes at a time, so that the first are written while the last are copied.

    >>> import torch
    >>> from modcache.rows import SINGLE, Layout, Rows
    >>> pairs = Rows(Layout(SINGLE, ((torch.uint8, (2,)),)), (torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8),))
    >>> records, = records_of(pairs, np.array([1]), Buffers().take)
    >>> records.matrix, records.sums == sums_of(records.matrix)
    (array([[3, 4]], dtype=uint8), True)

    Args:
        rows: of the batch.
        chosen: places of the rows that are copied.
        take: gives memory for so many bytes.
    """
    sizes = rows.layout.leaf_bytes
    leaves = [_leaf(tensor) for tensor in rows.tensors]  # the tensors are kept until their memory is read
    sources = [
        np.frombuffer(memory, np.uint8).reshape(len(tensor), size)
        for (tensor, memory), size in zip(leaves, sizes, strict=True)
    ]
    row_bytes = sum(sizes)
    most = max(1, _PIECE // max(1, row_bytes))
    for start in range(0, len(chosen), most):
        places = chosen[start : start + most]
        buffer = take(len(places) * row_bytes)
        matrix = buffer[: len(places) * row_bytes].reshape(len(places), row_bytes)
        yield Records(places, matrix, _filled(matrix, sources, places), buffer)


def _leaf(tensor: torch.Tensor) -> tuple[torch.Tensor, memoryview]:
    """A tensor on the host whose values lie one behind the other, and its memory."""
    memory = plain_memory(tensor) if is_plain(tensor) else None
    if memory is not None:  # as is the rule; what follows lets go of the interpreter at each step
        return tensor, memory
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return tensor, memory_of(tensor)


def _filled(matrix: _Bytes, sources: list[_Bytes], places: Places) -> bytes:
    """Copies rows out of the leaves; the checksum of each, joined."""
    count, row_bytes = matrix.shape
    some, sums = max(1, _PART // max(1, row_bytes)), []
    whole = count > 0 and places[-1] - places[0] == count - 1  # then they are copied as they lie
    for start in range(0, count, some):
        part, at = matrix[start : start + some], 0
        for source in sources:
            first = int(places[start])
            which = slice(first, first + len(part)) if whole else places[start : start + some]
            part[:, at : at + source.shape[1]] = source[which]
            at += source.shape[1]
        sums.append(sums_of(part))
    return b"".join(sums)


def sums_of(matrix: _Bytes) -> bytes:
    """The checksum of each record, joined."""
    return struct.pack(f"<{len(matrix)}Q", *map(checksum, matrix))
