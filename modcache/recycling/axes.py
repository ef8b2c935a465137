"""Find the batch in a tensor, and put it first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..selfcheck import tolerance_of

__all__ = [
    "Axis",
    "CoupledError",
    "agree",
    "axis_of",
    "floor_of",
    "from_rows",
    "order_of",
    "rows_agree",
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


_TOLERANCE = {
    torch.float64: 1e-10,
    torch.complex128: 1e-10,
    torch.float32: 1e-4,
    torch.complex64: 1e-4,
}
"""How far apart the same row may come out of two runs, relative to the root mean square."""


def floor_of(dtypes: Iterable[torch.dtype]) -> float:
    """The tolerance of the least precise of some dtypes."""
    return max([0.0, *(_TOLERANCE.get(dtype, tolerance_of(dtype)) for dtype in dtypes if dtype.itemsize > 1)])


def agree(one: torch.Tensor, other: torch.Tensor, floor: float = 0.0) -> bool:
    """Whether two tensors are the same within their precision.

    Args:
        one: a tensor.
        other: what it should be.
        floor: the tolerance of the least precise arithmetic inside.
    """
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    tolerance = _tolerance(one.dtype, floor)
    if not tolerance:
        return torch.equal(one, other)
    values, apart = _apart(one, other)
    if apart is None:
        return False
    size = values.square().mean().sqrt() if values.numel() else apart.sum()
    return bool((apart <= tolerance * size).all())


_BY_ROW = 10
"""How much further apart values may be where they are measured against the row alone."""

_NOTHING = 1e-2
"""The share of its tolerance of a whole tensor that a row may have and count as nothing but rounding."""


def rows_agree(one: torch.Tensor, other: torch.Tensor, floor: float = 0.0) -> bool:
    """Whether two tensors are the same within their precision, as wholes and each row by itself.

    Rows that are small beside others are not measured by those: a norm may make them as large again.

    Args:
        one: a tensor, rows first.
        other: what it should be.
        floor: the tolerance of the least precise arithmetic inside.
    """
    if not agree(one, other, floor):
        return False
    tolerance = _tolerance(one.dtype, floor)
    if not tolerance or not one.numel():
        return True
    values, apart = _apart(one, other)
    assert apart is not None
    sizes, worst = values.reshape(len(one), -1).square().mean(1).sqrt(), apart.reshape(len(one), -1).amax(1)
    nothing = sizes + worst <= _NOTHING * tolerance * values.square().mean().sqrt()
    allowed = max(tolerance, min(_BY_ROW * tolerance, tolerance_of(torch.float32)))
    return bool(((worst <= allowed * sizes) | nothing).all())


def _tolerance(dtype: torch.dtype, floor: float) -> float:
    """How far apart values of this type may be; 0.0 for exact ones."""
    if not tolerance_of(dtype):
        return 0.0
    return max(_TOLERANCE.get(dtype, tolerance_of(dtype)), floor)


def _apart(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The sizes of the values of one tensor, and how far the other is from them; ``None`` if it is so infinitely."""
    wide = torch.complex128 if one.dtype.is_complex else torch.float64
    first, second = one.detach().to(wide), other.detach().to(wide)
    finite = torch.isfinite(first) & torch.isfinite(second)
    same = (first == second) | (torch.isnan(first) & torch.isnan(second))
    apart = torch.where(finite, first - second, 0).abs() if bool((finite | same).all()) else None
    return torch.where(finite, first, 0).abs(), apart


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
