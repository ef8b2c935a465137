"""Rows of one layout without gaps, the key and the last use of each, and how many there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..rows import Layout, Lent, Rows
from .index import KEY_BYTES, Places, cut_keys
from .pages import zeros

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from .columns import Column

__all__ = ["Batch", "Slab"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows on their way into a store.

    Args:
        keys: one for each row.
        rows: the rows.
        stamp: of the first row's use; each row's is one later than that of the row before.
    """

    keys: Sequence[bytes]
    rows: Rows
    stamp: int

    def keys_at(self, chosen: Places) -> list[bytes]:
        """The keys of some of the rows."""
        return [self.keys[i] for i in chosen.tolist()]


class Slab:
    """Rows of one layout, numbered 0 to ``count - 1``: a removed row is replaced by one from the end.

    Args:
        layout: of the rows.
        make_column: gives the memory for a leaf of this dtype and shape.
    """

    def __init__(self, layout: Layout, make_column: Callable[[torch.dtype, tuple[int, ...]], Column]) -> None:
        self.layout = layout
        self.row_bytes = layout.row_bytes
        self.count = 0
        self.stamps: Places = np.empty(0, np.int64)
        self.keys = np.empty((0, KEY_BYTES), np.uint8)
        self._columns = [make_column(dtype, shape) for dtype, shape in layout.leaves]

    def take(self, rows: Places) -> Rows:
        """These rows, in fresh memory."""
        columns = self._columns
        return Rows(
            self.layout,
            (columns[0].take(rows),) if len(columns) == 1 else tuple([column.take(rows) for column in columns]),
        )

    def lent(self, rows: Places, positions: Places) -> Lent | None:
        """These rows where they lie, until the next change; None where the host cannot read them."""
        leaves = [column.lent() for column in self._columns]
        held = tuple([leaf for leaf in leaves if leaf is not None])
        return Lent(self.layout, held, rows, positions) if len(held) == len(leaves) else None

    def append(self, batch: Batch, chosen: Places) -> Places:
        """Takes in the chosen rows of a batch; their numbers."""
        start, stop = self.count, self.count + len(chosen)
        self._fit(stop)
        for column, tensor in zip(self._columns, batch.rows.tensors, strict=True):
            column.append(start, tensor, chosen)
        joined = b"".join(batch.keys_at(chosen))
        self.keys[start:stop] = np.frombuffer(joined, np.uint8).reshape(-1, KEY_BYTES)
        self.stamps[start:stop] = chosen + batch.stamp
        self.count = stop
        return np.arange(start, stop)

    def overwrite(self, rows: Places, batch: Batch, chosen: Places) -> None:
        """Puts the chosen rows of a batch at rows that are there."""
        for column, tensor in zip(self._columns, batch.rows.tensors, strict=True):
            column.overwrite(rows, tensor, chosen)
        self.stamps[rows] = chosen + batch.stamp

    def remove(self, rows: Places) -> Places:
        """Drops rows; the numbers that were filled from the end, in ascending order."""
        left = self.count - len(rows)
        gone = np.zeros(self.count - left, np.bool_)
        gone[rows[rows >= left] - left] = True
        targets, sources = np.sort(rows[rows < left]), np.flatnonzero(~gone) + left
        if len(targets):
            for column in self._columns:
                column.move(targets, sources)
            self.keys[targets] = self.keys[sources]
            self.stamps[targets] = self.stamps[sources]
        self.count = left
        return targets

    def keys_at(self, rows: Places) -> list[bytes]:
        """The keys of these rows."""
        return cut_keys(self.keys[rows].tobytes())

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
        keys, stamps = self.keys[: self.count], self.stamps[: self.count]
        self.keys, self.stamps = zeros((capacity, KEY_BYTES), np.uint8), zeros((capacity,), np.int64)
        self.keys[: self.count], self.stamps[: self.count] = keys, stamps
