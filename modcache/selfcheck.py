"""Run a module once more on a few rows of a batch, to find out whether a row depends on anything but itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, NoReturn

import torch

from .batch import Batch, length_of
from .chance import preserved_randomness
from .keys.padding import fit_tokens, token_dims, unpad_rows
from .keys.tokens import TokenRows
from .manifests import TokenDims
from .memo import Bypass
from .outputs import NotRowsError, rows_of
from .precision import difference
from .rows import Layout, Rows
from .running import Job, Run, apart, fitted, is_out_of_memory, prepared
from .sameness import sameness

__all__ = ["lengths_of", "rows_to_check", "self_check", "self_check_failed", "sizes_of", "stays_steady"]

_DRAWN_ROWS = 16
_DRAWN_AGAIN = 16
"""How many rows of a module that draws random numbers are run again, and how often."""


def self_check(job: Job, places: list[int], rows: Rows, run: Run, width: int, *, draws: bool) -> TokenDims | None:
    """Run the module once more on a few of the rows; ``None`` if that could not be done.

    Args:
        job: the call.
        places: the computed rows.
        rows: what the module gave for them.
        run: the run in which it did.
        width: the tokens that they were padded to, if they have any.
        draws: whether it drew random numbers.

    Raises:
        Bypass: the rows came out otherwise, so they depend on chance or on each other.
    """
    tokens = job.keyed.tokens
    chosen, other_width = _choice(job, places, rows, width)
    with preserved_randomness():
        other = _again(job, run, chosen, fitted(job.batch, tokens, other_width), wider=other_width > width)
    if other is not None:
        dims = _dims(job, run, rows.layout, width, other.layout, other_width)
        _compare(job, run, _comparable(rows, other, places, chosen, dims, tokens))
        _check_among_others(job, places, rows, run, dims)
    elif tokens is not None and 1 < width < other_width:
        found = _at_full_length(job, places, rows, run, chosen, tokens, width)
        if found is None:
            return None
        dims = found
    else:
        return None
    if draws and not stays_steady(job, places, rows, run, width, dims):
        return None
    same = sameness(job.batch, places, () if tokens is None else tokens.paths)
    job.memo.let_pass(job.site.namespace, job.form, dims, same)
    return dims


def _check_among_others(job: Job, places: list[int], rows: Rows, run: Run, dims: TokenDims) -> None:
    """Where copies of one row were run, and one argument may be a table that another one looks into: two rows as well.

    A row that finds itself in the table comes out right among copies of itself.

    Raises:
        Bypass: a row came out otherwise.
    """
    if job.keyed.tokens is not None or len(job.batch.columns) < 2 or not 1 < len(places) <= _FEW:
        return
    sizes = sizes_of(rows) or [0.0] * len(places)
    by_size = sorted(range(len(places)), key=sizes.__getitem__)
    chosen = [places[by_size[rank]] for rank in _AMONG_OTHERS[len(places)]]
    with preserved_randomness():
        other = _again(job, run, chosen, job.batch)
    if other is not None:
        _compare(job, run, _comparable(rows, other, places, chosen, dims, None))


def _dims(job: Job, run: Run, layout: Layout, width: int, other: Layout, other_width: int) -> TokenDims:
    """Which dimensions of the rows are tokens, as far as they have any."""
    if job.keyed.tokens is None:
        return ((),) * len(layout.leaves)
    found = token_dims(layout, width, other, other_width)
    return _fail(job, run, "its output does not follow the number of tokens") if found is None else found


def _compare(job: Job, run: Run, pairs: Iterable[tuple[Rows, Rows]], what: str = "") -> None:
    for left, right in pairs:
        if (found := difference(left, right, job.site.floor)) is not None:
            _fail(job, run, f"{what}{found}")


def _at_full_length(
    job: Job, places: list[int], rows: Rows, run: Run, chosen: list[int], tokens: TokenRows, width: int
) -> TokenDims | None:
    """The check where a module takes no longer rows than these, none of which is padded; ``None`` if it fails again.

    Rows that are cut by a token have room for padding: they are run without it and with it.

    Raises:
        Bypass: as `self_check`.
    """
    cut = fit_tokens(job.batch, tokens, width - 1)
    with preserved_randomness():
        alone = _again(job, run, chosen, fitted(job.batch, tokens, width))
        short, padded = (_again(job, run, chosen[:1], at) for at in (cut, fit_tokens(cut, tokens, width)))
    if alone is None or short is None or padded is None:
        return None
    dims = _dims(job, run, padded.layout, width, short.layout, width - 1)
    _compare(job, run, _comparable(rows, alone, places, chosen, dims, tokens))
    lengths = tokens.lengths[chosen[:1]] - 1
    pairs = zip(unpad_rows(short, lengths, dims), unpad_rows(padded, lengths, dims), strict=True)
    _compare(job, run, [(left, right) for (_, left), (_, right) in pairs])
    return dims


def _again(
    job: Job, run: Run, chosen: list[int], batch: Batch, *, wider: bool = False, failed: bool = False
) -> Rows | None:
    """What the module gives for some of the rows now; ``None`` if that could not be done.

    It has to fail twice, for a file or a service may fail once.

    Raises:
        Bypass: it does not give rows for these rows alone.
    """
    try:
        ready = _ready_again(job, chosen, batch)
    except Exception:  # of prepare: another batch may tell more
        return None
    try:
        with job.host.undisturbed():
            output = apart(ready)
        job.host.settle()
    except Exception as error:
        if is_out_of_memory(error) and len(set(chosen)) < len(chosen):
            return _again(job, run, chosen[:1], batch, wider=wider)
        if is_out_of_memory(error) or wider:
            return None
        if not failed:
            return _again(job, run, chosen, batch, failed=True)
        _fail(job, run, f"on some of the rows of the batch alone it raises {type(error).__name__}: {error}")
    try:
        return rows_of(output, len(chosen) if job.memo.options.per_row else None, job.home)
    except NotRowsError as error:
        _fail(job, run, str(error))


def stays_steady(job: Job, places: list[int], rows: Rows, run: Run, width: int, dims: TokenDims) -> bool:
    """Whether rows stay the same while it draws other random numbers; ``False`` if that could not be found out.

    Chance may be rare (a layer that is dropped now and then) or coarse (a label that is sampled), so one more run
    shows too little. Some modules draw and make no use of it in eval mode; these may be cached.

    Raises:
        Bypass: a row came out otherwise.
    """
    chosen, tokens = places[:_DRAWN_ROWS], job.keyed.tokens
    with preserved_randomness():
        for _ in range(_DRAWN_AGAIN):
            other = _again(job, run, chosen, fitted(job.batch, tokens, width))
            if other is None:
                return False
            _compare(job, run, _comparable(rows, other, places, chosen, dims, tokens), "it draws random numbers, and ")
    return True


def _choice(job: Job, places: list[int], rows: Rows, width: int) -> tuple[list[int], int]:
    """Rows for the check, and the width to run them at: another one, where rows have lengths of their own."""
    tokens = job.keyed.tokens
    if not job.memo.options.per_row:
        return places, 0
    sizes = sizes_of(rows) or [0.0] * len(places)
    if tokens is None:
        return rows_to_check(places, sizes, lengths_of(job.batch, places)), 0
    shorter = [number for number, place in enumerate(places) if tokens.lengths[place] < width]
    if shorter:
        own = [places[number] for number in shorter]
        chosen = rows_to_check(own, [sizes[number] for number in shorter])
        return chosen, int(tokens.lengths[chosen].max())
    return rows_to_check(places, sizes), width + 1


def _ready_again(job: Job, chosen: list[int], batch: Batch) -> Callable[[], object]:
    whole = batch is job.batch and not job.memo.options.per_row
    taken = job.arguments if whole else job.arguments.taken(batch, chosen)
    return prepared(job.memo.options, job.host.run, taken.args, taken.kwargs)


def _comparable(
    rows: Rows, other: Rows, places: list[int], chosen: list[int], dims: TokenDims, tokens: TokenRows | None
) -> Sequence[tuple[Rows, Rows]]:
    chosen = chosen[: len(other.tensors[0])] if other.tensors else chosen  # copies of a row may not have had room
    numbers = [places.index(place) for place in chosen]
    own = rows.take(numbers)
    if tokens is None:
        return [(own, other)]
    lengths = tokens.lengths[chosen]
    pairs = zip(unpad_rows(own, lengths, dims), unpad_rows(other, lengths, dims), strict=True)
    return [(left, right) for (_, left), (_, right) in pairs]


def _fail(job: Job, run: Run, what: str) -> NoReturn:
    outputs = (run.output,) if run.whole else ()
    raise self_check_failed(job, f"run again on a few rows of a batch, it did not give the same rows: {what}", *outputs)


def self_check_failed(job: Job, what: str, *output: object) -> Bypass:
    """Block calls of this form, because rows depend on more than themselves; to be raised.

    Args:
        job: the call.
        what: how that was found out.
        output: what the module gave on the very call, if it ran on it.
    """
    reason = "self-check failed"
    job.memo.block(job.form, reason)
    hint = (
        'its padding matters, so do not use key="tokens"'
        if job.keyed.tokens is not None
        else "if it is random, make it deterministic; if an argument is the same for all rows, name it in broadcast=; "
        "if the batch is not its first dimension, set batch_first=True where it has that, or give per_row=False"
    )
    if job.keyed.given or job.memo.options.extractor.function is not None:
        hint = f"if different inputs have the same key, give them keys that differ; {hint}"
    return Bypass(
        reason,
        f"{what}. Its rows depend on chance or on each other, so it runs uncached from now on. What to do: {hint}.",
        *output,
    )


# --- which rows -----------------------------------------------------------------------------------------


def rows_to_check(places: list[int], sizes: list[float], lengths: list[int] | None = None) -> list[int]:
    """The few computed rows that are run again: such that most ways to depend on other rows would show.

    Of five rows or more, two: of middling size, because a row that holds the largest or smallest value of its batch
    would not notice that all rows are scaled by it; and no two that swap places in a mirrored batch, in one of pairs
    or in one of two halves. They are put at other places than before, also among the first, the last, the even and
    the odd ones, so that a row that depends on its place gives itself away.
    Where inputs differ in length, the shortest is among them: it shows whether rows are padded to the longest of
    their batch.

    Of fewer, one in several copies. Any two of four are a pair of one kind or the other; and what all rows share must
    not fit, which a batch of one would let pass for anything: also a row alone, of a batch of equal rows, has a copy.

    Args:
        places: the computed rows.
        sizes: how large the output of each is.
        lengths: how long the input of each is, where that differs.
    """
    count = len(places)
    if count == 1:
        return [*places, *places]
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
_AMONG_OTHERS: Final = {2: (1, 1, 0, 1), 3: (1, 1, 0, 1), 4: (1, 2, 2)}
"""By the size of their output: of all such orders, those that find most tables that rows look into."""
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
            lengths = [length_of(column.value[place]) for place in places]
            if len(set(lengths)) > 1:
                return lengths
    return None


def sizes_of(rows: Rows) -> list[float]:
    """The largest absolute value of each row, as far as its first tensor of fractions shows it."""
    for tensor in rows.tensors:
        if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
            wide = tensor.to(torch.complex64 if tensor.is_complex() else torch.float32).abs()
            return wide.reshape(len(wide), -1).amax(1).nan_to_num(0.0).tolist()
    return [0.0] * (len(rows.tensors[0]) if rows.tensors else 0)
