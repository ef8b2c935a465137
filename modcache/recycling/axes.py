"""Find the batch in a tensor, and put it first."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .alike import agree, rows_agree

__all__ = [
    "Axis",
    "CoupledError",
    "axis_of",
    "from_rows",
    "order_of",
    "slopes_of",
    "to_rows",
]


class Axis(NamedTuple):
    """Where the rows of a tensor lie.

    Args:
        dim: the dimension that holds the batch.
        fold: how many entries of it each row has (windows, heads).
        rows_first: the entries of one row lie together.
        order: the dimensions in the order in which they lie in memory.
    """

    dim: int
    fold: int
    rows_first: bool
    order: tuple[int, ...]


class CoupledError(Exception):
    """The rows of a tensor depend on each other, on chance, or on their place."""


def order_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """The dimensions of a tensor, the outermost in memory first."""
    strides = tensor.stride()
    return tuple(sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim)))


def axis_of(
    full: torch.Tensor, turned: torch.Tensor, first: torch.Tensor, rest: torch.Tensor, count: int, floor: float
) -> Axis | None:
    """Where the rows lie in a tensor of which four captures are known; ``None`` if all rows share it.

    Args:
        full: of all rows.
        turned: of all rows in reverse order.
        first: of the first row alone.
        rest: of all others.
        count: the number of rows.
        floor: the tolerance of comparisons.

    Raises:
        CoupledError: no dimension holds rows that are the same in all of them.
    """
    if not full.dim() == turned.dim() == first.dim() == rest.dim():
        raise CoupledError("its number of dimensions depends on the number of rows")
    if full.shape == first.shape == rest.shape:
        if agree(full, turned, floor) and agree(full, first, floor) and agree(full, rest, floor):
            return None
        raise CoupledError("its shape does not depend on the number of rows, but its values do")
    growing = [dim for dim in range(full.dim()) if full.shape[dim] != first.shape[dim]]
    reason = f"its shapes {tuple(full.shape)} and {tuple(first.shape)}, for {count} rows and for one, do not fit"
    if len(growing) == 1 and full.shape[growing[0]] == count * first.shape[growing[0]]:
        dim, fold = growing[0], first.shape[growing[0]]
        for rows_first in (True, False) if fold > 1 else (True,):
            axis = Axis(dim, fold, rows_first, order_of(full))
            if _fits(axis, full, turned, first, rest, floor):
                return axis
        reason = "a row comes out otherwise among other rows, or at another place"
    raise CoupledError(reason)


def _fits(
    axis: Axis, full: torch.Tensor, turned: torch.Tensor, first: torch.Tensor, rest: torch.Tensor, floor: float
) -> bool:
    if rest.shape[axis.dim] + first.shape[axis.dim] != full.shape[axis.dim]:
        return False
    rows, back, one, others = (to_rows(tensor, axis) for tensor in (full, turned, first, rest))
    if not rows.shape[1:] == back.shape[1:] == one.shape[1:] == others.shape[1:]:
        return False
    return rows_agree(rows, back.flip(0), floor) and rows_agree(rows, torch.cat([one, others]), floor)


def to_rows(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The tensor with one entry of its first dimension per row."""
    if axis.fold == 1:
        return tensor.movedim(axis.dim, 0)
    size = tensor.shape[axis.dim] // axis.fold
    parts = (size, axis.fold) if axis.rows_first else (axis.fold, size)
    parted: torch.Tensor = tensor.unflatten(axis.dim, parts)  # type: ignore[no-untyped-call]
    return parted.movedim(axis.dim if axis.rows_first else axis.dim + 1, 0)


def from_rows(rows: torch.Tensor, axis: Axis) -> torch.Tensor:
    """What `to_rows` was given, laid out in memory as the model laid it out."""
    if axis.fold == 1:
        if axis.dim == 0 and axis.order == tuple(range(rows.dim())) and rows.is_contiguous():
            return rows
        tensor = rows.movedim(0, axis.dim)
    else:
        parted = rows.movedim(0, axis.dim if axis.rows_first else axis.dim + 1)
        tensor = parted.flatten(axis.dim, axis.dim + 1)
    if order_of(tensor) == axis.order or (tensor.is_contiguous() and axis.order == tuple(range(tensor.dim()))):
        return tensor
    inverse = sorted(range(tensor.dim()), key=axis.order.__getitem__)
    return tensor.permute(axis.order).contiguous().permute(inverse)


Slope = tuple[int, bool]


def slopes_of(
    full: tuple[int, ...], first: tuple[int, ...], rest: tuple[int, ...], count: int
) -> tuple[Slope, ...] | None:
    """By how much each size of a shape grows with a row, and whether from nothing; ``None`` if not evenly."""
    if not len(full) == len(first) == len(rest):
        return None
    slopes = []
    for size, one, others in zip(full, first, rest, strict=True):
        step, left = divmod(size - one, count - 1)
        if left or others != one + step * (count - 2):
            return None
        slopes.append((step, size == step * count))
    return tuple(slopes)
