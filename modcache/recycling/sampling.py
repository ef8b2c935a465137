"""Choose the rows of a first batch that a probe runs on, and find the values of its inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..arguments import Arguments
from ..batch import items_of
from .kinds import Asked

__all__ = ["distinct_rows", "value_at"]

_ROWS = 4
"""Rows of the first batch that the probe runs on."""

_LOOKED_AT = 64
"""Rows among which these are looked for."""


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
        one, two = column.value[place], column.value[other]
        if isinstance(one, torch.Tensor | np.ndarray):
            one, two = torch.as_tensor(one), torch.as_tensor(two)
            if one.shape != two.shape or not torch.equal(one, two):
                return False
        elif one is not two and one != two:
            return False
    return True


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
