"""Compute the rows that are missing, and make sure that they do not depend on each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, NoReturn

import numpy as np

from .batch import Batch, tensors_in
from .keys.padding import fit_tokens, token_dims, unpad_rows
from .keys.tokens import TokenRows
from .manifests import TokenDims
from .memo import Bypass
from .outputs import NotRowsError, rows_of
from .rows import Layout, Rows
from .running import Job, Part, Run, apart, fitted, is_out_of_memory, prepared, run_rows
from .sameness import sameness
from .selfcheck import difference, lengths_of, preserved_randomness, random_state, rows_to_check, sizes_of

__all__ = ["Computed", "compute", "compute_again", "self_check_failed"]

_DRAWN_ROWS = 16
_DRAWN_AGAIN = 16
"""How many rows of a module that draws random numbers are run again, and how often."""


class Computed(NamedTuple):
    """Rows that the module computed.

    Args:
        parts: numbers among the computed rows, and the rows; several parts where rows have lengths of their own.
        checked: whether a self-check has passed for calls of this form.
    """

    parts: tuple[Part, ...]
    checked: bool


def compute(job: Job, places: list[int], *, check: bool) -> Computed:
    """The rows at these places, computed in one run.

    Raises:
        Bypass: the output is not rows, or depends on more than the rows; with the output if it is the call's.
    """
    memo, site, tokens = job.memo, job.site, job.keyed.tokens
    width = 0 if tokens is None else int(tokens.lengths[places].max())
    dims = memo.findings.passed(site.namespace, job.form)
    unknown = dims is None and (check or not memo.findings.is_steady(site.namespace, job.form))
    before = random_state() if unknown else ()
    run = run_rows(job, places, width)
    draws = unknown and before != random_state()
    moved = job.host.settle()
    rows = _rows(job, run)
    if moved is not None:
        _weights_moved(job, run, moved)
    memo.note_still()
    if dims is not None and tokens is not None and not _follow_tokens(dims, rows, width):
        dims = None  # what an earlier run left word of is not true of this output
    if check or (dims is None and (tokens is not None or not memo.options.per_row)):
        found = _self_check(job, places, rows, run, width, draws=draws)
        dims = dims if found is None and tokens is not None else found
    elif unknown and (not draws or _steady(job, places, rows, run, width, ((),) * len(rows.layout.leaves))):
        memo.findings.note_steady(site.namespace, job.form)
    if tokens is None:
        return Computed(((np.arange(len(places)), rows),), checked=dims is not None)
    if dims is None:
        _give_up(run)
    return Computed(tuple(unpad_rows(rows, tokens.lengths[places], dims)), checked=True)


def _follow_tokens(dims: TokenDims, rows: Rows, width: int) -> bool:
    """Whether these dimensions of the rows are as long as the rows have tokens."""
    shapes = [shape for _, shape in rows.layout.leaves]
    return len(dims) == len(shapes) and all(
        dim < len(shape) and shape[dim] == width for own, shape in zip(dims, shapes, strict=True) for dim in own
    )


def compute_again(job: Job, places: list[int]) -> tuple[Part, ...]:
    """The rows at these places as the module gives them now, for comparison only.

    Raises:
        Bypass: as `compute`.
    """
    with preserved_randomness():
        return compute(job, places, check=False).parts


def _rows(job: Job, run: Run) -> Rows:
    """The output as rows.

    Raises:
        Bypass: it cannot be parted into rows, or something trainable feeds it.
    """
    try:
        rows = rows_of(run.output, run.rows if job.memo.options.per_row else None, job.home)
        if not (job.host.grad and any(tensor.requires_grad for tensor in tensors_in(run.output))):
            return rows
        raise NotRowsError("its output needs grad: something trainable that is no parameter of it feeds the output")
    except NotRowsError as error:
        remedy = (
            "Call it with use_cache=False, which leaves that out."
            if "past_key_values" in str(error)
            else "Cache a submodule whose output has one row per input, or give per_row=False if the module has no "
            "batch dimension."
        )
        raise Bypass(
            "output is not rows",
            f"{error}; it runs uncached. {remedy}",
            *((run.output,) if run.whole else ()),
        ) from None


def _weights_moved(job: Job, run: Run, name: str) -> NoReturn:
    """Rows of a forward that changed its own weights belong to no state."""
    advice = None
    if job.memo.note_moved():
        job.memo.block(job.form, "changes its own weights")
        advice = f"its forward keeps changing {name}, so no row stays valid; it runs uncached from now on."
    raise Bypass("changes its own weights", advice, *((run.output,) if run.whole else ()))


def _give_up(run: Run) -> NoReturn:
    """Nothing can be told from this batch; the next one may tell more."""
    raise Bypass("undecided", None, *((run.output,) if run.whole else ()))


# --- the self-check -------------------------------------------------------------------------------------


def _self_check(job: Job, places: list[int], rows: Rows, run: Run, width: int, *, draws: bool) -> TokenDims | None:
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
    elif tokens is not None and 1 < width < other_width:
        found = _at_full_length(job, places, rows, run, chosen, tokens, width)
        if found is None:
            return None
        dims = found
    else:
        return None
    if draws and not _steady(job, places, rows, run, width, dims):
        return None
    same = sameness(job.batch, places, () if tokens is None else tokens.paths)
    job.memo.let_pass(job.site.namespace, job.form, dims, same)
    return dims


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
        Bypass: as `_self_check`.
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


def _again(job: Job, run: Run, chosen: list[int], batch: Batch, *, wider: bool = False) -> Rows | None:
    """What the module gives for some of the rows now; ``None`` if that could not be done.

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
        _fail(job, run, f"on some of the rows of the batch alone it raises {type(error).__name__}: {error}")
    try:
        return rows_of(output, len(chosen) if job.memo.options.per_row else None, job.home)
    except NotRowsError as error:
        _fail(job, run, str(error))


def _steady(job: Job, places: list[int], rows: Rows, run: Run, width: int, dims: TokenDims) -> bool:
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
        chosen = rows_to_check(own, [sizes[number] for number in shorter]) or own[:1]
        return chosen, int(tokens.lengths[chosen].max())
    return rows_to_check(places, sizes) or places, width + 1


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
        else "if it is random, make it deterministic; if an argument is the same for all rows, name it in broadcast="
    )
    return Bypass(
        reason,
        f"{what}. Its rows depend on chance or on each other, so it runs uncached from now on. What to do: {hint}.",
        *output,
    )
