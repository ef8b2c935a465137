"""See what a run of a module changes: put back what it notes on itself, and tell whether it writes into its inputs."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["contents_of", "is_changed", "undisturbed"]

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
    contents = [(held, _items(held)) for _, own in attributes for held in own.values() if _is_container(held)]
    counters = [(buffer, buffer.clone()) for part in parts for buffer in part.buffers(recurse=False) if _counts(buffer)]
    try:
        yield
    finally:
        for live, own in attributes:
            _put_back(live, own)
        for container, items in contents:
            _refill(container, items)
        for buffer, value in counters:
            if not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)


Contents = list[tuple[Any, Any]]
"""Lists, dicts, sets and arrays, each with what it held."""


def contents_of(value: object) -> Contents:
    """What the lists, dicts, sets and arrays of an argument hold now, however deep; tensors count their writes."""
    found: Contents = []
    waiting, seen = [value], {id(value)}
    while waiting:
        item = waiting.pop()
        inside: list[Any] = []
        if type(item) in (np.ndarray, np.memmap) and not item.dtype.hasobject:  # type: ignore[attr-defined]
            found.append((item, item.copy()))  # type: ignore[attr-defined]
        elif _is_container(item):
            found.append((item, _items(item)))
            inside = list(item.values()) if isinstance(item, dict) else list(item)  # type: ignore[call-overload]
        elif isinstance(item, tuple):
            inside = list(item)
        if inside and set(map(type, inside)) != {str}:
            new = [one for one in inside if id(one) not in seen]
            seen.update(map(id, new))
            waiting += new
    return found


def is_changed(contents: Contents) -> bool:
    """Whether any of these holds something else now."""
    return any(
        item.tobytes() != held.tobytes() if isinstance(item, np.ndarray) else not _holds(item, held)
        for item, held in contents
    )


def _holds(container: Any, items: list[Any]) -> bool:
    now = _items(container)
    return len(now) == len(items) and all(map(_same, now, items))


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


def _is_container(value: object) -> bool:
    return isinstance(value, dict | list | set | deque)


def _items(container: Any) -> list[Any]:
    return list(container.items()) if isinstance(container, dict) else list(container)


def _refill(container: Any, items: list[Any]) -> None:
    if _holds(container, items):
        return
    container.clear()
    if isinstance(container, dict | set):
        container.update(items)
    else:
        container.extend(items)


def _same(one: Any, other: Any) -> bool:
    if type(one) is tuple and type(other) is tuple and len(one) == len(other) == 2:  # an item of a dict
        return one[0] is other[0] and one[1] is other[1]
    return one is other
