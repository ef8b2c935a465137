"""Tell whether two tensors, or two outputs of a model, are the same within their precision."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..precision import tolerance_of
from .trees import located, opened, same_but_tensors

__all__ = ["agree", "difference", "floor_of", "rows_agree"]

_FINER = {
    torch.float64: 1e-10,
    torch.complex128: 1e-10,
    torch.float32: 1e-4,
    torch.complex64: 1e-4,
}
"""How far apart the same values may come out of two runs, relative to their root mean square, where that is less than
a self-check allows. That one must not take a sound module for a random one, for nobody asked it and nothing is cached
any more; a probe is asked for, says what it found, and is to find a row in which little of another one is mixed."""


def floor_of(dtypes: Iterable[torch.dtype]) -> float:
    """The tolerance of the least precise of some dtypes."""
    return max([0.0, *(_FINER.get(dtype, tolerance_of(dtype)) for dtype in dtypes if dtype.itemsize > 1)])


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
    return max(_FINER.get(dtype, tolerance_of(dtype)), floor)


def _apart(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The sizes of the values of one tensor, and how far the other is from them; ``None`` if it is so infinitely."""
    wide = torch.complex128 if one.dtype.is_complex else torch.float64
    first, second = one.detach().to(wide), other.detach().to(wide)
    finite = torch.isfinite(first) & torch.isfinite(second)
    same = (first == second) | (torch.isnan(first) & torch.isnan(second))
    apart = torch.where(finite, first - second, 0).abs() if bool((finite | same).all()) else None
    return torch.where(finite, first, 0).abs(), apart


def difference(one: Any, other: Any, floor: float) -> str | None:
    """In what two outputs differ, objects among them by what their attributes hold."""
    one, other = opened(one), opened(other)
    left, right = list(located(one)), list(located(other))
    if [step for step, _ in left] != [step for step, _ in right] or not same_but_tensors(one, other):
        return "another structure"
    for (step, mine), (_, yours) in zip(left, right, strict=True):
        where = "".join(f"[{part!r}]" for part in step) or "the output"
        if mine.shape != yours.shape or mine.dtype != yours.dtype:
            return f"{where}: shape {tuple(yours.shape)} for {tuple(mine.shape)}"
        if not agree(mine, yours, floor):
            return f"{where}: other values"
    return None
