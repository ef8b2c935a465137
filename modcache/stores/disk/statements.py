"""Of all that was said about the rows of a namespace, what counts: for each key the latest word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from ..index import KEY_BYTES, KeyIndex, Places, cut_keys
from .window import ROW_BITS

__all__ = ["Statements"]

_NEWEST: Final = 1 << 16  # keys that are quick to note; more of them are moved at a time, which may take 20 ms
_MANY: Final = 1 << 17  # keys that are noted at a time when more and more are put and nobody asks for one
_ROW_MASK: Final = (1 << ROW_BITS) - 1

StampsOf = Callable[[Places], Places]


class Statements:
    """Where the rows of keys lie, as far as they were not dropped or replaced later.

    Whoever reads several logs learns of things out of their order, so a key that was dropped stays noted.

    Args:
        stamps_of: when the rows at some places were committed.
    """

    def __init__(self, stamps_of: StampsOf) -> None:
        self._stamps_of = stamps_of
        self._noted = KeyIndex(_NEWEST)
        self._fresh: list[tuple[bytes, int]] = []  # rows of our own that are not in the index yet
        self._fresh_rows = 0
        self._dropped: dict[bytes, int] = {}
        self._hidden = 0  # nothing that was said until then counts

    def __len__(self) -> int:
        return len(self._index)

    def locate(self, keys: Sequence[bytes]) -> tuple[Places, bool]:
        """The place of each key, -1 where it is absent, and whether all of them are here."""
        return self._index.locate(keys)

    def keys(self) -> list[bytes]:
        """The keys of all rows."""
        return self._index.keys()

    def set(self, joined: bytes, first: int) -> None:
        """Rows of our own, said just now, at places that follow each other.

        Whoever puts rows does not wait for the index: they go there when it is asked, or by `settle`.
        """
        self._fresh.append((joined, first))
        self._fresh_rows += len(joined) // KEY_BYTES
        for key in cut_keys(joined) if self._dropped else ():
            self._dropped.pop(key, None)

    def settle(self, least: int = _MANY) -> None:
        """Notes the rows of our own that are not in the index yet, if there are so many."""
        if self._fresh and self._fresh_rows >= least:
            fresh, self._fresh, self._fresh_rows = self._fresh, [], 0
            places = [np.arange(first, first + len(joined) // KEY_BYTES) for joined, first in fresh]
            self._noted.set_joined(b"".join([joined for joined, _ in fresh]), np.concatenate(places))

    @property
    def _index(self) -> KeyIndex:
        """The index, with all that was said."""
        if self._fresh:
            self.settle(0)
        return self._noted

    def forget(self, keys: Sequence[bytes]) -> None:
        """Rows that turned out not to be there; the same key may still be said anew, or earlier."""
        self._index.delete(keys)

    def delete(self, keys: Sequence[bytes], stamp: int) -> int:
        """Drops rows; how many there were."""
        places = self._index.delete(keys)
        self._dropped.update(dict.fromkeys(keys, stamp))
        return int((places >= 0).sum())

    def hide(self, stamp: int) -> int:
        """Drops all rows that were said until now; how many there were."""
        count, self._hidden = len(self._index), stamp
        self._noted, self._dropped = KeyIndex(_NEWEST), {}
        return count

    def take_in(self, joined: bytes, places: Places, stamps: Places) -> None:
        """Rows that somebody committed, in the order of their places."""
        later = self._is_later(joined, stamps)
        if not later.all():
            kept = np.flatnonzero(later)
            joined = np.frombuffer(joined, np.uint8).reshape(-1, KEY_BYTES)[kept].tobytes()
            places = places[kept]
        self._index.set_joined(joined, places)

    def take_out(self, joined: bytes, stamps: Places) -> None:
        """Keys that somebody dropped."""
        keys, places = cut_keys(joined), self._index.find_joined(joined)
        known, here = np.full(len(keys), -1, np.int64), places >= 0
        known[here] = self._stamps_of(places[here])
        self._index.delete([keys[i] for i in np.flatnonzero(here & (known <= stamps)).tolist()])
        for key, stamp in zip(keys, stamps.tolist(), strict=True):
            self._dropped[key] = max(stamp, self._dropped.get(key, 0))

    def at(self, joined: bytes, places: Places) -> npt.NDArray[np.bool_]:
        """Which keys have exactly these places."""
        same: npt.NDArray[np.bool_] = self._index.find_joined(joined) == places
        return same

    def forget_segments(self, numbers: Sequence[int], low: int) -> int:
        """Forgets all rows of some segments from a row on; how many there were."""
        keys = self._index.keys()
        places = self._index.find_joined(b"".join(keys))
        gone = np.flatnonzero(np.isin(places >> ROW_BITS, np.array(numbers)) & (places & _ROW_MASK >= low))
        self._index.delete([keys[i] for i in gone.tolist()])
        return len(gone)

    def _is_later(self, joined: bytes, stamps: Places) -> npt.NDArray[np.bool_]:
        """Which of these are later than what is known of their keys."""
        later: npt.NDArray[np.bool_] = stamps > self._hidden
        if self._dropped:
            later &= stamps > np.array([self._dropped.get(key, -1) for key in cut_keys(joined)], np.int64)
        if len(self._index):
            known = self._index.find_joined(joined)
            here = np.flatnonzero(known >= 0)
            later[here] &= stamps[here] >= self._stamps_of(known[here])
        return later
