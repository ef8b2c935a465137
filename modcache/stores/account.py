"""What rows cost: their bytes, and the cost of finding them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["Account"]

# By resident memory at millions of rows: up to 55 in the index, 24 for key and last use in the slab.
ENTRY_BYTES: Final = 80
FREE_BYTES: Final = 64 << 10  # of index that costs nothing, so that a tiny bound holds what its user reckons


@dataclass(slots=True)
class Account:
    """The rows and bytes that a store holds now.

    >>> Account(rows=819, bytes=10).held_bytes, Account(rows=820, bytes=10).held_bytes
    (10, 74)
    """

    rows: int = 0
    bytes: int = 0

    @property
    def held_bytes(self) -> int:
        """The bytes that count against the bound."""
        return self.bytes + max(0, self.rows * ENTRY_BYTES - FREE_BYTES)

    @property
    def entry_bytes(self) -> int:
        """What the bound gains by one entry less."""
        return ENTRY_BYTES if self.rows * ENTRY_BYTES > FREE_BYTES else 0

    def plus(self, rows: int, row_bytes: int) -> Account:
        """The account after so many rows more, or fewer."""
        return Account(self.rows + rows, self.bytes + rows * row_bytes)

    def fitting(self, row_bytes: int, limit: int) -> int:
        """How many rows more there may be within a limit."""
        charged = (limit + FREE_BYTES - self.rows * ENTRY_BYTES - self.bytes) // (row_bytes + ENTRY_BYTES)
        free = (limit - self.bytes) // row_bytes if row_bytes else charged
        return max(0, min(charged, free))

    def drops_until(self, row_bytes: npt.NDArray[np.int64], limit: int) -> int:
        """How many of these rows, from the first on, must go for a limit to hold; all if too few."""
        rows, held = self.rows - np.arange(1, len(row_bytes) + 1), self.bytes - np.cumsum(row_bytes)
        enough = held + np.maximum(0, rows * ENTRY_BYTES - FREE_BYTES) <= limit
        return int(enough.argmax()) + 1 if enough.any() else len(row_bytes)
