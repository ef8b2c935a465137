"""Let a model run and train, and leave it as it was: its modules' attributes, buffers, modes, hooks, and randomness."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..selfcheck import preserved_randomness

__all__ = ["as_it_was"]


@contextlib.contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """While it is open the model runs on copies of its buffers; afterwards everything is what it was before.

    The buffers themselves are never written, so not even their version counters move, and a graph that was built
    before can still be run backwards. Not undone is what a forward does to its parameters, or deep inside of objects
    that it holds.
    """
    kept = [(module, dict(vars(module)), _contents(module)) for module in model.modules()]
    with preserved_randomness():
        try:
            copies: dict[int, torch.Tensor] = {}
            for module, attributes, _ in kept:
                _lend(vars(module), attributes, copies)
                buffers = attributes["_buffers"]
                _lend(buffers, dict(buffers), copies)
            yield
        finally:
            for module, attributes, contents in kept:
                for container, items in contents:
                    _refill(container, items)
                if _differs(list(vars(module).items()), list(attributes.items())):
                    vars(module).clear()
                    vars(module).update(attributes)


def _lend(place: dict[str, Any], before: dict[str, Any], copies: dict[int, torch.Tensor]) -> None:
    """Put copies of tensors in their place; one that is known by two names stays one."""
    for name, value in before.items():
        if isinstance(value, torch.Tensor) and not value.requires_grad and not isinstance(value, nn.Parameter):
            if id(value) not in copies:
                copies[id(value)] = value.clone()
            place[name] = copies[id(value)]


_Contents = list[tuple[Any, list[Any]]]


def _contents(module: nn.Module) -> _Contents:
    """The dicts, lists and sets that a module holds, its hooks and buffers among them, and what is in each."""
    found: _Contents = []
    for value in vars(module).values():
        if isinstance(value, dict):
            found.append((value, list(value.items())))
        elif isinstance(value, list | set | deque):
            found.append((value, list(value)))
    return found


def _refill(container: Any, items: list[Any]) -> None:
    now = list(container.items()) if isinstance(container, dict) else list(container)
    if not _differs(now, items):
        return
    container.clear()
    if isinstance(container, dict | set):
        container.update(items)
    else:
        container.extend(items)


def _differs(now: list[Any], before: list[Any]) -> bool:
    return len(now) != len(before) or any(not _same(one, other) for one, other in zip(now, before, strict=True))


def _same(one: Any, other: Any) -> bool:
    if type(one) is tuple and type(other) is tuple and len(one) == len(other) == 2:  # an item of a dict
        return one[0] is other[0] and one[1] is other[1]
    return one is other
