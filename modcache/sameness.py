"""In what the rows of a call are all the same: a self-check on such rows says nothing about it.

An argument of which all rows are equal may just as well be one that all rows share, and rows of one length show
nothing of how they are padded. Each such thing has a name: the path of the argument, or ``len(path)``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch

from .batch import Batch, Column, length_of
from .digest import encode
from .row_digests import tensor_row_digests
from .tensors import NoContentError, is_plain, plain_memory

__all__ = ["differ", "lengths_differ", "sameness", "values_differ"]


def sameness(batch: Batch, places: Sequence[int], but: Collection[str] = ()) -> frozenset[str]:
    """The names of everything in which the rows at these places are the same.

    Args:
        batch: the call.
        places: rows of it, in ascending order.
        but: paths of columns that are known to be per row.
    """
    found: list[str] = []
    for column in batch.columns:
        if column.path in but:
            continue
        if not _values_differ(column, places):
            found.append(column.path)
        if isinstance(column.value, list | tuple) and not lengths_differ(_rows_at(column.value, places)):
            found.append(f"len({column.path})")
    return frozenset(found)


def differ(batch: Batch, names: frozenset[str]) -> bool:
    """Whether the rows of a call differ in anything that is named."""
    for column in batch.columns:
        value = column.value
        if column.path in names and _values_differ(column, range(batch.size)):
            return True
        if f"len({column.path})" in names and isinstance(value, list | tuple) and lengths_differ(value):
            return True
    return False


def lengths_differ(rows: Sequence[object]) -> bool:
    """Whether a list holds rows of different lengths."""
    return len(set(map(length_of, rows))) > 1


def values_differ(value: torch.Tensor | Sequence[str]) -> bool:
    """Whether the rows of a tensor, or texts, are not all the same."""
    if not isinstance(value, torch.Tensor):
        return value.count(value[0]) != len(value)
    memory = plain_memory(value) if is_plain(value) else None
    if memory is not None:
        return _memory_differs(memory, len(value))
    return len(set(tensor_row_digests(value, 0))) > 1


def _values_differ(column: Column, places: Sequence[int]) -> bool:
    value: Any = column.value
    if column.single or len(places) < 2:
        return False
    try:
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            value = torch.from_numpy(np.ascontiguousarray(value).reshape(len(value), -1).view(np.uint8).copy())
        if isinstance(value, torch.Tensor):
            first, last = places[0], places[-1]
            if values_differ(value[first : last + 1 : last - first]):
                return True
            return values_differ(value) if len(places) == len(value) else _some_differ(value, places)
        return _items_differ(_rows_at(value, places))
    except NoContentError:  # only the caller, who gave the keys of the rows, knows in what they differ
        return True


def _some_differ(value: torch.Tensor, places: Sequence[int]) -> bool:
    digests = tensor_row_digests(value, 0)
    return len({digests[place] for place in places}) > 1


def _items_differ(rows: list[Any]) -> bool:
    if set(map(type, rows)) == {str}:
        return rows.count(rows[0]) != len(rows)
    first = encode(rows[0])
    return any(encode(row) != first for row in rows if row is not rows[0])


def _rows_at(rows: Sequence[Any], places: Sequence[int]) -> list[Any]:
    return [rows[place] for place in places]


def _memory_differs(memory: memoryview, count: int) -> bool:
    """Whether one of so many pieces of a memory is not like the one before it."""
    width = len(memory) // count
    word = next(size for size in (8, 4, 2, 1) if width % size == 0)
    words = np.frombuffer(memory, f"u{word}")
    step = width // word
    return not bool((words[step:] == words[:-step]).all())
