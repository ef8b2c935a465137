"""Run the module on the rows that are missing, and make sure that its rows do not depend on each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from .arguments import Arguments, Binder
from .batch import Batch, tensors_in
from .hit import Site
from .keys import Keyed
from .keys.padding import fit_tokens, token_dims, unpad_rows
from .keys.tokens import TokenRows
from .manifests import TokenDims
from .memo import Bypass, Memo, Options
from .modes import without_given_keys
from .outputs import NotRowsError, rows_of
from .recipe import Form
from .rows import Rows
from .selfcheck import difference, lengths_of, preserved_randomness, rows_to_check, sizes_of

__all__ = ["Computed", "Host", "Job", "Part", "compute", "compute_again", "run_uncached", "self_check_failed"]

Part = tuple[np.ndarray, Rows]
"""Places in a batch, and the rows that belong there."""


class Host(NamedTuple):
    """The module that is called, as functions.

    Args:
        run: its own forward.
        bind: names the arguments of a call.
        settle: to be called after each run; the name of a weight that the run changed, if any.
        grad: whether grad mode is on.
        turn: the number of the look at its weights that this call relies on.
    """

    run: Callable[..., object]
    bind: Binder
    settle: Callable[[], str | None]
    grad: bool
    turn: int


class Job(NamedTuple):
    """One call, split and keyed.

    Args:
        memo: what the calls of this module share.
        site: the state that the module is in.
        host: the module.
        arguments: what the caller gave.
        batch: the same as rows.
        keyed: the keys of the rows.
        form: what a self-check of this call is valid for.
        home: the device on which outputs are expected.
    """

    memo: Memo
    site: Site
    host: Host
    arguments: Arguments
    batch: Batch
    keyed: Keyed
    form: Form
    home: torch.device


class Computed(NamedTuple):
    """Rows that the module computed.

    Args:
        parts: numbers among the computed rows, and the rows; several parts where rows have lengths of their own.
        keep: whether they may be stored.
        checked: whether a self-check has passed for calls of this form.
    """

    parts: tuple[Part, ...]
    keep: bool
    checked: bool


class _Run(NamedTuple):
    """One run of the module: what it returned, and whether on the very arguments of the call."""

    output: object
    whole: bool
    rows: int


def run_uncached(
    options: Options, run: Callable[..., object], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> object:
    """The module on these arguments, prepared if that is asked for."""
    return _prepared(options, run, args, kwargs)()


def _prepared(
    options: Options, run: Callable[..., object], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Callable[[], object]:
    """The run that is left when ``prepare`` is done: what it gave is positional, keywords, or one argument."""
    if options.prepare is None:
        return partial(run, *args, **kwargs)
    prepared = options.prepare(*args, **kwargs)
    if isinstance(prepared, tuple) and not hasattr(prepared, "_fields"):
        return partial(run, *prepared)
    if isinstance(prepared, Mapping):
        return partial(run, **prepared)
    return partial(run, prepared)


def compute(job: Job, places: list[int], *, check: bool) -> Computed:
    """The rows at these places, computed in one run.

    Raises:
        Bypass: the output is not rows, or depends on more than the rows; with the output if it is the call's.
    """
    memo, site, tokens = job.memo, job.site, job.keyed.tokens
    width = 0 if tokens is None else int(tokens.lengths[places].max())
    run = _run(job, places, width)
    moved = job.host.settle()
    rows = _rows(job, run)
    if moved is not None:
        _weights_moved(job, run, moved)
    memo.note_still()
    dims = memo.passed(site.namespace, job.form)
    if dims is not None and tokens is not None and not _follow_tokens(dims, rows, width):
        dims = None  # what an earlier run left word of is not true of this output
    if dims is None and (check or tokens is not None or not memo.options.per_row):
        dims = _self_check(job, places, rows, run, width)
    if tokens is None:
        return Computed(((np.arange(len(places)), rows),), keep=True, checked=dims is not None)
    if dims is None:
        _give_up(run)
    return Computed(tuple(unpad_rows(rows, tokens.lengths[places], dims)), keep=True, checked=True)


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


# --- running --------------------------------------------------------------------------------------------


def _fitted(batch: Batch, tokens: TokenRows | None, width: int) -> Batch:
    return batch if tokens is None or width == tokens.width else fit_tokens(batch, tokens, width)


def _run(job: Job, places: list[int], width: int) -> _Run:
    """Run the module on some rows; on the very arguments of the call if these are all its rows in order."""
    arguments = job.arguments
    batch = _fitted(job.batch, job.keyed.tokens, width)
    whole = batch is job.batch and places == list(range(batch.size))
    taken = arguments if whole else arguments.taken(batch, places)
    before = _versions(taken)
    try:
        ready = _prepared(job.memo.options, job.host.run, taken.args, taken.kwargs)
    except Exception as error:
        if whole:
            raise
        _only_whole_batches(job, error, "prepare")  # reading a file may fail once, and says nothing of rows
    try:
        output = ready() if whole else _apart(ready)
    except Exception as error:
        if whole or _is_out_of_memory(error):
            raise
        _only_whole_batches(job, error, "forward")
    if before != _versions(taken):
        job.memo.block(job.form, "writes into its input")
        raise Bypass(
            "writes into its input",
            "its forward changes an input in place, which a stored row would not do; it runs uncached from now on.",
            *((output,) if whole else ()),
        )
    return _Run(output, whole, len(places))


def _versions(arguments: Arguments) -> list[int]:
    return [tensor._version for tensor in tensors_in(dict(arguments.bound())) if not tensor.is_inference()]


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "out of memory" in str(error)


def _only_whole_batches(job: Job, error: Exception, culprit: str) -> NoReturn:
    """Something failed on a part of the batch: does it on the whole? Then it is no matter of rows."""
    arguments = job.arguments
    output = run_uncached(job.memo.options, job.host.run, arguments.args, arguments.kwargs)
    reason = "fails on some of its rows"
    what = f"its {culprit} raised {type(error).__name__} on some of its rows ({error}), but not on the whole batch"
    if culprit == "prepare":
        raise Bypass(reason, f"{what}; that call ran uncached.", output) from None
    job.memo.block(job.form, reason)
    raise Bypass(
        reason,
        f"{what}; it runs uncached from now on. If an argument is the same for all rows, name it in broadcast=.",
        output,
    ) from None


def _apart(ready: Callable[[], object]) -> object:
    """Run on a part of the batch, where keys that were given for the whole batch fit nothing inside."""
    with without_given_keys():
        return ready()


def _rows(job: Job, run: _Run) -> Rows:
    """The output as rows.

    Raises:
        Bypass: it cannot be parted into rows, or something trainable feeds it.
    """
    try:
        if job.host.grad and _any_needs_grad(run.output):
            raise NotRowsError("its output needs grad: something trainable that is no parameter of it feeds the output")
        return rows_of(run.output, run.rows if job.memo.options.per_row else None, job.home)
    except NotRowsError as error:
        raise Bypass(
            "output is not rows",
            f"{error}; it runs uncached. Cache a submodule whose output has one row per input, or give per_row=False "
            "if the module has no batch dimension.",
            *((run.output,) if run.whole else ()),
        ) from None


def _any_needs_grad(output: object) -> bool:
    if isinstance(output, torch.Tensor):
        return output.requires_grad
    if isinstance(output, Mapping):
        return any(map(_any_needs_grad, output.values()))
    if isinstance(output, tuple | list):
        return any(map(_any_needs_grad, output))
    return hasattr(output, "__dataclass_fields__") and any(map(_any_needs_grad, vars(output).values()))


def _weights_moved(job: Job, run: _Run, name: str) -> NoReturn:
    """Rows of a forward that changed its own weights belong to no state."""
    advice = None
    if job.memo.note_moved():
        job.memo.block(job.form, "changes its own weights")
        advice = f"its forward keeps changing {name}, so no row stays valid; it runs uncached from now on."
    raise Bypass("changes its own weights", advice, *((run.output,) if run.whole else ()))


def _give_up(run: _Run) -> NoReturn:
    """Nothing can be told from this batch; the next one may tell more."""
    raise Bypass("undecided", None, *((run.output,) if run.whole else ()))


# --- the self-check -------------------------------------------------------------------------------------


def _self_check(job: Job, places: list[int], rows: Rows, run: _Run, width: int) -> TokenDims | None:
    """Run the module once more on a few of the rows; ``None`` if that could not be done.

    Raises:
        Bypass: the rows came out otherwise, so they depend on chance or on each other.
    """
    tokens = job.keyed.tokens
    chosen, other_width = _choice(job, places, rows, width)
    try:
        ready = _ready_again(job, chosen, other_width)
    except Exception:  # of prepare: another batch may tell more
        return None
    try:
        with preserved_randomness():
            again = _apart(ready)
            job.host.settle()
    except Exception as error:
        if _is_out_of_memory(error) or other_width > width:
            return None
        _fail(job, run, f"on some of the rows of the batch alone it raises {type(error).__name__}: {error}")
    try:
        other = rows_of(again, len(chosen) if job.memo.options.per_row else None, job.home)
    except NotRowsError as error:
        _fail(job, run, str(error))
    dims: TokenDims = ((),) * len(rows.layout.leaves)
    if tokens is not None:
        found = token_dims(rows.layout, width, other.layout, other_width)
        if found is None:
            _fail(job, run, "its output does not follow the number of tokens")
        dims = found
    for left, right in _comparable(rows, other, places, chosen, dims, tokens):
        if (found_difference := difference(left, right, job.site.floor)) is not None:
            _fail(job, run, found_difference)
    job.memo.let_pass(job.site.namespace, job.form, dims)
    return dims


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


def _ready_again(job: Job, chosen: list[int], width: int) -> Callable[[], object]:
    batch = _fitted(job.batch, job.keyed.tokens, width)
    whole = batch is job.batch and not job.memo.options.per_row
    taken = job.arguments if whole else job.arguments.taken(batch, chosen)
    return _prepared(job.memo.options, job.host.run, taken.args, taken.kwargs)


def _comparable(
    rows: Rows, other: Rows, places: list[int], chosen: list[int], dims: TokenDims, tokens: TokenRows | None
) -> Sequence[tuple[Rows, Rows]]:
    numbers = [places.index(place) for place in chosen]
    own = rows.take(numbers)
    if tokens is None:
        return [(own, other)]
    lengths = tokens.lengths[chosen]
    pairs = zip(unpad_rows(own, lengths, dims), unpad_rows(other, lengths, dims), strict=True)
    return [(left, right) for (_, left), (_, right) in pairs]


def _fail(job: Job, run: _Run, what: str) -> NoReturn:
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
