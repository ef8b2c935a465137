"""Let a model run and train, and leave it as it was: its modules' attributes, buffers, modes, hooks, and randomness."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..chance import preserved_randomness
from ..contents import Contents, is_container, items_of, refill

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
                    refill(container, items)
                refill(vars(module), list(attributes.items()))


def _lend(place: dict[str, Any], before: dict[str, Any], copies: dict[int, torch.Tensor]) -> None:
    """Put copies of tensors in their place; one that is known by two names stays one."""
    for name, value in before.items():
        if isinstance(value, torch.Tensor) and not value.requires_grad and not isinstance(value, nn.Parameter):
            if id(value) not in copies:
                copies[id(value)] = value.clone()
            place[name] = copies[id(value)]


def _contents(module: nn.Module) -> Contents:
    """The dicts, lists and sets that a module holds, its hooks and buffers among them, and what is in each."""
    return [(value, items_of(value)) for value in vars(module).values() if is_container(value)]
