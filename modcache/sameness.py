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

__all__ = ["differences", "lengths_differ", "sameness", "telling_rows", "values_differ"]


def sameness(batch: Batch, places: Sequence[int], but: Collection[str] = ()) -> frozenset[str]:
    """The names of everything in which the rows at these places are the same.

    Args:
        batch: the call.
        places: rows of it, in ascending order.
        but: paths of columns that are known to be per row.
    """
    columns = [column for column in batch.columns if column.path not in but]
    names = [column.path for column in columns if not _values_differ(column, places)]
    lists = [column for column in columns if isinstance(column.value, list | tuple)]
    names += [f"len({column.path})" for column in lists if not lengths_differ(_rows_at(column.value, places))]
    return frozenset(names)


def differences(batch: Batch, names: Collection[str]) -> tuple[str, ...]:
    """Those of the names in which the rows of a call are not all the same."""
    return tuple(name for column, name in _named(batch, names) if _differ(column, name, range(batch.size)))


def telling_rows(batch: Batch, names: Collection[str], place: int) -> list[int]:
    """For each name a row that differs in it from the row at ``place``, as far as there is one."""
    found: dict[int, None] = {}
    for column, name in _named(batch, names):
        other = next(
            (at for at in range(batch.size) if at != place and _differ(column, name, sorted((at, place)))), None
        )
        if other is not None:
            found[other] = None
    return list(found)


def _named(batch: Batch, names: Collection[str]) -> list[tuple[Column, str]]:
    return [
        (column, name) for column in batch.columns for name in (column.path, f"len({column.path})") if name in names
    ]


def _differ(column: Column, name: str, places: Sequence[int]) -> bool:
    if name == column.path:
        return _values_differ(column, places)
    return isinstance(column.value, list | tuple) and lengths_differ(_rows_at(column.value, places))


def lengths_differ(rows: Sequence[object]) -> bool:
    """Whether a list holds rows of different lengths."""
    of_texts = set(map(type, rows)) == _TEXT  # a tenth of the time: this is asked at hits
    return len(set(map(len if of_texts else length_of, rows))) > 1  # type: ignore[arg-type]


_TEXT = frozenset({str})


def values_differ(value: torch.Tensor | Sequence[str]) -> bool:
    """Whether the rows of a tensor, or texts, are not all the same."""
    if not isinstance(value, torch.Tensor):
        return value.count(value[0]) != len(value)
    memory = plain_memory(value) if is_plain(value) else None
    if memory is not None:
        return _memory_differs(memory, len(value))
    return len(set(tensor_row_digests(value, 0))) > 1


def _values_differ(column: Column, places: Sequence[int]) -> bool:
    """Of rows without content, only the caller, who gave their keys, knows in what they differ."""
    value: Any = column.value
    if column.single or len(places) < 2:
        return False
    try:
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            value = torch.from_numpy(np.ascontiguousarray(value).reshape(len(value), -1).view(np.uint8).copy())
        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided:
                return True
            first, last = places[0], places[-1]
            if values_differ(value[first : last + 1 : last - first]):
                return True
            return values_differ(value) if len(places) == len(value) else _some_differ(value, places)
        return _items_differ(_rows_at(value, places))
    except NoContentError:
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
