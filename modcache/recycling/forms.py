"""Know a call again by the types and shapes of its arguments: how it is parted, and what its shapes are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .branches import Ways
from .kinds import Asked
from .plan import Plan, Shapes
from .trunk import Parted

__all__ = ["Form", "key_of"]

_FLAGS = frozenset([type(None), bool, int, str])


class Form:
    """What is known of all calls of one form.

    Args:
        asked: one of them.
        plan: how they are parted.
        parted: the trunk.
        inputs: those that feed the cut.
        ways: the ways to the cut that were looked at.
    """

    __slots__ = ("kind", "parted", "places", "plan", "rows", "shapes", "sizes", "ways")

    def __init__(self, asked: Asked, plan: Plan, parted: Parted, inputs: Mapping[str, Any], ways: Ways) -> None:
        self.kind, self.sizes, self.rows = asked.kind, asked.sizes, asked.batch.size
        self.plan, self.parted, self.ways = plan, parted, ways
        places = dict(asked.arguments.names)
        self.places = [(path, places.get(path)) for path in inputs]
        self.shapes: dict[object, Shapes] = {}
        """What the modules before the cut return, by context and state of the trunk."""

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Of a call, those that feed the cut."""
        found = {}
        for path, place in self.places:
            found[path] = args[place] if type(place) is int else kwargs[place]  # type: ignore[index]
        return found


def key_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[object, ...] | None:
    """The form of a call of tensors and flags; ``None`` for one that has other arguments."""
    key: list[object] = [len(args), *kwargs]
    tensors = False
    for value in (*args, *kwargs.values()):
        cls = type(value)
        if cls is torch.Tensor:
            if value.is_nested or value.layout is not torch.strided:
                return None
            key += value.dtype, value.shape
            tensors = True
        elif cls in _FLAGS:
            key += cls, value
        else:
            return None
    return tuple(key) if tensors else None
