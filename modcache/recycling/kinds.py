"""Tell kinds of calls apart, and which sizes their inputs have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from ..arguments import Arguments
from ..batch import Batch, Bound, Column, NoRowsError, replaced, split
from ..digest import digest, encode
from ..errors import CutError
from ..keys.registry import is_row
from .trees import ATOMS, fresh, hidden_tensors

__all__ = [
    "Asked",
    "asked_of",
    "first_row",
    "first_rows",
    "inputs_of",
    "owned",
    "rows_in",
    "with_inputs",
    "with_values",
]

_FLAGS = (bool, int, str, type(None))


class Asked(NamedTuple):
    """A call of a recycled model.

    Args:
        arguments: as they were given, with their names.
        batch: the same as rows.
        kind: keywords, flags, dtypes and ranks; what a probe is valid for.
        sizes: the sizes of all inputs but the number of rows.
    """

    arguments: Arguments
    batch: Batch
    kind: tuple[object, ...]
    sizes: tuple[object, ...]

    @property
    def tag(self) -> str:
        """The kind as a short text, the same in every process."""
        return digest(encode(self.kind)).hex()


def asked_of(arguments: Arguments, broadcast: frozenset[str], name: str) -> Asked:
    """Look at a call.

    Raises:
        CutError: it has no rows, or holds what cannot be followed.
    """
    bound = arguments.bound()
    if not broadcast and (plain := _of_tensors(arguments, bound)) is not None:
        return plain
    for argument, value in bound:
        if type(value) is not torch.Tensor:
            _refuse_hidden(value, argument, name)
        elif value.is_nested or value.layout is not torch.strided:
            raise _no_rows(name, argument)
    try:
        batch = split(bound, broadcast, is_row)
    except NoRowsError as error:
        raise CutError(
            f"{name}: {error}, so nothing can be stored by row. Call it with a batch, or use uncached(model)."
        ) from None
    kind: list[object] = []
    sizes: list[object] = []
    for column in batch.columns:
        kind.append(("row", column.path, *_kind_of(column.value)))
        sizes.append(_size_of(column.value, 1))
    for path, value in batch.shared:
        kind.append(("all", path, *_kind_of(value)))
        sizes.append(_size_of(value, 0))
    kind.append(batch.containers and tuple((path, cls) for path, cls, _ in batch.containers))
    return Asked(arguments, batch, tuple(kind), tuple(sizes))


def _of_tensors(arguments: Arguments, bound: Bound) -> Asked | None:
    """The same, at less expense, for the commonest call: of tensors that all have as many rows as the first."""
    columns, kind, sizes, rows = [], [], [], -1
    for name, value in bound:
        if type(value) is not torch.Tensor or value.is_nested or value.layout is not torch.strided:
            return None
        shape = tuple(value.shape)
        if not shape or (rows >= 0 and shape[0] != rows):
            return None
        rows = shape[0]
        columns.append(Column(name, name, value))
        kind.append(("row", name, "tensor", str(value.dtype), len(shape)))
        sizes.append(shape[1:])
    if not columns:
        return None
    return Asked(arguments, Batch(rows, tuple(columns), (), ()), (*kind, ()), tuple(sizes))


def _refuse_hidden(value: Any, argument: str, name: str) -> None:
    found = next(hidden_tensors(value), None)
    if found is not None:
        raise CutError(
            f"{name}: its argument {argument} is a {type(value).__name__} with tensors inside (a key-value cache?), "
            "which cannot be followed to the cut. Pass tensors, or switch the cache off (use_cache=False)."
        )


def _no_rows(name: str, argument: str) -> CutError:
    return CutError(
        f"{name}: its argument {argument} is a nested, packed or sparse tensor, of which nobody can tell the rows. "
        "Pass padded tensors, or call uncached(model)."
    )


def _kind_of(value: object) -> tuple[object, ...]:
    if isinstance(value, torch.Tensor):
        return "tensor", str(value.dtype), value.dim()
    if isinstance(value, np.ndarray):
        return "array", str(value.dtype), value.ndim
    if isinstance(value, _FLAGS):
        return type(value).__name__, value
    return (type(value).__name__,)


def _size_of(value: object, skip: int) -> object:
    if isinstance(value, torch.Tensor | np.ndarray):
        return tuple(value.shape[skip:])
    if isinstance(value, list | tuple):
        return frozenset(tuple(getattr(item, "shape", ())) for item in value) if skip else len(value)
    return None


def inputs_of(asked: Asked, wanted: frozenset[str] | None) -> dict[str, Any]:
    """The inputs of the trunk by path, those with rows first; ``wanted`` are the tensors that feed the cut."""
    found = {
        column.path: column.value
        for column in asked.batch.columns
        if wanted is None or column.path in wanted or not isinstance(column.value, torch.Tensor)
    }
    found |= {
        path: value
        for path, value in asked.batch.shared
        if wanted is None or path in wanted or not isinstance(value, torch.Tensor)
    }
    return found


def with_inputs(asked: Asked, inputs: Mapping[str, Any], rows: int) -> Arguments:
    """The call with other inputs of the trunk; of what does not feed it, as many rows as these have."""
    values = {
        column.path: inputs[column.path] if column.path in inputs else first_rows(column, rows)
        for column in asked.batch.columns
    }
    values |= {path: inputs.get(path, value) for path, value in asked.batch.shared}
    return with_values(asked.arguments, values)


def with_values(arguments: Arguments, values: Mapping[str, Any]) -> Arguments:
    """The arguments with other values at these paths."""
    args, kwargs = list(arguments.args), dict(arguments.kwargs)
    for name, place in arguments.names:
        if isinstance(place, int):
            args[place] = replaced(args[place], name, values)
        else:
            kwargs[place] = replaced(kwargs[place], name, values)
    return Arguments(tuple(args), kwargs, arguments.names)


def owned(arguments: Arguments) -> Arguments:
    """The arguments in lists and mappings of their own, of which a forward may take things out."""
    args, kwargs = arguments.args, arguments.kwargs
    if ATOMS.issuperset(map(type, args)) and ATOMS.issuperset(map(type, kwargs.values())):
        return arguments
    return Arguments(fresh(args), fresh(kwargs), arguments.names)


def first_rows(column: Column, rows: int) -> Any:
    """As many rows of an input that does not matter."""
    return column.value if column.single else column.value[:rows]


def first_row(asked: Asked, path: str, value: Any) -> Any:
    """An input with its first row alone."""
    for column in asked.batch.columns:
        if column.path == path:
            return value if column.single else value[:1]
    return value


def rows_in(asked: Asked, given: Mapping[str, Any]) -> int:
    """How many rows the inputs of a trunk have."""
    for column in asked.batch.columns:
        if column.path in given:
            return 1 if column.single else len(given[column.path])
    return asked.batch.size
