"""Rows of one layout without gaps, the key and the last use of each, and how many there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from modcache.rows import Layout, Rows
from modcache.stores.columns import Column
from modcache.stores.index import KEY_BYTES

__all__ = ["Slab"]

Places = npt.NDArray[np.int64]
MakeColumn = Callable[[torch.dtype, tuple[int, ...]], Column]


class Slab:
    """Rows of one layout, numbered 0 to ``count - 1``: a removed row is replaced by one from the end.

    Args:
        layout: of the rows.
        make_column: gives the memory for a leaf of this dtype and shape.
    """

    def __init__(self, layout: Layout, make_column: MakeColumn) -> None:
        self.layout = layout
        self.row_bytes = layout.row_bytes
        self.count = 0
        self.stamps: Places = np.empty(0, np.int64)
        self._keys = np.empty((0, KEY_BYTES), np.uint8)
        self._columns = [make_column(dtype, shape) for dtype, shape in layout.leaves]

    @property
    def held_bytes(self) -> int:
        """The bytes of the rows."""
        return self.count * self.row_bytes

    def take(self, rows: Places) -> Rows:
        """These rows, in fresh memory."""
        return Rows(self.layout, tuple([column.take(rows) for column in self._columns]))

    def append(self, keys: Sequence[bytes], tensors: Sequence[torch.Tensor], chosen: Places, stamp: int) -> Places:
        """Takes in the chosen rows of a batch under their keys; their numbers."""
        start, stop = self.count, self.count + len(chosen)
        self._fit(stop)
        for column, tensor in zip(self._columns, tensors, strict=True):
            column.append(start, tensor, chosen)
        self._keys[start:stop] = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
        self.stamps[start:stop] = chosen + stamp
        self.count = stop
        return np.arange(start, stop)

    def overwrite(self, rows: Places, tensors: Sequence[torch.Tensor], chosen: Places, stamp: int) -> None:
        """Puts the chosen rows of a batch at rows that are there."""
        for column, tensor in zip(self._columns, tensors, strict=True):
            column.overwrite(rows, tensor, chosen)
        self.stamps[rows] = chosen + stamp

    def remove(self, rows: Places) -> Places:
        """Drops rows; the numbers that were filled from the end, in ascending order."""
        left = self.count - len(rows)
        gone = np.zeros(self.count - left, np.bool_)
        gone[rows[rows >= left] - left] = True
        targets, sources = np.sort(rows[rows < left]), np.flatnonzero(~gone) + left
        if len(targets):
            for column in self._columns:
                column.move(targets, sources)
            self._keys[targets] = self._keys[sources]
            self.stamps[targets] = self.stamps[sources]
        self.count = left
        return targets

    def keys(self, rows: Places | None = None) -> list[bytes]:
        """The keys of these rows, or of all."""
        chosen = self._keys[: self.count] if rows is None else self._keys[rows]
        joined = chosen.tobytes()
        return [joined[i : i + KEY_BYTES] for i in range(0, len(joined), KEY_BYTES)]

    def trim(self) -> None:
        """Gives back memory that the rows do not need."""
        for column in self._columns:
            column.trim(self.count)
        if self.count * 4 < len(self.stamps):
            self._resize(self.count)

    def _fit(self, count: int) -> None:
        if count > len(self.stamps):
            self._resize(max(count, 2 * len(self.stamps)))
        for column in self._columns:
            column.fit(count)

    def _resize(self, capacity: int) -> None:
        keys, stamps = self._keys[: self.count], self.stamps[: self.count]
        self._keys, self.stamps = np.empty((capacity, KEY_BYTES), np.uint8), np.empty(capacity, np.int64)
        self._keys[: self.count], self.stamps[: self.count] = keys, stamps
