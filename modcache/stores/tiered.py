"""One store in front of another: what the front lacks comes from the back and stays in front."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from ..errors import UsageTypeError
from ..rows import Layout, Rows
from .protocol import Describes, Found, Store, StoreStats, bytes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from typing_extensions import Self

    from ..rows import Lent
    from .index import Places

__all__ = ["TieredStore"]

Used = TypeVar("Used")


@runtime_checkable
class _Contains(Protocol):
    def contains(self, namespace: str, row_keys: Sequence[bytes]) -> npt.NDArray[np.bool_]: ...


@runtime_checkable
class _Retires(Protocol):
    def retire(self, namespace: str) -> None: ...


@runtime_checkable
class _Renames(Protocol):
    def rename(self, old: str, new: str) -> None: ...


@runtime_checkable
class _CountsBytes(Protocol):
    def namespace_bytes(self, namespace: str) -> int: ...


class _Changes:
    """Tells whether rows that were read a while ago may still be put in front: nothing was changed since.

    Changes only note that they begin and end, so they wait for no other change and for no slow reader.
    """

    def __init__(self) -> None:
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._begun = self._running = 0

    def _locked(self) -> threading.RLock:
        """The lock; a forked child begins anew, as a thread of the parent may have been in the middle."""
        if self._process != os.getpid():
            self._begin_anew()
        return self._lock

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """Around whatever changes rows."""
        with self._locked():
            self._begun += 1
            self._running += 1
        try:
            yield
        finally:
            with self._locked():
                self._running = max(0, self._running - 1)

    def seen(self) -> int | None:
        """The number of changes up to now, or None in the middle of one."""
        with self._locked():
            return None if self._running else self._begun

    @contextlib.contextmanager
    def unchanged_since(self, seen: int | None) -> Iterator[bool]:
        """Whether nothing has changed since; if so, no change begins before the end of the block."""
        with self._locked():
            yield seen is not None and seen == self._begun


class TieredStore:
    """Rows from the front where it has them, else from the back, and then kept in the front, too.

    What is put or deleted goes to both. `contains`, `retire` and `rename` go to the tiers that have them,
    and what describes namespaces to the one that has it.
    A pickle or a deepcopy has copies of the tiers, and counts anew.

    Example:
        >>> import torch
        >>> from modcache.rows import SINGLE, Layout, Rows
        >>> from modcache.stores import MemoryStore
        >>> store = TieredStore(MemoryStore(), MemoryStore())
        >>> layout = Layout(SINGLE, ((torch.float32, (2,)),))
        >>> store.put("names", [b"k" * 16], Rows(layout, (torch.ones(1, 2),)))
        1
        >>> store.front.delete("names")
        1
        >>> found, = store.get("names", [b"k" * 16])
        >>> found.rows.tensors[0].tolist(), store.front.stats().rows
        ([[1.0, 1.0]], 1)

    Args:
        front: the quicker store, usually a `MemoryStore`.
        back: the larger or lasting one.
    """

    def __init__(self, front: Store, back: Store) -> None:
        for name, tier in (("front", front), ("back", back)):
            if not isinstance(tier, Store):
                raise UsageTypeError(
                    f"The {name} of a TieredStore is a store, but {tier!r} was given. "
                    "A store has the methods of modcache.stores.Store."
                )
        self.front = front
        self.back = back
        describing = next((tier for tier in (back, front) if isinstance(tier, Describes)), None)
        if describing is not None:
            # Not methods: a store that has these lasts, and two memories do not.
            self.describe = describing.describe
            self.manifest = describing.manifest
            self.manifests = describing.manifests
        self._refused = 0
        self._retired: set[str] = set()
        self._changes = _Changes()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.front, self.back)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.front!r}, {self.back!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, namespace: str, row_keys: Sequence[bytes]) -> tuple[Found, ...]:
        """The rows that a tier has; those of the back are put in front."""
        if namespace in self._retired:
            self._retired.discard(namespace)
            self.back.get(namespace, [])  # the front may answer alone, but the back must know of the use
        quick = self.front.get(namespace, row_keys)
        missing = _missing(quick, len(row_keys))
        if not len(missing):
            return quick
        keys = [row_keys[i] for i in missing.tolist()]
        seen = self._changes.seen()
        slow = self.back.get(namespace, keys)
        if slow:
            with self._changes.unchanged_since(seen) as still_right:
                # Else a row may have been deleted or overwritten meanwhile, and would come back.
                for found in slow if still_right else ():
                    self.front.put(namespace, [keys[i] for i in found.positions.tolist()], found.rows)
        return _merged(quick, [Found(missing[found.positions], found.rows) for found in slow])

    def lend(self, namespace: str, row_keys: Sequence[bytes], use: Callable[[list[Lent]], Used]) -> Used | None:
        """What ``use`` makes of the rows where they lie in the front; None unless it has and lends all of them."""
        lend = getattr(self.front, "lend", None)
        if lend is None or namespace in self._retired:
            return None
        used: Used | None = lend(namespace, row_keys, use)
        return used

    def put(self, namespace: str, row_keys: Sequence[bytes], rows: Rows) -> int:
        """Keeps the rows in both tiers; how many the tier admitted that took more."""
        self._retired.discard(namespace)
        with self._changes.change():
            admitted = max(self.front.put(namespace, row_keys, rows), self.back.put(namespace, row_keys, rows))
        self._refused += len(set(row_keys)) - admitted
        return admitted

    def delete(self, namespace: str, row_keys: Sequence[bytes] | None = None) -> int:
        """Drops these rows from both tiers, or with None the whole namespace; how many the fuller one had."""
        with self._changes.change():
            return max(self.front.delete(namespace, row_keys), self.back.delete(namespace, row_keys))

    def contains(self, namespace: str, row_keys: Sequence[bytes]) -> npt.NDArray[np.bool_]:
        """Which rows a tier has."""
        return _contains(self.front, namespace, row_keys) | _contains(self.back, namespace, row_keys)

    def retire(self, namespace: str) -> None:
        """Lets the rows of a namespace go first when room is needed, until its next get or put."""
        self._retired.add(namespace)
        for tier in (self.front, self.back):
            if isinstance(tier, _Retires):
                tier.retire(namespace)

    def rename(self, old: str, new: str) -> None:
        """Gives the rows of a namespace to another name; a tier that cannot do that forgets them."""
        self._retired -= {old, new}
        with self._changes.change():
            if old != new and new in self.namespaces():
                # Where both have a key, the front could not know which row counts if it lacks one of them.
                self.front.delete(old)
                self.front.delete(new)
            for tier in (self.front, self.back):
                if isinstance(tier, _Renames):
                    tier.rename(old, new)
                elif old != new:
                    tier.delete(old)

    def row_keys(self, namespace: str) -> list[bytes]:
        """The keys of all rows of a namespace, in either tier."""
        return list(dict.fromkeys([*self.back.row_keys(namespace), *self.front.row_keys(namespace)]))

    def namespaces(self) -> list[str]:
        """The namespaces that have at least one row in either tier."""
        return list(dict.fromkeys([*self.back.namespaces(), *self.front.namespaces()]))

    def namespace_bytes(self, namespace: str) -> int:
        """The bytes of the rows of a namespace in the back where it counts them, else in front; 0 if unknown."""
        tier = next((tier for tier in (self.back, self.front) if isinstance(tier, _CountsBytes)), None)
        return 0 if tier is None else tier.namespace_bytes(namespace)

    def stats(self) -> StoreStats:
        """What both tiers hold, without counting a row twice as far as that can be known at once.

        ``rows`` and ``max_bytes`` are those of the tier with more rows (rows that only the other one has are
        not counted), ``bytes`` are those of both, since both really hold them. ``refused`` counts rows that
        neither tier admitted, ``evicted`` what the back dropped: what the front drops is still to be had.
        """
        front, back = self.front.stats(), self.back.stats()
        fuller = front if front.rows > back.rows else back
        return StoreStats(
            rows=fuller.rows,
            bytes=front.bytes + back.bytes,
            max_bytes=fuller.max_bytes,
            namespaces=len(self.namespaces()),
            refused=self._refused,
            evicted=back.evicted,
        )

    def held_bytes(self) -> int:
        """The bytes that both tiers hold, without a count of rows where a tier can tell."""
        return sum(bytes_of(tier) for tier in (self.front, self.back))

    def flush(self) -> None:
        """Waits for both tiers."""
        self.front.flush()
        self.back.flush()

    def close(self) -> None:
        """Closes both tiers."""
        self.front.close()
        self.back.close()


def _missing(found: tuple[Found, ...], count: int) -> Places:
    """The places among so many that nothing was found for."""
    if len(found) == 1 and len(found[0].positions) == count:
        return found[0].positions[:0]
    absent = np.ones(count, np.bool_)
    for part in found:
        absent[part.positions] = False
    return np.flatnonzero(absent)


def _merged(quick: tuple[Found, ...], slow: Sequence[Found]) -> tuple[Found, ...]:
    """All that was found, with the rows of one layout together."""
    merged: dict[Layout, Found] = {found.rows.layout: found for found in quick}
    for found in slow:
        layout = found.rows.layout
        merged[layout] = _joined(merged[layout], found) if layout in merged else found
    return tuple(merged.values())


def _joined(first: Found, second: Found) -> Found:
    """The rows of both in the order of their positions, where the first one's rows are."""
    positions = np.concatenate([first.positions, second.positions])
    order = np.argsort(positions)
    target = torch.from_numpy(np.argsort(order))
    pairs = zip(first.rows.tensors, second.rows.tensors, strict=True)
    tensors = tuple([_interleaved(mine, other, target) for mine, other in pairs])
    return Found(positions[order], Rows(first.rows.layout, tensors))


def _interleaved(mine: torch.Tensor, other: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Rows of two tensors, each at its target, in new memory."""
    joined = torch.empty((len(target), *mine.shape[1:]), dtype=mine.dtype, device=mine.device)
    if joined.numel():
        with torch.no_grad():
            # As bytes, because not every dtype can be indexed.
            rows, target = _as_bytes(joined), target.to(mine.device)
            rows[target[: len(mine)]] = _as_bytes(mine)
            rows[target[len(mine) :]] = _as_bytes(other.to(mine.device))
    return joined


def _as_bytes(rows: torch.Tensor) -> torch.Tensor:
    # By way of one more dimension: the last stride of contiguous rows is any number where its size is 1.
    return rows.contiguous().unsqueeze(-1).view(torch.uint8).view(len(rows), -1)


def _contains(tier: Store, namespace: str, row_keys: Sequence[bytes]) -> npt.NDArray[np.bool_]:
    if isinstance(tier, _Contains):
        return tier.contains(namespace, row_keys)
    there = np.zeros(len(row_keys), np.bool_)
    for found in tier.get(namespace, row_keys):
        there[found.positions] = True
    return there
