"""Walk through the arguments and outputs of modules: find their tensors, and put others in their places."""

from __future__ import annotations

import copy
import dataclasses
import math
import types
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch

__all__ = [
    "ATOMS",
    "Step",
    "fill_inside",
    "fresh",
    "hidden_tensors",
    "located",
    "mapped",
    "opened",
    "same_but_tensors",
]

Step = tuple[int | str, ...]
"""Where a tensor lies in a structure: indexes, keys and names of fields."""

ATOMS = frozenset({torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str, torch.dtype, torch.device})
"""Classes of which an object has no parts: what most arguments are."""


def _parts(value: Any) -> list[tuple[int | str, Any]] | None:
    """Steps and parts of a structure, or ``None`` for anything else."""
    cls = type(value)
    if cls in ATOMS:
        return None
    if cls is tuple or cls is list:
        return list(enumerate(value))
    if cls is dict:
        return list(value.items())
    if isinstance(value, tuple | list):
        return list(enumerate(value))
    if isinstance(value, Mapping):
        return list(value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        try:
            return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
        except Exception:  # a configuration of which some fields are not there to be asked for
            return None
    return None


def located(value: Any, leaf: type = torch.Tensor, at: Step = ()) -> Iterator[tuple[Step, Any]]:
    """All tensors (or other leaves) of a structure, each with its place."""
    if isinstance(value, leaf):
        yield at, value
    elif (parts := _parts(value)) is not None:
        for step, part in parts:
            yield from located(part, leaf, (*at, step))


def mapped(value: Any, change: Callable[[Any], Any], leaf: type = torch.Tensor) -> Any:
    """The structure with each tensor (or other leaf) changed; the very same object if none changes."""
    if isinstance(value, leaf):
        return change(value)
    cls = type(value)
    if cls in ATOMS:
        return value
    if cls is tuple or cls is list:
        items = [mapped(item, change, leaf) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return items if cls is list else tuple(items)
    if cls is dict:
        changed = {key: mapped(item, change, leaf) for key, item in value.items()}
        return value if all(changed[key] is item for key, item in value.items()) else changed
    parts = _parts(value)
    if parts is None:
        return value
    new = [(step, mapped(part, change, leaf)) for step, part in parts]
    if all(part is old for (_, part), (_, old) in zip(new, parts, strict=True)):
        return value
    return _rebuilt(value, new)


def _rebuilt(value: Any, parts: list[tuple[int | str, Any]]) -> Any:
    if isinstance(value, tuple):
        items = [part for _, part in parts]
        made_in_c = type(value).__module__ == "torch.return_types"
        return type(value)(items) if made_in_c else tuple.__new__(type(value), items)
    other = copy.copy(value)
    if isinstance(value, list):
        other[:] = [part for _, part in parts]
        return other
    if isinstance(value, UserDict):
        other.data = dict(parts)
        return other
    if isinstance(value, Mapping):
        if dataclasses.is_dataclass(value):  # transformers' ModelOutput: a mapping whose fields are attributes too
            made = type(value)(**{str(step): part for step, part in parts})
            if isinstance(made, OrderedDict):
                for step, _ in parts:  # a forward may have set them in another order than they are declared in
                    made.move_to_end(step)
            return made
        for step, part in parts:
            other[step] = part
        return other
    for step, part in parts:
        object.__setattr__(other, str(step), part)
    return other


def same_but_tensors(one: Any, other: Any) -> bool:
    """Whether two structures agree in everything but the values and shapes of their tensors."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    if type(one) is not type(other):
        return False
    left, right = _parts(one), _parts(other)
    if left is None or right is None:
        return one is other or _equal(one, other)
    return [step for step, _ in left] == [step for step, _ in right] and all(
        same_but_tensors(mine, yours) for (_, mine), (_, yours) in zip(left, right, strict=True)
    )


def _equal(one: Any, other: Any) -> bool:
    if not isinstance(one, bool | int | float | str | bytes | torch.dtype | torch.device):
        return False  # an object whose inside nobody can compare
    return one == other or (isinstance(one, float) and math.isnan(one) and math.isnan(other))


def fresh(value: Any) -> Any:
    """The structure with lists and mappings of its own, of which a forward may take things out."""
    if type(value) in ATOMS:
        return value
    if isinstance(value, list | MutableMapping):
        return _rebuilt(value, [(step, fresh(part)) for step, part in _parts(value) or ()])
    if isinstance(value, tuple):
        items = [fresh(part) for part in value]
        same = all(new is old for new, old in zip(items, value, strict=True))
        return value if same else _rebuilt(value, list(enumerate(items)))
    return value


def fill_inside(value: Any, change: Callable[[Any], Any], leaf: type, depth: int = 4) -> None:
    """Change leaves inside of objects that are no structures, where they lie."""
    if value is None or isinstance(
        value, torch.Tensor | torch.nn.Module | type | str | int | float | types.FunctionType
    ):
        return
    parts = _parts(value)
    inner = getattr(value, "__dict__", None)
    if parts is not None:
        for _, part in parts:
            fill_inside(part, change, leaf, depth)
    elif isinstance(inner, dict) and depth:
        for name, part in list(inner.items()):
            changed = mapped(part, change, leaf)
            if changed is not part:
                inner[name] = changed
            fill_inside(changed, change, leaf, depth - 1)


def opened(value: Any, depth: int = 4) -> Any:
    """The structure with objects that are no structures (a key-value cache) as mappings of their attributes."""
    if isinstance(value, torch.Tensor | torch.nn.Module | type | str | types.FunctionType) or type(value) in ATOMS:
        return value
    parts = _parts(value)
    if parts is not None:
        new = [(step, opened(part, depth)) for step, part in parts]
        same = all(part is old for (_, part), (_, old) in zip(new, parts, strict=True))
        return value if same else {"": type(value), **dict(new)}
    inner = getattr(value, "__dict__", None)
    if not isinstance(inner, dict) or not inner or depth == 0:
        return value
    return {"": type(value), **{name: opened(part, depth - 1) for name, part in inner.items()}}


def hidden_tensors(value: Any, depth: int = 4) -> Iterator[torch.Tensor]:
    """Tensors inside of objects that are no structures (a key-value cache): nothing can be put in their places."""
    if isinstance(value, torch.Tensor | torch.nn.Module | type | str | bytes | int | float) or value is None:
        return
    parts = _parts(value)
    if parts is not None:
        for _, part in parts:
            yield from hidden_tensors(part, depth)
        return
    inner = getattr(value, "__dict__", None)
    if not isinstance(inner, dict) or depth == 0:
        return
    for part in inner.values():
        yield from (tensor for _, tensor in located(part))
        yield from hidden_tensors(part, depth - 1)
