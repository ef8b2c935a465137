"""Tell in what two runs of the same rows differ beyond the precision of their arithmetic."""

from __future__ import annotations

import torch

from .rows import Rows

__all__ = ["difference", "tolerance_of"]

_EXACT = 0.0
_TOLERANCE = {
    torch.float64: 1e-3,
    torch.complex128: 1e-3,
    torch.float32: 1e-3,
    torch.complex64: 1e-3,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
_COARSE = 2.5e-1  # float8 has two or three bits of mantissa


def tolerance_of(dtype: torch.dtype) -> float:
    """How far two runs of one row may be apart, relative to the row's root mean square; 0.0 for exact types."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return _EXACT
    return _TOLERANCE.get(dtype, _COARSE)


def difference(one: Rows, other: Rows, floor: float = 0.0) -> str | None:
    """In what the rows of two runs differ beyond their precision, in words; ``None`` if they agree.

    Args:
        one: rows of the first run.
        other: the same rows of the second run.
        floor: the tolerance of the least precise arithmetic inside of the module; outputs may be cast up after it.
    """
    if one.layout.tree != other.layout.tree:
        return "the structure or a constant of its output differs"
    if one.layout != other.layout:
        shapes = [tuple(shape for _, shape in rows.layout.leaves) for rows in (one, other)]
        return f"its output rows have shapes {shapes[0]} and {shapes[1]}"
    for place, (left, right) in enumerate(zip(one.tensors, other.tensors, strict=True)):
        found = _leaf_difference(left, right, floor)
        if found is not None:
            return found if len(one.tensors) == 1 else f"output tensor {place}: {found}"
    return None


def _leaf_difference(left: torch.Tensor, right: torch.Tensor, floor: float) -> str | None:
    right = right.to(left.device)
    dtype = left.dtype
    tolerance = tolerance_of(dtype)
    if tolerance == _EXACT:
        return None if torch.equal(left, right) else "whole numbers that should be equal differ"
    wide = torch.complex128 if dtype.is_complex else torch.float64
    first, second = (rows.reshape(len(rows), -1 if rows.numel() else 0).to(wide) for rows in (left, right))
    known = torch.isfinite(first) & torch.isfinite(second)
    same = (first == second) | (torch.isnan(first) & torch.isnan(second))
    if not bool((known | same).all()):
        return "one run gave values that are not finite, the other did not"
    apart = torch.where(known, first - second, 0).abs()
    size = torch.where(known, first, 0).abs().square().mean(1, keepdim=True).sqrt() if first.shape[1] else apart
    tolerance = max(tolerance, floor)
    if bool((apart <= tolerance * size).all()):
        return None
    worst = float((apart / size.clamp_min(torch.finfo(torch.float64).tiny)).max())
    return f"values differ by up to {worst:.2g} of the row's root mean square (allowed: {tolerance:g})"
