"""What every store keeps to, and the frozen values that it answers with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from ..rows import Rows

__all__ = ["Describes", "Found", "Store", "StoreStats", "bytes_of"]


@dataclass(frozen=True, slots=True)
class Found:
    """The rows of one layout that a store had, and which of the wanted keys they answer.

    Args:
        positions: places in the ``row_keys`` that were asked for, ascending, as int64.
        rows: one row per position, in fresh, contiguous, writable memory that nobody else holds. A key
            that was asked for twice is answered twice.
    """

    positions: npt.NDArray[np.int64]
    rows: Rows


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What a store holds and what it turned away, at the moment of asking.

    Args:
        rows: rows that can be got.
        bytes: bytes that count against the bound: the rows and the cost of finding them.
        max_bytes: the bound, or None where there is none.
        namespaces: namespaces with at least one row.
        refused: rows that were put but not admitted, since the store was made.
        evicted: rows that were dropped to make room, since the store was made.
    """

    rows: int
    bytes: int
    max_bytes: int | None
    namespaces: int
    refused: int = 0
    evicted: int = 0


@runtime_checkable
class Store(Protocol):
    """Keeps records under a namespace and 16-byte keys; many rows at a time, as stacked tensors.

    All methods may be called from several threads. A store may also have any of these abilities, which
    callers use where they find them:

    - ``contains(namespace, row_keys)``: a boolean array, without gathering a row and without counting as use;
    - ``retire(namespace)``: its rows are the first to go when room is needed, until the next get or put;
    - ``lend(namespace, row_keys, use)``: what ``use`` makes of a list of `modcache.rows.Lent`, the rows where they
      lie, which nobody changes or moves meanwhile; None if not all of them are there in memory of the host;
    - ``rename(old, new)``: all rows of one namespace belong to another name from now on;
    - ``held_bytes()``: the bytes that `stats` tells, or told a moment ago, for those who look after each batch;
    - those of `Describes`, by which the rows of earlier processes explain themselves.
    """

    def get(self, namespace: str, row_keys: Sequence[bytes]) -> tuple[Found, ...]:
        """The rows that are there: one `Found` per layout, ``()`` when nothing is; without absent keys."""

    def put(self, namespace: str, row_keys: Sequence[bytes], rows: Rows) -> int:
        """Keeps the rows under their keys; the number of rows admitted.

        The rows are copied before this returns: the caller hands the very tensors to its user, who may write
        into them at once.

        A row that is already there is overwritten, also by one of another layout. When a key occurs twice,
        the last of its rows counts.
        """

    def delete(self, namespace: str, row_keys: Sequence[bytes] | None = None) -> int:
        """Drops these rows, or with None the whole namespace; the number of rows dropped."""

    def row_keys(self, namespace: str) -> list[bytes]:
        """The keys of all rows of a namespace, in no particular order."""

    def namespaces(self) -> list[str]:
        """The namespaces that have at least one row."""

    def stats(self) -> StoreStats:
        """What is held, and what was turned away."""

    def flush(self) -> None:
        """Waits until everything that was put would survive the process, where a store can do that at all."""

    def close(self) -> None:
        """Gives back what the store holds; afterwards it finds nothing and admits nothing."""


@runtime_checkable
class Describes(Protocol):
    """The ability to keep a readable manifest beside the rows of a namespace."""

    def describe(self, namespace: str, facts: Mapping[str, Any]) -> None:
        """Keeps the facts, JSON values all; those of an earlier call stay unless they are named again.

        The mapping under ``"checked"`` is merged in the same way, entry by entry.
        """

    def manifest(self, namespace: str) -> dict[str, Any] | None:
        """What was described of a namespace, by any process."""

    def manifests(self) -> dict[str, dict[str, Any]]:
        """All manifests, by namespace."""


def bytes_of(store: Store) -> int:
    """The bytes that a store holds, without a count of its rows where it can tell."""
    ask: Callable[[], int] | None = getattr(store, "held_bytes", None)
    return store.stats().bytes if ask is None else ask()
