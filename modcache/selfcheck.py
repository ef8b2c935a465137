"""Find out whether a row depends on anything but itself: compare rows of two runs within their precision."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .batch import Batch
from .rows import Rows
from .tensors import memory_of

__all__ = [
    "difference",
    "lengths_of",
    "preserved_randomness",
    "random_state",
    "rows_to_check",
    "sizes_of",
    "tolerance_of",
]

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


def rows_to_check(places: list[int], sizes: list[float], lengths: list[int] | None = None) -> list[int]:
    """The few computed rows that are run again: such that most ways to depend on other rows would show.

    Of five rows or more, two: of middling size, because a row that holds the largest or smallest value of its batch
    would not notice that all rows are scaled by it; and no two that swap places in a mirrored batch, in one of pairs
    or in one of two halves. They are put at other places than before, also among the first, the last, the even and
    the odd ones, so that a row that depends on its place gives itself away.
    Where inputs differ in length, the shortest is among them: it shows whether rows are padded to the longest of
    their batch.

    Of fewer, one in several copies. Any two of four are a pair of one kind or the other; and what all rows share must
    not fit, which a batch of one would let pass for anything.

    Args:
        places: the computed rows.
        sizes: how large the output of each is.
        lengths: how long the input of each is, where that differs.
    """
    count = len(places)
    if count < 2:
        return []
    by_size = sorted(range(count), key=sizes.__getitem__)
    middling = [by_size[rank] for rank in sorted(range(count), key=lambda rank: abs(2 * rank - count + 1))]
    shortest = None if lengths is None else min(range(count), key=lengths.__getitem__)
    if count <= _FEW:
        telling = [number for number in middling if sizes[number] and 2 * number != count - 1]
        first = shortest if shortest is not None else next(iter(telling), middling[-1])
        return [places[first]] * (2 if count == 3 else 3)
    others = middling[:_MIDDLING] if shortest is None else [shortest]
    pairs = [pair for second in middling for first in others for pair in ((first, second), (second, first))]
    pair = next((pair for pair in pairs if _telling(*pair, count)), None)
    if pair is None:
        raise AssertionError(f"of {count} rows, no two tell anything")
    return [places[number] for number in pair]


_FEW = 4
_MIDDLING = 3


def _telling(first: int, second: int, count: int) -> bool:
    """Whether two rows of a batch, run again in this order, are no pair of it, and have other places than before."""
    partners = first + second == count - 1 or first // 2 == second // 2 or abs(first - second) * 2 == count
    ends = first == 0 or second == count - 1
    parities = first % 2 == 0 and second % 2 == 1
    return first != second and not (partners or ends or parities)


def lengths_of(batch: Batch, places: list[int]) -> list[int] | None:
    """The lengths of the rows in the first list of texts, tensors or arrays that differ in it, if there is one."""
    for column in batch.columns:
        if isinstance(column.value, list | tuple) and not column.single:
            lengths = [_length(column.value[place]) for place in places]
            if len(set(lengths)) > 1:
                return lengths
    return None


def _length(row: object) -> int:
    if isinstance(row, torch.Tensor):
        return row.numel()
    if isinstance(row, np.ndarray):
        return row.size
    return len(row) if isinstance(row, str | bytes | list | tuple) else 0


def sizes_of(rows: Rows) -> list[float]:
    """The largest absolute value of each row, as far as its first tensor of fractions shows it."""
    for tensor in rows.tensors:
        if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
            wide = tensor.to(torch.complex64 if tensor.is_complex() else torch.float32).abs()
            return wide.reshape(len(wide), -1).amax(1).nan_to_num(0.0).tolist()
    return [0.0] * (len(rows.tensors[0]) if rows.tensors else 0)


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


def _numpy_random() -> Any:
    """`numpy.random`, if it was imported: else nothing was drawn from it, and its import takes a lock.

    A child of a fork would wait for ever for that lock, if another thread held it in the parent.
    """
    return sys.modules.get("numpy.random")


def random_state() -> tuple[object, ...]:
    """Where the random numbers of torch, its accelerators in use, numpy and Python stand; equal until one is drawn."""
    numpy_random = _numpy_random()
    _, words, *rest = ("", ()) if numpy_random is None else numpy_random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    states = (torch.get_rng_state(), *cuda)
    return random.getstate(), np.asarray(words).tobytes(), *rest, *(bytes(memory_of(state)) for state in states)


@contextlib.contextmanager
def preserved_randomness() -> Iterator[None]:
    """Leave the random state of torch, its accelerators in use, numpy and Python as it was."""
    numpy_random = _numpy_random()
    python, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = None if numpy_random is None else numpy_random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        random.setstate(python)
        if numpy_random is not None and numpy_state is not None:
            numpy_random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
