"""Readable names for the tensors of a row, by where they are in the output of the module."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from ....rows import Layout

__all__ = ["leaf_names"]

_NAMED: Final = {"dict", "output", "named", "data"}  # kinds whose items have names


def leaf_names(layout: Layout) -> tuple[str, ...]:
    """One name for each tensor: ``""`` if there is one only, else its path in the output, or its number.

    >>> import torch
    >>> leaf = (torch.float32, ())
    >>> leaf_names(Layout('["tuple",[{},["dict","builtins","dict",[[["str","x"],{}]]]]]', (leaf, leaf)))
    ('0', '1.x')
    >>> leaf_names(Layout("what another store wrote", (leaf, leaf)))
    ('0', '1')
    """
    count = len(layout.leaves)
    try:
        names = tuple(".".join(path) for path in _paths(json.loads(layout.tree), ()))
    except (ValueError, TypeError, IndexError, RecursionError):
        names = ()
    return names if len(set(names)) == count else tuple(map(str, range(count)))


def _paths(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if isinstance(node, dict):
        yield path
    elif node[0] in ("tuple", "list"):
        for place, item in enumerate(node[1]):
            yield from _paths(item, (*path, str(place)))
    elif node[0] in _NAMED:
        for key, item in node[3]:
            yield from _paths(item, (*path, key if isinstance(key, str) else str(key[-1])))
