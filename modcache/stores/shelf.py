"""The rows of one namespace: an index over slabs, one slab for each layout."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .account import Account
from .index import KEY_BYTES, KeyIndex, Places
from .protocol import Found

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ..rows import Layout, Lent
    from .slab import Batch, Slab

__all__ = ["Shelf"]

_ROW_BITS = 32  # a place is the number of a slab, then the number of a row in it
_ROW_MASK = (1 << _ROW_BITS) - 1
_NONE: Places = np.empty(0, np.int64)


class Shelf:
    """Rows of one namespace.

    Args:
        account: of the store; the rows here are counted there.
        make_slab: gives an empty slab for a layout.
    """

    def __init__(self, account: Account, make_slab: Callable[[Layout], Slab]) -> None:
        self.retired: int | None = None
        self.shrunk = False  # rows were dropped since the last trim
        self.torn = False  # in the middle of a change, or left there by an exception: see `_changing`
        self._account = account
        self._make_slab = make_slab
        self._index = KeyIndex()
        self._slabs: dict[int, Slab] = {}
        self._numbers: dict[Layout, int] = {}

    def __len__(self) -> int:
        return len(self._index)

    def find(self, keys: Sequence[bytes]) -> Places:
        """The place of each row, -1 where it is absent."""
        return self._index.find(keys)

    def get(self, keys: Sequence[bytes], stamp: int | None) -> tuple[Found, ...]:
        """The rows of these keys in fresh memory, by layout; notes their use unless stamp is None."""
        places, complete = self._index.locate(keys)
        if complete and keys and len(self._slabs) == 1 and 0 in self._slabs:  # as is the rule
            return (self._found(self._slabs[0], _all(len(keys)), places, stamp),)
        return tuple([self._found(slab, at, rows, stamp) for slab, at, rows in self._by_slab(places)])

    def lend(self, keys: Sequence[bytes], stamp: int | None) -> list[Lent] | None:
        """The rows of these keys where they lie, by layout, until the next change; None unless all can be lent."""
        places, complete = self._index.locate(keys)
        if not complete:
            return None
        one = len(self._slabs) == 1 and 0 in self._slabs and len(keys)
        parts = [(self._slabs[0], _all(len(keys)), places)] if one else self._by_slab(places)
        found = []
        for slab, positions, rows in parts:
            lent = slab.lent(rows, positions)
            if lent is None:
                return None
            if stamp is not None:
                slab.stamps[rows] = positions + stamp
            found.append(lent)
        return found

    def put(self, batch: Batch, chosen: Places) -> None:
        """Adds those rows of a batch that are chosen; none of them is here."""
        if not len(chosen):
            return
        self.torn = True
        slab, number = self._slab_for(batch.rows.layout)
        added = slab.append(batch, chosen)
        self._index.set(batch.keys_at(chosen), added | (number << _ROW_BITS))
        self._count(len(chosen), slab)
        self.torn = False

    def overwrite(self, places: Places, batch: Batch, chosen: Places) -> npt.NDArray[np.bool_]:
        """Puts the chosen rows of a batch at their places, where these have its layout; which places have."""
        number = self._numbers.get(batch.rows.layout, -2)
        same: npt.NDArray[np.bool_] = places >> _ROW_BITS == number
        if same.any():
            self.torn = True
            self._slabs[number].overwrite(places[same] & _ROW_MASK, batch, chosen[same])
            self.torn = False
        return same

    def delete(self, keys: Sequence[bytes]) -> int:
        """Drops rows; how many there were."""
        if not keys:
            return 0
        self.torn = self.shrunk = True
        places = self._index.delete(keys)
        for slab, _, rows in self._by_slab(places):
            number = self._numbers[slab.layout]
            moved = slab.remove(rows)
            self._index.set(slab.keys_at(moved), moved | (number << _ROW_BITS))
            self._count(-len(rows), slab)
        self.torn = False
        return int((places >= 0).sum())

    def keys(self) -> list[bytes]:
        """The keys of all rows, from the least to the most recently used."""
        keys = [key for slab in self._slabs.values() for key in slab.keys_at(np.arange(slab.count))]
        stamps = np.concatenate([_NONE, *self.last_uses()])
        return [keys[i] for i in np.argsort(stamps, kind="stable").tolist()]

    def keys_worth(self, wanted: int, entry_bytes: int) -> list[bytes]:
        """Keys of rows that together take so many bytes, or of all rows of one slab."""
        slab = next(reversed(self._slabs.values()))
        each = slab.row_bytes + entry_bytes
        count = min(slab.count, -(-wanted // each)) if each else slab.count
        return slab.keys_at(np.arange(slab.count - count, slab.count))

    def last_uses(self) -> list[Places]:
        """When each row was used last, for each slab."""
        return [slab.stamps[: slab.count] for slab in self._slabs.values()]

    def used_until(self, stamp: int) -> tuple[npt.NDArray[np.uint8], Places]:
        """The keys of rows that were not used later than that, 16 bytes a row, and when they were."""
        old = [(slab, np.flatnonzero(slab.stamps[: slab.count] <= stamp)) for slab in self._slabs.values()]
        keys = [np.empty((0, KEY_BYTES), np.uint8), *(slab.keys[rows] for slab, rows in old)]
        return np.concatenate(keys), np.concatenate([_NONE, *(slab.stamps[rows] for slab, rows in old)])

    def facts(self, keys: Sequence[bytes]) -> tuple[Places, Places]:
        """When each row was used last, -1 where it is absent, and its bytes."""
        stamps, sizes = np.full(len(keys), -1, np.int64), np.zeros(len(keys), np.int64)
        for slab, positions, rows in self._by_slab(self._index.find(keys)):
            stamps[positions], sizes[positions] = slab.stamps[rows], slab.row_bytes
        return stamps, sizes

    def clear(self) -> None:
        """Drops all rows, also when an exception left them in disorder."""
        self._index, self._slabs, self._numbers = KeyIndex(), {}, {}
        self.torn, self.shrunk = False, True

    def counted(self) -> Account:
        """The account of the rows here alone."""
        slabs = self._slabs.values()
        return Account(sum(slab.count for slab in slabs), sum(slab.count * slab.row_bytes for slab in slabs))

    def trim(self) -> None:
        """Gives back memory that the rows do not need."""
        for slab in list(self._slabs.values()):
            slab.trim()
            if not slab.count:
                del self._slabs[self._numbers.pop(slab.layout)]
        self.shrunk = False

    def _found(self, slab: Slab, positions: Places, rows: Places, stamp: int | None) -> Found:
        if stamp is not None:
            slab.stamps[rows] = positions + stamp
        return Found(positions, slab.take(rows))

    def _by_slab(self, places: Places) -> Iterator[tuple[Slab, Places, Places]]:
        """For each slab that is meant: which of the places mean it, ascending, and the rows in it."""
        numbers = places >> _ROW_BITS
        order = np.argsort(numbers, kind="stable")
        numbers, rows = numbers[order], (places & _ROW_MASK)[order]
        first = int(numbers.searchsorted(0))  # behind those that are absent
        changes = np.flatnonzero(numbers[first + 1 :] != numbers[first:-1]) + (first + 1)
        edges = [first, *changes.tolist(), len(numbers)]
        for start, stop in itertools.pairwise(edges if first < len(numbers) else ()):
            yield self._slabs[int(numbers[start])], order[start:stop], rows[start:stop]

    def _slab_for(self, layout: Layout) -> tuple[Slab, int]:
        if layout not in self._numbers:
            number = next(number for number in range(len(self._slabs) + 1) if number not in self._slabs)
            self._numbers[layout], self._slabs[number] = number, self._make_slab(layout)
        return self._slabs[self._numbers[layout]], self._numbers[layout]

    def _count(self, rows: int, slab: Slab) -> None:
        self._account.rows += rows
        self._account.bytes += rows * slab.row_bytes


@functools.lru_cache(maxsize=64)
def _all(count: int) -> Places:
    """The positions of so many keys: every hit of a loop has as many."""
    positions = np.arange(count)
    positions.flags.writeable = False
    return positions
