"""What lists, dicts, sets and arrays hold: tell whether that has changed, and put it back."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

__all__ = ["Contents", "contents_of", "holds", "is_changed", "is_container", "items_of", "refill"]

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
        elif is_container(item):
            found.append((item, items_of(item)))
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
        item.tobytes() != held.tobytes() if isinstance(item, np.ndarray) else not holds(item, held)
        for item, held in contents
    )


def holds(container: Any, items: list[Any]) -> bool:
    """Whether these very items are in it, in this order."""
    now = items_of(container)
    return len(now) == len(items) and all(map(_same, now, items))


def is_container(value: object) -> bool:
    """Whether it can be emptied and filled again."""
    return isinstance(value, dict | list | set | deque)


def items_of(container: Any) -> list[Any]:
    """Its items; of a dict, pairs."""
    return list(container.items()) if isinstance(container, dict) else list(container)


def refill(container: Any, items: list[Any]) -> None:
    """Make it hold these items again; one that does is not written."""
    if holds(container, items):
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
