"""Take the output of a call apart into rows, and build it again from rows."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .rows import SINGLE, Layout, Rows
from .tensors import is_ordinary

__all__ = ["NotRowsError", "UnknownClassError", "rows_of", "token_dims_of", "tree_of", "with_token_dims"]


class NotRowsError(Exception):
    """An output cannot be parted into rows; the message names the leaf and what it is."""


class UnknownClassError(Exception):
    """A stored output is of a class that this process has not seen; the record counts as missing."""


# Nodes are JSON. An object is a tensor: {} on the call's device, {"on": "cpu"} where the module leaves it on the CPU
# whatever the device, {"tokens": dims} where row dimensions are tokens. A list is ["kind", ...]. A class is named,
# never executed: it must already be known to the process.

Node = Any  # what json.loads gives

_classes: dict[tuple[str, str], type] = {}


def rows_of(output: object, count: int | None, home: torch.device) -> Rows:
    """The output of a call on ``count`` rows as stacked rows in private memory.

    Args:
        output: a tensor or a tree of them (tuple, list, dict, namedtuple, dataclass, ``ModelOutput``).
        count: the number of rows, which the first size of every tensor must be; ``None`` takes the whole output
            as one row.
        home: the device on which the call's outputs are expected; a tensor elsewhere must be on the CPU.

    Raises:
        NotRowsError: naming the leaf that is not one row per input.
    """
    found: list[torch.Tensor] = []
    try:
        node = _part(output, "output", count, home, found)
    except RecursionError:
        raise NotRowsError("output is nested too deep, or contains itself") from None
    tensors = tuple(_private(tensor if count is not None else tensor[None]) for tensor in found)
    leaves = tuple((tensor.dtype, tuple(tensor.shape[1:])) for tensor in tensors)
    rows = Rows(Layout(_dump(node), leaves), tensors)
    try:
        tree_of(rows, home, whole=count is None)
    except UnknownClassError as error:  # such a class refuses now what a hit would ask of it
        raise NotRowsError(f"output cannot be put together again: {error}") from None
    return rows


def _dump(node: Node) -> str:
    return json.dumps(node, separators=(",", ":"))


def _private(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy: what a module returns may alias its input, a buffer, or a stash of its own."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _part(value: object, path: str, count: int | None, home: torch.device, found: list[torch.Tensor]) -> Node:
    if isinstance(value, torch.Tensor):
        found.append(_checked_leaf(value, path, count, home))
        return {} if value.device == home else {"on": "cpu"}
    constant = _constant(value)
    if constant is not None:
        return constant
    cls = type(value)
    if cls is tuple or cls is list:
        items = [_part(item, f"{path}[{place}]", count, home, found) for place, item in enumerate(value)]  # type: ignore[arg-type, var-annotated]
        return [cls.__name__, items]
    if (kind := _mapping_kind(cls)) is not None:
        if kind == "output":
            _nothing_beside(value, [field.name for field in dataclasses.fields(cls)], path)  # type: ignore[arg-type]
        pairs = [
            [_key(key, path), _part(item, f"{path}[{key!r}]", count, home, found)]
            for key, item in value.items()  # type: ignore[attr-defined]
        ]
        return [kind, *_named(cls), pairs]
    if (names := _field_names(cls)) is not None:
        _nothing_beside(value, names, path)
        pairs = [[name, _part(getattr(value, name), f"{path}.{name}", count, home, found)] for name in names]
        return ["named" if isinstance(value, tuple) else "data", *_named(cls), pairs]
    raise NotRowsError(f"{path} is a {cls.__module__}.{cls.__qualname__}, which cannot be stored")


def _is_of_torch(cls: type) -> bool:
    return issubclass(cls, tuple) and cls.__module__ == "torch.return_types"


def _nothing_beside(value: object, names: Sequence[str], path: str) -> None:
    """Refuse an object on which more was set than its fields: a hit would come back without that."""
    for name in getattr(value, "__dict__", ()):
        if name not in names:
            raise NotRowsError(f"{path} has an attribute {name!r} beside its fields, which cannot be stored")


def _checked_leaf(tensor: torch.Tensor, path: str, count: int | None, home: torch.device) -> torch.Tensor:
    if (
        not is_ordinary(tensor)
        or tensor.layout is not torch.strided
        or tensor.is_quantized
        or tensor.is_nested
        or tensor.device.type == "meta"
    ):
        raise NotRowsError(
            f"{path} is a {type(tensor).__name__} ({tensor.layout}, {tensor.device}), not a dense tensor"
        )
    if count is not None and (tensor.dim() == 0 or tensor.shape[0] != count):
        raise NotRowsError(
            f"{path} has shape {tuple(tensor.shape)}, whose first size is not the number of rows ({count})"
        )
    if tensor.device not in (home, torch.device("cpu")):  # pragma: no cover - needs an accelerator
        raise NotRowsError(f"{path} is on {tensor.device}, neither on {home} (the call's device) nor on the CPU")
    return tensor


def _constant(value: object) -> Node | None:
    """The node of a value that is the same for all rows; numbers are written so that no bit is lost."""
    cls = type(value)
    if value is None:
        return ["none"]
    if cls is bool:
        return ["bool", value]
    if cls is int:
        return ["int", hex(value)]  # type: ignore[arg-type]
    if cls is float:
        return ["float", value.hex()]  # type: ignore[attr-defined]
    if cls is str:
        return ["str", value]
    return None


def _key(key: object, path: str) -> Node:
    constant = _constant(key)
    if constant is None or isinstance(key, float):
        raise NotRowsError(f"{path} has the key {key!r}, which is no text, whole number, bool or None")
    return constant


def _mapping_kind(cls: type) -> str | None:
    if cls is dict or cls is OrderedDict:
        return "dict"
    # transformers' ModelOutput and diffusers' BaseOutput: an OrderedDict that is a dataclass as well.
    return "output" if issubclass(cls, OrderedDict) and dataclasses.is_dataclass(cls) else None


def _field_names(cls: type) -> tuple[str, ...] | None:
    """The fields of a namedtuple, of what torch returns of ``max`` or ``sort``, or of a dataclass."""
    if issubclass(cls, tuple) and (fields := getattr(cls, "_fields", None)) is not None:
        return tuple(fields)
    if _is_of_torch(cls):
        return tuple(getattr(cls, "__match_args__", ()))
    if dataclasses.is_dataclass(cls):
        return tuple(field.name for field in dataclasses.fields(cls))
    return None


def _named(cls: type) -> tuple[str, str]:
    name = cls.__module__, cls.__qualname__
    if _classes.get(name) is not cls:  # a cell was run again: what was parsed builds objects of the class before
        _classes[name] = cls
        _parsed.cache_clear()
    return name


def with_token_dims(tree: str, dims: Sequence[tuple[int, ...]]) -> str:
    """The tree with the token dimensions of each of its tensors written at its leaf."""
    if not any(dims):
        return tree
    node = json.loads(tree)
    for leaf, own in zip(_leaf_nodes(node), dims, strict=True):
        if own:
            leaf["tokens"] = list(own)
    return _dump(node)


@functools.lru_cache(maxsize=1024)
def token_dims_of(tree: str) -> tuple[tuple[int, ...], ...]:
    """The token dimensions of each tensor of a tree, in its order.

    Raises:
        UnknownClassError: the tree cannot be read.
    """
    try:
        return tuple(tuple(map(int, leaf.get("tokens", ()))) for leaf in _leaf_nodes(json.loads(tree)))
    except (ValueError, TypeError, RecursionError) as error:
        raise UnknownClassError(f"the structure of a stored output cannot be read: {error}") from None


def _leaf_nodes(node: Node) -> list[dict[str, Any]]:
    if isinstance(node, dict):
        return [node]
    return [leaf for item in node for leaf in _leaf_nodes(item)] if isinstance(node, list) else []


# --- building an output ---------------------------------------------------------------------------------

Builder = Callable[[list[torch.Tensor], torch.device], object]


def tree_of(rows: Rows, home: torch.device, *, whole: bool = False) -> object:
    """Build the output that the module would have returned from its rows, on its device.

    Args:
        rows: the rows of the call.
        home: the device of the call's outputs.
        whole: there is one row, and it is the whole output.

    Raises:
        UnknownClassError: the output was of a class that is not loaded in this process.
    """
    if whole:
        rows = Rows(rows.layout, tuple(tensor.squeeze(0) for tensor in rows.tensors))
    if rows.layout.tree == SINGLE and len(rows.tensors) == 1:
        tensor = rows.tensors[0]
        return tensor if tensor.device == home else tensor.to(home)
    build, left = _builder(rows.layout.tree), list(reversed(rows.tensors))
    try:
        output = build(left, home)
    except (MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnknownClassError(f"a stored output cannot be put together: {error}") from None
    if left:
        raise UnknownClassError(f"a stored output has {len(left)} tensors more than its structure")
    return output


def _builder(tree: str) -> Builder:
    try:
        return _parsed(tree)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise UnknownClassError(f"the structure of a stored output cannot be read: {error}") from None


@functools.lru_cache(maxsize=1024)
def _parsed(tree: str) -> Builder:
    return _build(json.loads(tree))


def _to_home(tensors: list[torch.Tensor], home: torch.device) -> torch.Tensor:
    return tensors.pop().to(home)


def _to_cpu(tensors: list[torch.Tensor], home: torch.device) -> torch.Tensor:
    return tensors.pop().cpu()


def _build(node: Node) -> Builder:
    if isinstance(node, dict):
        return _to_cpu if node.get("on") == "cpu" else _to_home
    kind, *rest = node
    if kind in _CONSTANTS:
        constant = _CONSTANTS[kind](*rest)
        return lambda tensors, home: constant
    if kind in ("tuple", "list"):
        items = [_build(item) for item in rest[0]]
        make = tuple if kind == "tuple" else list
        return lambda tensors, home: make(item(tensors, home) for item in items)
    module, qualname, pairs = rest
    cls = _class(kind, module, qualname)
    if kind == "dict":
        entries = [(_build(key)([], _CPU), _build(item)) for key, item in pairs]
        return lambda tensors, home: cls((key, item(tensors, home)) for key, item in entries)
    names = [name if kind != "output" else _build(name)([], _CPU) for name, _ in pairs]
    if kind != "output" and tuple(names) != _field_names(cls):
        raise UnknownClassError(f"the output class {module}.{qualname} has other fields in this process")
    fields = [_build(item) for _, item in pairs]
    construct = {"data": _fill, "named": _fill_tuple, "output": _call}[kind]
    if kind == "output" and names != [field.name for field in dataclasses.fields(cls) if field.name in names]:
        construct = _call_in_order
    return lambda tensors, home: construct(
        cls, {str(name): field(tensors, home) for name, field in zip(names, fields, strict=True)}
    )


_CPU = torch.device("cpu")

_CONSTANTS: dict[str, Callable[..., object]] = {
    "none": lambda: None,
    "bool": bool,
    "int": lambda text: int(text, 16),
    "float": float.fromhex,
    "str": str,
}


def _call(cls: type, fields: dict[str, object]) -> object:
    return cls(**fields)


def _call_in_order(cls: type, fields: dict[str, object]) -> object:
    """A forward may set fields of its output one by one, in another order than they are declared in."""
    made = cls(**fields)
    for name in fields:
        made.move_to_end(name)
    return made


def _fill_tuple(cls: type, fields: dict[str, object]) -> object:
    return cls(fields.values()) if _is_of_torch(cls) else tuple.__new__(cls, fields.values())


def _fill(cls: type, fields: dict[str, object]) -> object:
    """A dataclass with these fields; ``__init__`` is not asked, it may compute or refuse fields."""
    made: object = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def _class(kind: str, module: str, qualname: str) -> type:
    """The class of that name, if this process has it already and it is of that kind; nothing is imported."""
    found: object = _classes.get((module, qualname))
    if found is None:
        found = sys.modules.get(module)
        for name in qualname.split("."):  # not getattr: modules that load lazily would import
            found = getattr(found, "__dict__", {}).get(name)
    if not isinstance(found, type) or not _is_kind(found, kind):
        raise UnknownClassError(f"the output class {module}.{qualname} is not loaded in this process")
    return found


def _is_kind(cls: type, kind: str) -> bool:
    if kind == "named":
        return _is_of_torch(cls) or (issubclass(cls, tuple) and hasattr(cls, "_fields"))
    if kind == "data":
        return dataclasses.is_dataclass(cls)
    return _mapping_kind(cls) == kind
