"""Rows in memory, bounded by the bytes that they take."""

from __future__ import annotations

import contextlib
import functools
import itertools
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import UsageError, UsageTypeError
from .account import Account
from .budget import Budget, shared_budget
from .columns import columns_on
from .incoming import check_batch, last_of_each
from .protocol import Found, StoreStats
from .recency import Recency
from .shelf import Shelf
from .slab import Batch, Slab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from typing_extensions import Self

    from ..rows import Layout, Lent, Rows
    from .columns import Column

__all__ = ["MemoryStore"]

Used = TypeVar("Used")

_MERGED = 1024  # rows that are moved at a time when two namespaces become one
_clock = itertools.count()  # tells which namespace was retired first, over all stores


class MemoryStore:
    """Keeps rows in memory: on the host, in pinned memory of the host, or on an accelerator.

    Getting any number of rows is one indexed copy out of contiguous memory. A pickle or a deepcopy of a
    store is an empty store with the same options.

    Example:
        >>> import torch
        >>> from modcache.rows import SINGLE, Layout, Rows
        >>> store = MemoryStore(max_bytes=1 << 20)
        >>> layout = Layout(SINGLE, ((torch.float32, (2,)),))
        >>> store.put("names", [b"k" * 16], Rows(layout, (torch.ones(1, 2),)))
        1
        >>> found, = store.get("names", [b"other key 16 byt", b"k" * 16])
        >>> found.positions.tolist(), found.rows.tensors[0].tolist()
        ([1], [[1.0, 1.0]])

    Args:
        max_bytes: bound of the bytes held, over all namespaces and layouts: the rows, and from the 820th row
            on 80 bytes for finding each. With None, all such stores of the process together hold a quarter
            of the memory that the process may use (of the device's memory, on an accelerator), divided by the
            processes that ``LOCAL_WORLD_SIZE`` counts.
        device: ``"cpu"``, ``"pinned"`` (host memory that an accelerator reads by itself), or an accelerator.
        eviction: what happens when the store is full. ``"none"`` admits no more rows: best for epochs, where
            each row is used once a round. ``"lru"`` drops the rows that were not used for longest.
            Rows of retired namespaces go first in both.
    """

    def __init__(
        self, max_bytes: int | None = None, *, device: str | torch.device = "cpu", eviction: str = "none"
    ) -> None:
        if eviction not in ("none", "lru"):
            raise UsageError(f'eviction={eviction!r} is not known. Use "none" (keep what came first) or "lru".')
        self._max_bytes = _checked_bound(max_bytes)
        self._device_name, self._eviction = str(device), eviction
        tensors_on, self._make_column = columns_on(device)
        self._budget = shared_budget(tensors_on) if max_bytes is None else Budget(max_bytes)
        self._shelves: dict[str, Shelf] = {}
        self._account = Account()
        self._recency = Recency() if eviction == "lru" else None
        self._stamp = 0
        self._refused = self._evicted = 0
        self._closed = False
        self._budget.join(self)

    def __reduce__(self) -> tuple[Any, ...]:
        make = functools.partial(type(self), device=self._device_name, eviction=self._eviction)
        return make, (self._max_bytes,)

    def __repr__(self) -> str:
        name, options = type(self).__name__, f"device={self._device_name!r}, eviction={self._eviction!r}"
        return f"{name}({self._max_bytes}, {options})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, namespace: str, row_keys: Sequence[bytes]) -> tuple[Found, ...]:
        """The rows that are there, in fresh memory: one `Found` per layout."""
        # The lock is held over the copy, too: another thread might move the rows meanwhile.
        with self._budget.lock:
            shelf = self._shelves.get(namespace)
            if shelf is None or shelf.torn:
                return ()
            shelf.retired = None
            stamp = None if self._recency is None else self._next_stamp(len(row_keys))
            return shelf.get(row_keys, stamp)

    def lend(self, namespace: str, row_keys: Sequence[bytes], use: Callable[[list[Lent]], Used]) -> Used | None:
        """What ``use`` makes of the rows where they lie, one `Lent` per layout; None unless all of them can be lent."""
        with self._budget.lock:
            shelf = self._shelves.get(namespace)
            if shelf is None or shelf.torn:
                return None
            shelf.retired = None
            lent = shelf.lend(row_keys, None if self._recency is None else self._next_stamp(len(row_keys)))
            return None if lent is None else use(lent)

    def contains(self, namespace: str, row_keys: Sequence[bytes]) -> npt.NDArray[np.bool_]:
        """Which rows are there, without using them."""
        with self._budget.lock:
            shelf = self._shelves.get(namespace)
            if shelf is None or shelf.torn:
                return np.zeros(len(row_keys), np.bool_)
            return shelf.find(row_keys) >= 0

    def put(self, namespace: str, row_keys: Sequence[bytes], rows: Rows) -> int:
        """Keeps as many of the rows as the bound lets in; how many."""
        check_batch(row_keys, rows)
        with self._changing() as allowed:
            if not allowed or not row_keys:
                return 0
            shelf = self._shelves.setdefault(namespace, Shelf(self._account, self._make_slab()))
            shelf.retired, shelf.shrunk = None, True
            return self._admit(shelf, Batch(row_keys, rows, self._next_stamp(len(row_keys))))

    def delete(self, namespace: str, row_keys: Sequence[bytes] | None = None) -> int:
        """Drops these rows, or with None the whole namespace; the number of rows dropped."""
        with self._changing() as allowed:
            shelf = self._shelves.get(namespace)
            if shelf is None or not allowed:
                return 0
            return shelf.delete(shelf.keys() if row_keys is None else row_keys)

    def retire(self, namespace: str) -> None:
        """Lets the rows of a namespace go first when room is needed, until its next get or put."""
        with self._budget.lock:
            shelf = self._shelves.get(namespace)
            if shelf is not None and shelf.retired is None:
                shelf.retired = next(_clock)

    def rename(self, old: str, new: str) -> None:
        """Gives the rows of a namespace to another name, over rows that have it already."""
        with self._changing() as allowed:
            shelf, into = self._shelves.get(old), self._shelves.get(new)
            if shelf is None or shelf is into or not allowed:
                return
            shelf.retired = None
            if into is None:
                self._shelves[new] = self._shelves.pop(old)
            else:
                into.retired = None
                self._merge(shelf, into)

    def row_keys(self, namespace: str) -> list[bytes]:
        """The keys of all rows of a namespace, from the least to the most recently put (with "lru": used)."""
        with self._budget.lock:
            shelf = self._shelves.get(namespace)
            return [] if shelf is None or shelf.torn else shelf.keys()

    def namespaces(self) -> list[str]:
        """The namespaces that have at least one row."""
        with self._budget.lock:
            return list(self._shelves)

    def namespace_bytes(self, namespace: str) -> int:
        """The bytes of the rows of a namespace, without the cost of finding them; 0 where there are none."""
        with self._budget.lock:
            shelf = self._shelves.get(namespace)
            return 0 if shelf is None or shelf.torn else shelf.counted().bytes

    @property
    def shares_room(self) -> bool:
        """Whether it is open and has no bound of its own, but a share of what all such stores may hold."""
        return self._max_bytes is None and not self._closed

    def stats(self) -> StoreStats:
        """What is held; without a bound of its own, ``max_bytes`` is what all such stores share."""
        with self._budget.lock:
            return StoreStats(
                rows=self._account.rows,
                bytes=self._account.held_bytes,
                max_bytes=self._budget.max_bytes,
                namespaces=len(self._shelves),
                refused=self._refused,
                evicted=self._evicted,
            )

    def flush(self) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        """Gives back all memory; afterwards the store finds nothing and admits nothing."""
        with self._changing() as allowed:
            self._closed = True
            if allowed:
                for shelf in self._shelves.values():
                    shelf.clear()
                self._recount()

    def held_bytes(self) -> int:
        """The bytes that count against the bound."""
        return self._account.held_bytes

    def retired_since(self) -> int | None:
        """When the oldest of the retired namespaces was retired, on a clock that all stores share."""
        return min((since for shelf in self._shelves.values() if (since := shelf.retired) is not None), default=None)

    def drop_retired(self, wanted: int) -> None:
        """Drops rows of the oldest retired namespace until so many bytes are free or it is empty."""
        self._mend()
        since = self.retired_since()
        name = next(name for name, shelf in self._shelves.items() if shelf.retired == since and not shelf.torn)
        shelf = self._shelves[name]
        if len(shelf):
            self._evicted += shelf.delete(shelf.keys_worth(wanted, self._account.entry_bytes))
        self._tidy(name)

    def _admit(self, shelf: Shelf, batch: Batch) -> int:
        row_bytes = batch.rows.layout.row_bytes
        chosen = last_of_each(batch.keys)
        places = shelf.find(batch.keys_at(chosen))
        same = shelf.overwrite(places, batch, chosen)
        # A row of another layout goes now: also when the new one is refused, the old one is no longer right.
        shelf.delete(batch.keys_at(chosen[(places >= 0) & ~same]))
        new = chosen[~same]
        kept, room = int(same.sum()), 0
        if Account().fitting(row_bytes, self._budget.max_bytes):
            limit = self._make_room(len(new), row_bytes)
            if self._recency is not None and self._account.fitting(row_bytes, limit) < len(new):
                most = Account().fitting(row_bytes, limit)
                # Of a batch that is larger than the store, the end stays: as if its rows came one by one.
                first = chosen[: max(0, len(chosen) - most)]
                kept -= int(np.isin(first, chosen[same]).sum())
                self._evicted += shelf.delete(batch.keys_at(first))
                new = np.setdiff1d(new, first)
                self._evict(len(new), row_bytes, limit, batch.stamp)
            room = self._account.fitting(row_bytes, limit)
        admitted = new[:room]
        shelf.put(batch, admitted)
        kept += len(admitted)
        self._refused += len(chosen) - kept
        return kept

    def _make_room(self, count: int, row_bytes: int) -> int:
        """Lets retired rows go where these rows need the room; the bytes that this store may then hold."""
        wanted = self._account.plus(count, row_bytes).held_bytes - self._account.held_bytes
        return self._budget.make_room(wanted) + self._account.held_bytes

    def _evict(self, count: int, row_bytes: int, limit: int, before: int) -> None:
        """Drops the rows that were not used for longest, until there is room for so many new ones."""
        assert self._recency is not None
        while (full := self._account.plus(count, row_bytes)).held_bytes > limit:
            drops = functools.partial(full.drops_until, limit=limit)
            self._evicted += self._recency.evict(list(self._shelves.values()), before, drops)

    def _merge(self, shelf: Shelf, into: Shelf) -> None:
        keys = shelf.keys()
        for start in range(0, len(keys), _MERGED):
            chunk = keys[start : start + _MERGED]
            found = shelf.get(chunk, None)
            shelf.delete(chunk)
            into.delete(chunk)
            for part in found:
                part_keys = [chunk[i] for i in part.positions.tolist()]
                into.put(Batch(part_keys, part.rows, self._next_stamp(len(chunk))), np.arange(len(part_keys)))

    @contextlib.contextmanager
    def _changing(self) -> Iterator[bool]:
        """Holds the lock over a change; gives back the memory of dropped rows at its end: rows may follow.

        Yields False when this thread is in the middle of another change: a signal handler or a finaliser
        that uses a store then finds it closed.
        """
        with self._budget.lock:
            if self._budget.busy:
                yield False
                return
            self._budget.busy = True
            try:
                self._mend()
                yield not self._closed
                for name in [name for name, shelf in self._shelves.items() if shelf.shrunk]:
                    self._tidy(name)
            finally:
                self._budget.busy = False

    def _mend(self) -> None:
        """Drops the namespaces in the middle of whose last change an exception came, perhaps an interrupt."""
        torn = [shelf for shelf in self._shelves.values() if shelf.torn]
        for shelf in torn:
            shelf.clear()
        if torn:
            self._recount()

    def _recount(self) -> None:
        counted = [shelf.counted() for shelf in self._shelves.values()]
        self._account.rows = sum(account.rows for account in counted)
        self._account.bytes = sum(account.bytes for account in counted)

    def _tidy(self, name: str) -> None:
        shelf = self._shelves[name]
        shelf.trim()
        if not len(shelf):
            del self._shelves[name]

    def _next_stamp(self, count: int) -> int:
        self._stamp += count
        return self._stamp - count

    def _make_slab(self) -> Callable[[Layout], Slab]:
        # Not a method: a shelf that held its store would keep the rows of a dead module till the next gc.
        return functools.partial(_slab, self._make_column, self._budget.max_bytes)


def _slab(make_column: Callable[..., Column], max_bytes: int, layout: Layout) -> Slab:
    return Slab(layout, functools.partial(make_column, most=Account().fitting(layout.row_bytes, max_bytes)))


def _checked_bound(max_bytes: int | None) -> int | None:
    if max_bytes is None:
        return None
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
        raise UsageTypeError(
            f"max_bytes is a number of bytes (an int) or None, but {max_bytes!r} was given. "
            "Use None for a share of the memory that this process may use."
        )
    if max_bytes <= 0:
        raise UsageError(
            f"max_bytes={max_bytes} leaves no room for any row. "
            "Give a positive number of bytes, or None for a share of the memory that this process may use."
        )
    return max_bytes
