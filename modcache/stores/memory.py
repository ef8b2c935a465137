"""Rows in memory, bounded by the bytes that they take."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from modcache.errors import UsageError, UsageTypeError
from modcache.rows import Layout, Rows
from modcache.stores.account import Account
from modcache.stores.budget import Budget, shared_budget
from modcache.stores.columns import Column, DeviceColumn, HostColumn
from modcache.stores.index import KEY_BYTES
from modcache.stores.protocol import Found, StoreStats
from modcache.stores.recency import Recency
from modcache.stores.shelf import Shelf
from modcache.stores.slab import Slab

__all__ = ["MemoryStore"]

Places = npt.NDArray[np.int64]

_EVICTIONS = ("none", "lru")
_MERGED = 1024  # rows that are moved at a time when two namespaces become one
_clock = itertools.count()  # tells which namespace was retired first, over all stores


class MemoryStore:
    """Keeps rows in memory: on the host, in pinned memory of the host, or on an accelerator.

    Getting any number of rows is one indexed copy out of contiguous memory. A pickle or a deepcopy of a
    store is an empty store with the same options.

    Example:
        >>> store = MemoryStore(max_bytes=1 << 20)
        >>> layout = Layout("*", ((torch.float32, (2,)),))
        >>> store.put("names", [b"k" * 16], Rows(layout, (torch.ones(1, 2),)))
        1
        >>> found, = store.get("names", [b"other key 16 byt", b"k" * 16])
        >>> found.positions.tolist(), found.rows.tensors[0].tolist()
        ([1], [[1.0, 1.0]])

    Args:
        max_bytes: bound of the bytes held, over all namespaces and layouts: the rows, and from the 1025th row
            on 64 bytes for finding each. With None, all such stores of the process together hold a quarter
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
        self._options = {"device": str(device), "eviction": _checked_eviction(eviction)}
        self._max_bytes = _checked_bound(max_bytes)
        self._pinned, self._device = _checked_device(device)
        self._budget = shared_budget(self._device) if max_bytes is None else Budget(max_bytes)
        self._shelves: dict[str, Shelf] = {}
        self._account = Account()
        self._recency = Recency() if eviction == "lru" else None
        self._stamp = 0
        self._refused = self._evicted = 0
        self._closed = False
        self._budget.join(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), **self._options), (self._max_bytes,)

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self._options.items())
        return f"{type(self).__name__}({self._max_bytes}{options})"

    def get(self, namespace: str, row_keys: Sequence[bytes]) -> tuple[Found, ...]:
        """The rows that are there, in fresh memory: one `Found` per layout."""
        with self._budget.lock:
            shelf = self._shelves.get(namespace)
            if shelf is None:
                return ()
            shelf.retired = None
            stamp = None if self._recency is None else self._next_stamp(len(row_keys))
            return shelf.take(shelf.find(row_keys), stamp)

    def contains(self, namespace: str, row_keys: Sequence[bytes]) -> npt.NDArray[np.bool_]:
        """Which rows are there, without using them."""
        with self._budget.lock:
            shelf = self._shelves.get(namespace)
            return np.zeros(len(row_keys), np.bool_) if shelf is None else shelf.find(row_keys) >= 0

    def put(self, namespace: str, row_keys: Sequence[bytes], rows: Rows) -> int:
        """Keeps as many of the rows as the bound lets in, the first ones first; how many."""
        _check_batch(row_keys, rows)
        with self._budget.lock:
            if self._closed or not row_keys:
                return 0
            shelf = self._shelves.setdefault(namespace, Shelf(self._account, self._make_slab))
            shelf.retired = None
            try:
                return self._admit(shelf, row_keys, rows)
            finally:
                shelf.shrunk = shelf.shrunk or not len(shelf)
                self._tidy()

    def delete(self, namespace: str, row_keys: Sequence[bytes] | None = None) -> int:
        """Drops these rows, or with None the whole namespace; the number of rows dropped."""
        with self._budget.lock:
            shelf = self._shelves.get(namespace)
            if shelf is None:
                return 0
            dropped = len(shelf)
            if row_keys is None:
                shelf.clear()
            else:
                dropped = shelf.delete(row_keys)
            self._tidy()
            return dropped

    def retire(self, namespace: str) -> None:
        """Lets the rows of a namespace go first when room is needed, until its next get or put."""
        with self._budget.lock:
            shelf = self._shelves.get(namespace)
            if shelf is not None and shelf.retired is None:
                shelf.retired = next(_clock)

    def rename(self, old: str, new: str) -> None:
        """Gives the rows of a namespace to another name, over rows that have it already."""
        with self._budget.lock:
            if old == new or old not in self._shelves:
                return
            shelf = self._shelves.pop(old)
            shelf.retired = None
            if new in self._shelves:
                self._merge(self._shelves[new], shelf)
            else:
                self._shelves[new] = shelf

    def row_keys(self, namespace: str) -> list[bytes]:
        """The keys of all rows of a namespace."""
        with self._budget.lock:
            shelf = self._shelves.get(namespace)
            return [] if shelf is None else shelf.keys()

    def namespaces(self) -> list[str]:
        """The namespaces that have at least one row."""
        with self._budget.lock:
            return list(self._shelves)

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
        with self._budget.lock:
            self._closed = True
            for shelf in self._shelves.values():
                shelf.clear()
            self._tidy()

    def held_bytes(self) -> int:
        """The bytes that count against the bound."""
        return self._account.held_bytes

    def retired_since(self) -> int | None:
        """When the oldest of the retired namespaces was retired, on a clock that all stores share."""
        return min((since for shelf in self._shelves.values() if (since := shelf.retired) is not None), default=None)

    def drop_retired(self, wanted: int) -> None:
        """Drops rows of the oldest retired namespace until so many bytes are free or it is empty."""
        since = self.retired_since()
        name = next(name for name, shelf in self._shelves.items() if shelf.retired == since)
        shelf = self._shelves[name]
        keys = shelf.keys_worth(wanted, self._account.entry_bytes)
        self._evicted += shelf.delete(keys)
        shelf.trim()
        if not len(shelf):
            del self._shelves[name]

    def _admit(self, shelf: Shelf, keys: Sequence[bytes], rows: Rows) -> int:
        stamp, row_bytes = self._next_stamp(len(keys)), rows.layout.row_bytes
        chosen = _last_of_each(keys)
        places = shelf.find([keys[i] for i in chosen.tolist()])
        same = shelf.overwrite(places, rows, chosen, stamp)
        # A row of another layout goes now: also when the new one is refused, the old one is no longer right.
        shelf.delete([keys[i] for i in chosen[(places >= 0) & ~same].tolist()])
        new = chosen[~same]
        if Account().fitting(row_bytes, self._budget.max_bytes):
            limit = self._make_room(len(new), row_bytes)
            if self._recency is not None and self._account.fitting(row_bytes, limit) < len(new):
                new = self._evict(shelf, keys, chosen, new, row_bytes, limit, stamp)
            admitted = new[: self._account.fitting(row_bytes, limit)]
            shelf.put(keys, rows, admitted, stamp)
        else:
            admitted = new[:0]
        self._refused += int((~same).sum()) - len(admitted)
        return int(same.sum()) + len(admitted)

    def _make_room(self, count: int, row_bytes: int) -> int:
        """Lets retired rows go where these rows need the room; the bytes that this store may then hold."""
        free = self._budget.make_room(self._account.plus(count, row_bytes).held_bytes - self._account.held_bytes)
        return free + self._account.held_bytes

    def _evict(
        self, shelf: Shelf, keys: Sequence[bytes], chosen: Places, new: Places, row_bytes: int, limit: int, stamp: int
    ) -> Places:
        """Drops the rows that were not used for longest; which of the new ones there is room for then."""
        assert self._recency is not None
        most = Account().fitting(row_bytes, limit)
        beyond = chosen[: max(0, len(chosen) - most)]  # one batch that is larger than the store: its end stays
        self._evicted += shelf.delete([keys[i] for i in beyond.tolist()])
        new = new[~np.isin(new, beyond)]
        while (after := self._account.plus(len(new), row_bytes)).held_bytes > limit:
            self._evicted += self._recency.evict(
                list(self._shelves.values()), stamp, functools.partial(after.drops_until, limit=limit)
            )
        return new

    def _merge(self, into: Shelf, shelf: Shelf) -> None:
        keys = shelf.keys()
        for start in range(0, len(keys), _MERGED):
            chunk = keys[start : start + _MERGED]
            found = shelf.take(shelf.find(chunk), None)
            shelf.delete(chunk)
            into.delete(chunk)
            for part in found:
                part_keys = [chunk[i] for i in part.positions.tolist()]
                every = np.arange(len(part_keys))
                into.put(part_keys, part.rows, every, self._next_stamp(len(part_keys)))

    def _tidy(self) -> None:
        """Gives back the memory of dropped rows, at the end of a change and not before: rows may follow."""
        for name, shelf in list(self._shelves.items()):
            if shelf.shrunk:
                shelf.trim()
                if not len(shelf):
                    del self._shelves[name]

    def _next_stamp(self, count: int) -> int:
        self._stamp += count
        return self._stamp - count

    def _make_slab(self, layout: Layout) -> Slab:
        most = Account().fitting(layout.row_bytes, self._budget.max_bytes)
        if self._pinned or self._device.type != "cpu":
            device = functools.partial(DeviceColumn, device=self._device, pinned=self._pinned)
            return Slab(layout, lambda dtype, shape: device(dtype, shape, most))
        return Slab(layout, lambda dtype, shape: HostColumn(dtype, shape, most))


def _last_of_each(keys: Sequence[bytes]) -> Places:
    """The places of the keys, ascending, of equal keys only the last."""
    last = dict(zip(keys, range(len(keys))))
    if len(last) == len(keys):
        return np.arange(len(keys))
    return np.sort(np.fromiter(last.values(), np.int64, len(last)))


def _check_batch(keys: Sequence[bytes], rows: Rows) -> None:
    odd = {len(key) for key in keys} - {KEY_BYTES}
    if odd:
        raise UsageError(f"A row key is {KEY_BYTES} bytes, but one of {odd.pop()} bytes was given.")
    counts = {len(tensor) for tensor in rows.tensors}
    if counts - {len(keys)}:
        raise UsageError(f"There are {len(keys)} row keys, but tensors of {sorted(counts)} rows.")


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


def _checked_eviction(eviction: str) -> str:
    if eviction not in _EVICTIONS:
        raise UsageError(f'eviction={eviction!r} is not known. Use "none" (keep what came first) or "lru".')
    return eviction


def _checked_device(device: str | torch.device) -> tuple[bool, torch.device]:
    """Whether the memory is pinned, and the device on which tensors are made."""
    if not isinstance(device, (str, torch.device)):
        raise UsageTypeError(f'device is "cpu", "pinned" or a device of torch, but {device!r} was given.')
    if device == "pinned":
        if not torch.cuda.is_available():
            raise UsageError('device="pinned" needs CUDA, which this process does not have. Use device="cpu".')
        return True, torch.device("cpu")
    try:
        known = torch.device(device)
    except RuntimeError:
        raise UsageError(f'device={device!r} is not a device of torch. Use "cpu", "pinned" or "cuda:0".') from None
    if known.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f'device={device!r} needs CUDA, which this process does not have. Use device="cpu".')
    return False, known
