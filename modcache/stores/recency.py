"""Drop the rows that were not used for longest, exactly and without keeping them sorted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from .index import KEY_BYTES, Places, cut_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .shelf import Shelf

__all__ = ["Recency"]

_LEAST: Final = 1024  # candidates that are looked up at once, and the shortest queue
_SHARE: Final = 8  # a queue holds an eighth of the rows, so that finding it costs little for each of them


class Recency:
    """A queue of the rows that were not used for longest, with the time of that use.

    Each row carries the stamp of its last use. When the queue has run out, the oldest rows are looked for
    among all; until it runs out again, the next to go is the first whose stamp has not moved. That is exact:
    whatever was used or came since has a later stamp than any row in the queue.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Starts a new queue: needed when a row moves between shelves."""
        self._shelves: Sequence[Shelf] = ()
        self._owners = self._stamps = np.empty(0, np.int64)
        self._keys = np.empty((0, KEY_BYTES), np.uint8)

    def evict(self, shelves: Sequence[Shelf], before: int, count: Callable[[Places], int]) -> int:
        """Drops some of the oldest rows; how many, perhaps none.

        Args:
            shelves: all rows there are.
            before: only rows whose last use was earlier. Rows that are yet to come have later ones, except
                those of the batch that needs the room: hence none of it may get into the queue.
            count: says for the bytes of rows, oldest first, how many have to go.
        """
        if not len(self._keys):
            self._look_around(shelves, before)
        keys = cut_keys(self._keys[:_LEAST].tobytes())
        owners, stamps = self._owners[:_LEAST], self._stamps[:_LEAST]
        now, sizes = np.empty_like(stamps), np.empty_like(stamps)
        for owner in np.unique(owners).tolist():
            mine = owners == owner
            now[mine], sizes[mine] = self._shelves[owner].facts([keys[i] for i in np.flatnonzero(mine).tolist()])
        unmoved = np.flatnonzero(now == stamps)
        gone = unmoved[: count(sizes[unmoved])] if len(unmoved) else unmoved
        for owner in np.unique(owners[gone]).tolist():
            self._shelves[owner].delete([keys[i] for i in gone[owners[gone] == owner].tolist()])
        passed = int(gone[-1]) + 1 if len(gone) < len(unmoved) else len(keys)
        self._keys, self._owners, self._stamps = (
            self._keys[passed:],
            self._owners[passed:],
            self._stamps[passed:],
        )
        return len(gone)

    def _look_around(self, shelves: Sequence[Shelf], before: int) -> None:
        stamps = np.concatenate([stamps for shelf in shelves for stamps in shelf.last_uses()])
        stamps = stamps[stamps < before]
        wanted = min(len(stamps), max(_LEAST, len(stamps) // _SHARE))
        latest = int(np.partition(stamps, wanted - 1)[wanted - 1])
        old = [shelf.used_until(latest) for shelf in shelves]
        owners = np.repeat(np.arange(len(old)), [len(keys) for keys, _ in old])
        stamps = np.concatenate([stamps for _, stamps in old])
        order = np.argsort(stamps)
        self._shelves, self._keys = shelves, np.concatenate([keys for keys, _ in old])[order]
        self._owners, self._stamps = owners[order], stamps[order]
