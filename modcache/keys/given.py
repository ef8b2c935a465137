"""Keys that the caller gives: one per row, instead of a digest of the row."""

from __future__ import annotations

import functools
import operator
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..batch import Batch, Column
from ..digest import digest, encode
from ..errors import UsageError, UsageTypeError
from ..row_digests import row_digests
from .parts import Meta

__all__ = ["given_digests", "given_keys", "given_metas", "given_rows"]

_ACCEPTED = "one key per row: ints, strings, bytes, tuples of these, a 1-D integer tensor or array, or a tuple of such"


_WHOLE = frozenset(
    {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
)


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Whole numbers of 64 bits, one per row."""

    values: np.ndarray


GivenRows = _Numbers | Sequence[Any]


def given_metas(batch: Batch, number: int) -> tuple[Meta, ...]:
    """What stays in the key beside the given ones: names, dtypes and trailing shapes of the per-row arguments.

    ``number`` is the number of the call of this module within one `keys_for` block.
    """
    metas = tuple(_meta(column) for column in batch.columns)
    return (("given", number), *metas) if number else (("given",), *metas)


def _meta(column: Column) -> Meta:
    value = column.value
    if isinstance(value, torch.Tensor):
        return column.path, "tensor", value.dtype, tuple(value.shape[1:])
    if isinstance(value, np.ndarray):
        return column.path, "array", value.dtype.str, value.shape[1:]
    return column.path, type(value).__name__ if not column.single else "single"


def given_rows(keys: object, count: int, source: str = "cache_keys") -> GivenRows:
    """The given keys, one per row, checked.

    Raises:
        UsageError: their number is not the number of rows.
        UsageTypeError: they are of a type that cannot be keys.
    """
    rows = _collated(keys, count, source) or _rows(keys, source)
    found = len(rows.values) if isinstance(rows, _Numbers) else len(rows)
    if found != count:
        raise UsageError(f"{source} must hold {_ACCEPTED}; the call has {count} rows, found {found} keys")
    return rows


def _collated(keys: object, count: int, source: str) -> list[Any] | None:
    """The rows of keys that are one list or tuple per member, as collating makes of pairs of texts; else ``None``.

    Where there are as many members as rows, nothing tells members from rows, so both are put into each key.
    """
    if not isinstance(keys, list | tuple) or not keys or not all(isinstance(item, list | tuple) for item in keys):
        return None
    if {len(item) for item in keys} != {count} or not all(
        isinstance(text, str | bytes) for item in keys for text in item
    ):
        return None  # members that are numbers arrive as tensors
    columns = _pairs(keys, source)
    rows = _pairs(columns, source)
    return columns if len(keys) != count or rows == columns else list(zip(rows, columns, strict=True))


def _rows(keys: object, source: str) -> GivenRows:
    if isinstance(keys, torch.Tensor | np.ndarray):
        numbers = _numbers(keys, source)
        if numbers.dtype == np.uint64 and len(numbers) and numbers.max() > np.iinfo(np.int64).max:
            return list(map(int, numbers))
        return _Numbers(numbers.astype(np.int64))
    if isinstance(keys, range):
        keys = list(keys)
    if not isinstance(keys, list | tuple):
        raise UsageTypeError(f"{source} must hold {_ACCEPTED}; found a {type(keys).__name__}")
    types = set(map(type, keys))
    if any(issubclass(cls, torch.Tensor | np.ndarray) for cls in types):
        if all(isinstance(item, torch.Tensor | np.generic) and item.ndim == 0 for item in keys):
            return [_plain(item.item(), source) for item in keys]
        return _pairs(keys, source)
    if types == {int}:
        try:
            return _Numbers(np.frombuffer(struct.pack(f"{len(keys)}q", *keys), np.int64))
        except struct.error:  # an int of more than 64 bits
            return list(keys)
    if not types <= {str, bytes}:
        return [_plain(key, source) for key in keys]
    return list(keys)


def _numbers(keys: torch.Tensor | np.ndarray, source: str) -> np.ndarray:
    whole = (keys.dtype in _WHOLE) if isinstance(keys, torch.Tensor) else keys.dtype.kind in "iu"
    if keys.ndim != 1 or not whole:
        raise UsageTypeError(
            f"{source} must hold {_ACCEPTED}; found a {type(keys).__name__} of {keys.dtype}, shape {tuple(keys.shape)}"
        )
    if isinstance(keys, torch.Tensor) and keys.is_meta:
        raise UsageTypeError(f"{source} must hold {_ACCEPTED}; found a tensor without values (on the device 'meta')")
    return keys.detach().cpu().clone().numpy() if isinstance(keys, torch.Tensor) else keys


def _pairs(columns: Sequence[Any], source: str) -> list[Any]:
    """What collating makes of ``(index, view)`` pairs: one tensor or list per member, here turned into tuples."""
    members = []
    for column in columns:
        rows = _rows(column, source)
        members.append(rows.values.tolist() if isinstance(rows, _Numbers) else rows)
    lengths = {len(member) for member in members}
    if len(lengths) > 1:
        raise UsageError(f"{source}: the members of a tuple of keys differ in length: {sorted(lengths)}")
    return list(zip(*members, strict=True))


def _plain(key: object, source: str) -> object:
    if type(key) is tuple:
        return tuple(_plain(item, source) for item in key)
    if isinstance(key, np.integer):
        return int(key)
    if type(key) in (int, str, bytes):
        return key
    raise UsageTypeError(f"{source} must hold {_ACCEPTED}; found a key of type {type(key).__name__}")


def given_digests(rows: GivenRows, seed: int) -> list[bytes]:
    """One digest per given key; an int is the same key whether it came in a list or in a tensor."""
    if isinstance(rows, _Numbers):
        return row_digests(rows.values.data.cast("B"), len(rows.values), 8, seed)
    return [digest(_given_bytes(key), seed) for key in rows]


_KNOWN = 1 << 16


@functools.lru_cache(maxsize=8)
def _known(seed: int) -> dict[int, bytes]:
    """Digests of ints that were given before: to look one up takes a fifth of the time of making it."""
    return {}


def given_keys(keys: object, count: int, seed: int, source: str) -> list[bytes]:
    """One key per row, from what the caller gave.

    Raises:
        UsageError: their number is not the number of rows.
        UsageTypeError: they are of a type that cannot be keys.
    """
    numbers: list[int] | None = None
    if type(keys) is torch.Tensor and keys.dtype is torch.int64 and keys.ndim == 1 and not keys.is_meta:
        numbers = keys.tolist()
    elif type(keys) is list and operator.countOf(map(type, keys), int) == len(keys):
        numbers = keys
    if numbers is None or len(numbers) != count:
        return given_digests(given_rows(keys, count, source), seed)
    known = _known(seed)
    try:
        return list(map(known.__getitem__, numbers))
    except KeyError:
        found = given_digests(given_rows(numbers, count, source), seed)
    if len(known) + count <= _KNOWN:
        known.update(zip(numbers, found, strict=True))
    return found


def _given_bytes(key: object) -> bytes:
    # A framed value is never 8 bytes long, so the short form of an int is no other key's encoding.
    if type(key) is int and -(1 << 63) <= key < 1 << 63:
        return struct.pack("<q", key)
    return encode(key)
