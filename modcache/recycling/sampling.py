"""Choose the rows of a first batch that a probe runs on, and find the values of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..arguments import Arguments
from ..batch import items_of
from .kinds import Asked, rows_in

__all__ = ["distinct_rows", "places_of", "value_at"]

_ROWS = 4
"""Rows of the first batch that the probe runs on."""

_LOOKED_AT = 64
"""Rows among which these are looked for."""

_ARRAYS = (torch.Tensor, np.ndarray)
_COMPARED = (*_ARRAYS, int, float, complex)
"""What an array of values can be compared with."""


def distinct_rows(asked: Asked) -> list[int]:
    """The first few rows that all differ."""
    found: list[int] = []
    for place in range(min(asked.batch.size, _LOOKED_AT)):
        if not any(_same_row(asked, place, other) for other in found):
            found.append(place)
        if len(found) == _ROWS:
            break
    return found


def _same_row(asked: Asked, place: int, other: int) -> bool:
    for column in asked.batch.columns:
        if column.single:
            continue
        if not _same(column.value[place], column.value[other]):
            return False
    return True


def places_of(asked: Asked, given: Mapping[str, Any]) -> list[int]:
    """Where in a batch the rows of some inputs of its trunk are, as their values tell; -1 for one that is not there."""
    count, size = rows_in(asked, given), asked.batch.size
    possible = np.ones((count, size), bool)
    for column in asked.batch.columns:
        if column.path in given and not column.single:
            for number, row in enumerate(given[column.path]):
                possible[number] &= _holding(column.value, row)
    return [int(row.argmax()) if row.any() else -1 for row in possible]


def _holding(rows: Any, row: Any) -> np.ndarray:
    """Which rows are this one; of token rows it may have been trimmed."""
    if not isinstance(rows, torch.Tensor | np.ndarray):
        return np.array([_same(one, row) for one in rows])
    every, one = torch.as_tensor(rows), torch.as_tensor(row)
    if one.dim() and every.shape[2:] == one.shape[1:]:
        every = every[:, : len(one)]
    if every.shape[1:] != one.shape:
        return np.zeros(len(every), bool)
    if every.dtype.is_floating_point and every.dtype.itemsize == 1:
        every, one = every.view(torch.uint8), one.view(torch.uint8)
    same = every == one
    if every.dtype.is_floating_point or every.dtype.is_complex:
        same |= torch.isnan(every) & torch.isnan(one)
    return same.reshape(len(every), -1 if every.numel() else 0).all(1).cpu().numpy()


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, _ARRAYS) or isinstance(two, _ARRAYS):
        if not (isinstance(one, _COMPARED) and isinstance(two, _COMPARED)):
            return False
        one, two = torch.as_tensor(one), torch.as_tensor(two)
        return one.shape == two.shape and torch.equal(one, two)
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return one.keys() == two.keys() and all(_same(one[name], two[name]) for name in one)
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):  # of tensors it cannot be compared by ==
        return len(one) == len(two) and all(map(_same, one, two))
    return bool(one is two or one == two)


def value_at(arguments: Arguments, path: str) -> Any:
    """The value at a path of the arguments."""
    for name, value in arguments.bound():
        if path == name:
            return value
        if path.startswith((f"{name}.", f"{name}[")):
            return _inside(value, path[len(name) :])
    raise AssertionError(f"{path} is no argument")


def _inside(value: Any, path: str) -> Any:
    for step, item in items_of(value):
        if path == step:
            return item
        if path.startswith((f"{step}.", f"{step}[")):
            return _inside(item, path[len(step) :])
    return value
