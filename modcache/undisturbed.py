"""Run a module once more than its user asked for, and put back what it notes on itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .contents import is_container, items_of, refill

__all__ = ["undisturbed"]

_OF_TORCH = frozenset(vars(nn.Module())) | {"_modcache"}
_MISSING = object()


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Put back the plain attributes of a module and its parts, what lies in their lists, dicts and sets, and counters.

    Only what was changed is written, name by name: other threads may be running the module. A module that writes
    its weights or running statistics is not checked at all, so nothing is copied here but buffers of one whole number.
    """
    parts = list(module.modules())
    attributes = [(vars(part), _own(vars(part))) for part in parts]
    contents = [(held, items_of(held)) for _, own in attributes for held in own.values() if is_container(held)]
    counters = [(buffer, buffer.clone()) for part in parts for buffer in part.buffers(recurse=False) if _counts(buffer)]
    try:
        yield
    finally:
        for live, own in attributes:
            _put_back(live, own)
        for container, items in contents:
            refill(container, items)
        for buffer, value in counters:
            if not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)


def _own(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in _OF_TORCH}


def _counts(buffer: torch.Tensor) -> bool:
    return buffer.numel() == 1 and not (buffer.is_floating_point() or buffer.is_complex() or buffer.is_inference())


def _put_back(live: dict[str, Any], own: dict[str, Any]) -> None:
    for name in {*_own(live), *own}:
        before = own.get(name, _MISSING)
        if before is _MISSING:
            del live[name]
        elif live.get(name, _MISSING) is not before:
            live[name] = before
