"""Tell in what two outputs of a model differ."""

from __future__ import annotations

from typing import Any

from .axes import agree
from .trees import located, same_but_tensors

__all__ = ["difference"]


def difference(one: Any, other: Any, floor: float) -> str | None:
    """In what two outputs differ."""
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
