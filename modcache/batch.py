"""Split the arguments of a call into what is per row and what all rows share, and take some of the rows."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .rows import taken_as_whole

__all__ = [
    "Batch",
    "Bound",
    "Column",
    "NoRowsError",
    "items_of",
    "length_of",
    "replaced",
    "row",
    "split",
    "take",
    "tensors_in",
]

Bound = Sequence[tuple[str, object]]
"""The arguments of a call by name, in the order of the signature."""


class NoRowsError(Exception):
    """No argument of the call has rows."""


class Column(NamedTuple):
    """A part of an argument that has one item per row.

    Args:
        path: where it lies, e.g. ``input_ids`` or ``batch['image']``.
        argument: the name of the argument that it belongs to.
        value: a tensor or an array (rows along dim 0), a list or a tuple of rows, or, for ``single``, the row itself.
        single: the whole value is one row (a bare text, a path, an image).
    """

    path: str
    argument: str
    value: Any
    single: bool = False


class Batch(NamedTuple):
    """A call as rows.

    Args:
        size: the number of rows.
        columns: what has one item per row.
        shared: path and value of everything that is the same for all rows.
        containers: path, class and length of the structures around both.
    """

    size: int
    columns: tuple[Column, ...]
    shared: tuple[tuple[str, object], ...]
    containers: tuple[tuple[str, str, int], ...]


IsRow = Callable[[object], bool]


def split(bound: Bound, broadcast: frozenset[str], is_row: IsRow) -> Batch:
    """Split bound arguments into rows.

    The number of rows is the first size of the first argument that has one; whatever has another first size,
    or none, or is named in ``broadcast``, is shared by all rows.

    Args:
        bound: names and values of the arguments.
        broadcast: names of arguments (or paths in them) that all rows share although their size may be the batch's.
        is_row: whether an object is a row by itself (a text, a path, an image, a registered type).

    Raises:
        NoRowsError: no argument has rows.
    """
    leaves: list[tuple[Column, int | None]] = []
    containers: list[tuple[str, str, int]] = []
    try:
        for name, value in bound:
            for column in _leaves(value, name, name, containers, is_row):
                named = name in broadcast or column.path in broadcast
                leaves.append((column, None if named else _length(column.value)))
    except RecursionError:
        raise NoRowsError("an argument is nested too deep, or contains itself") from None
    size = next((length for _, length in leaves if length is not None), None)
    if size is None:
        leaves, size = _single_row(leaves, broadcast, is_row), 1
    columns = tuple(column for column, length in leaves if length == size)
    shared = tuple((column.path, column.value) for column, length in leaves if length != size)
    return Batch(size, columns, shared, tuple(containers))


def _single_row(
    leaves: list[tuple[Column, int | None]], broadcast: frozenset[str], is_row: IsRow
) -> list[tuple[Column, int | None]]:
    """Without a batched argument, the objects that are rows by themselves make one row."""
    marked: list[tuple[Column, int | None]] = [
        (column._replace(single=True), 1)
        if is_row(column.value) and not {column.argument, column.path} & broadcast
        else (column, None)
        for column, _ in leaves
    ]
    if all(length is None for _, length in marked):
        raise NoRowsError("no argument has rows: none is a list, an array or a tensor of at least one dimension")
    return marked


def _length(value: object) -> int | None:
    """The number of rows of a leaf, or ``None`` if it has no rows."""
    if isinstance(value, torch.Tensor) and value.is_nested:
        return None  # it has no sizes to ask for
    if isinstance(value, torch.Tensor | np.ndarray):
        return len(value) if value.ndim else None
    return len(value) if isinstance(value, list | tuple) else None


def _leaves(
    value: object, path: str, argument: str, containers: list[tuple[str, str, int]], is_row: IsRow
) -> Iterator[Column]:
    """Walk into structures; a list is rows, and so is a tuple of texts, paths or images (what collating gives)."""
    items = None if is_row(value) else _items(value, is_row)
    if items is None:
        yield Column(path, argument, value)
        return
    cls = type(value)
    containers.append((path, f"{cls.__module__}.{cls.__qualname__}", len(items)))
    for step, item in items:
        yield from _leaves(item, path + step, argument, containers, is_row)


def _items(value: object, is_row: IsRow) -> list[tuple[str, object]] | None:
    """Steps and parts of a structure, or ``None`` for a leaf."""
    if isinstance(value, torch.Tensor | np.ndarray | list | str | bytes | torch.Size):
        return None
    if isinstance(value, tuple):
        if (fields := getattr(type(value), "_fields", None)) is not None:
            return [(f".{name}", item) for name, item in zip(fields, value, strict=True)]
        if value and all(map(is_row, value)):
            return None
        return [(f"[{place}]", item) for place, item in enumerate(value)]
    if isinstance(value, Mapping):
        if not isinstance(value, MutableMapping) or not all(isinstance(key, str | int) for key in value):
            return None  # some of its rows could not be put into another one
        return [
            *((f"[{key!r}]", item) for key, item in value.items()),
            *((f".{name}", item) for name, item in _set_on(value).items()),
        ]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f".{name}", getattr(value, name)) for name in _names(value)]
    return None


def items_of(value: object) -> Sequence[tuple[str, object]]:
    """Steps and parts of a structure that `split` walks into; nothing for a leaf."""
    return _items(value, lambda _: False) or ()


def _set_on(value: Mapping[Any, object]) -> dict[str, object]:
    """What was set on a mapping beside its items; what a library keeps for itself there does not count."""
    fields = getattr(value, "__dict__", {})
    return {
        name: item for name, item in fields.items() if not name.startswith("_") and name != "data" and name not in value
    }


def _names(value: Any) -> list[str]:
    """The fields of a dataclass, and what else was set on it."""
    fields = [field.name for field in dataclasses.fields(value)]
    return [*fields, *(name for name in getattr(value, "__dict__", ()) if name not in fields)]


# --- taking rows ----------------------------------------------------------------------------------------


def take(value: object, batch: Batch, places: Sequence[int], path: str) -> object:
    """The argument at ``path`` with the rows at ``places`` only; what is shared stays the very same object."""
    return _rebuilt(value, path, {column.path: column for column in batch.columns}, places)


def replaced(value: object, path: str, values: Mapping[str, object]) -> Any:
    """The argument at ``path`` with other values at the paths that are named."""
    return _rebuilt(value, path, {at: Column(at, path, new, single=True) for at, new in values.items()}, ())


def _rebuilt(value: Any, path: str, columns: Mapping[str, Column], places: Sequence[int]) -> Any:
    if (column := columns.get(path)) is not None:
        return _taken(column, places)
    if not any(other.startswith((f"{path}.", f"{path}[")) for other in columns):
        return value
    if isinstance(value, Mapping):
        pairs = {key: _rebuilt(item, f"{path}[{key!r}]", columns, places) for key, item in value.items()}
        if type(value) is dict:
            return pairs
        other = _like_mapping(value, pairs)
        for name, item in _set_on(value).items():
            vars(other)[name] = _rebuilt(item, f"{path}.{name}", columns, places)
        return other
    if isinstance(value, tuple):
        if (fields := getattr(type(value), "_fields", None)) is not None:
            parts = (
                _rebuilt(item, f"{path}.{name}", columns, places) for name, item in zip(fields, value, strict=True)
            )
            return tuple.__new__(type(value), parts)
        return tuple(_rebuilt(item, f"{path}[{place}]", columns, places) for place, item in enumerate(value))
    if dataclasses.is_dataclass(value):
        return _like_dataclass(
            value,
            {name: _rebuilt(getattr(value, name), f"{path}.{name}", columns, places) for name in _names(value)},
        )
    raise AssertionError(f"{path}: a {type(value)} was walked into but cannot be rebuilt")


def _like_mapping(value: Any, pairs: dict[Any, Any]) -> Any:
    """A copy of a mapping (``BatchEncoding``, ``OrderedDict``, ``ModelOutput``) with other items."""
    other = copy.copy(value)
    if hasattr(other, "data") and isinstance(other.data, dict):  # UserDict shares its data with a shallow copy
        other.data = dict(pairs)
        return other
    for key, item in pairs.items():
        other[key] = item
    return other


def _like_dataclass(value: Any, fields: dict[str, Any]) -> Any:
    other = copy.copy(value)
    for name, item in fields.items():
        object.__setattr__(other, name, item)
    return other


def _taken(column: Column, places: Sequence[int]) -> Any:
    value = column.value
    if column.single:
        return value
    if isinstance(value, torch.Tensor):
        index = torch.tensor(places, dtype=torch.int64, device=value.device)
        if value.layout is torch.sparse_coo:  # which cannot be indexed
            return value.index_select(0, index)
        return taken_as_whole(value, lambda values: values[index])
    if isinstance(value, np.ndarray):
        return value[np.asarray(places, dtype=np.int64)]
    items = (value[place] for place in places)
    return list(items) if isinstance(value, list) else tuple(items)


def row(bound: Bound, batch: Batch, place: int) -> object:
    """One row as a key function sees it: the row of the only per-row argument, or a mapping of name to row."""
    columns = {column.path: column for column in batch.columns}
    names = {column.argument for column in batch.columns}
    found = {name: _row_of(value, name, columns, place) for name, value in bound if name in names}
    return next(iter(found.values())) if len(found) == 1 else found


def _row_of(value: Any, path: str, columns: Mapping[str, Column], place: int) -> Any:
    if (column := columns.get(path)) is not None:
        return column.value if column.single else column.value[place]
    items = _items(value, _never)
    if items is None:
        return value
    parts = [_row_of(item, path + step, columns, place) for step, item in items]
    if isinstance(value, Mapping):
        return dict(zip(value, parts, strict=False))  # a key function sees the items, not what was set beside them
    if isinstance(value, tuple):
        return tuple.__new__(type(value), parts)
    return _like_dataclass(value, dict(zip(_names(value), parts, strict=True)))


def _never(_: object) -> bool:
    return False


def length_of(row: object) -> int:
    """How long one row of a list is: characters, bytes, items or elements; 0 for anything that has no length."""
    if isinstance(row, torch.Tensor):
        return row.numel()
    if isinstance(row, np.ndarray):
        return row.size
    return len(row) if isinstance(row, str | bytes | list | tuple) else 0


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """All tensors of an argument, however deep in lists, tuples, mappings and dataclasses; each of these once."""
    waiting = [value]
    seen: dict[int, object] = {}  # held, so that an id stays theirs
    while waiting:
        item = waiting.pop()
        if isinstance(item, torch.Tensor):
            yield item
        elif id(item) not in seen and (inside := _parts(item)):
            seen[id(item)] = item
            waiting.extend(reversed(inside))


def _parts(value: object) -> list[object]:
    """What a structure holds; nothing for texts and for anything else."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple):
        return [] if set(map(type, value)) == {str} else list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return []
