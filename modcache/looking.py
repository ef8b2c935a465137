"""Look rows up in a store: one of this package is taken at its word, what another one gives is checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from .rows import Rows
from .stores import Found, MemoryStore, Store, TieredStore

__all__ = ["LookUp", "look_up_in"]

LookUp = Callable[[str, Sequence[bytes]], tuple[Found, ...]]


def look_up_in(store: Store) -> LookUp:
    """The function that asks a store for rows.

    What it gives keeps to the protocol, or it raises: rows of another call, or in another order, would be served
    without a word.
    """
    if _is_own(store):
        return store.get

    def look_up(namespace: str, row_keys: Sequence[bytes]) -> tuple[Found, ...]:
        return _checked(store.get(namespace, row_keys), len(row_keys))

    return look_up


def _is_own(store: Store) -> bool:
    if type(store) is TieredStore:
        return _is_own(store.front) and _is_own(store.back)
    return type(store) is MemoryStore or type(store).__module__.startswith("modcache.stores.disk")


def _checked(found: object, count: int) -> tuple[Found, ...]:
    """What a store gave, if it keeps to the protocol.

    Raises:
        TypeError, ValueError: saying what it gave instead.
    """
    if not isinstance(found, tuple) or not all(isinstance(part, Found) for part in found):
        raise TypeError(f"its get must return a tuple of Found; found {_told(found)}")
    answered = np.zeros(count, bool)
    for part in found:
        positions = part.positions
        if not isinstance(positions, np.ndarray) or positions.dtype != np.int64 or positions.ndim != 1:
            raise TypeError(f"Found.positions must be an array of int64; found {_told(positions)}")
        if not len(positions):
            raise ValueError("Found.positions must name at least one place")
        if positions[0] < 0 or positions[-1] >= count or not (positions[1:] > positions[:-1]).all():
            raise ValueError(f"Found.positions must be places among the {count} keys, ascending")
        if answered[positions].any():
            raise ValueError("two Found answer the same key")
        answered[positions] = True
        _check_rows(part.rows, len(positions))
    return found


def _check_rows(rows: object, count: int) -> None:
    if not isinstance(rows, Rows):
        raise TypeError(f"Found.rows must be Rows; found {_told(rows)}")
    expected = [(dtype, (count, *shape)) for dtype, shape in rows.layout.leaves]
    if not all(isinstance(tensor, torch.Tensor) for tensor in rows.tensors):
        raise TypeError("Found.rows must hold tensors")
    given = [(tensor.dtype, tuple(tensor.shape)) for tensor in rows.tensors]
    if given != expected:
        raise ValueError(f"Found.rows must hold one row per position in the layout {expected}; found {given}")


def _told(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
