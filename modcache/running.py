"""Run the module: on the call as it is, or on some of its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from .arguments import Arguments, Binder
from .batch import Batch, tensors_in
from .chance import preserved_randomness
from .contents import contents_of, is_changed
from .hit import Site
from .keys.keyed import Keyed
from .keys.padding import fit_tokens
from .keys.tokens import TokenRows
from .memo import Bypass, Memo, Options
from .modes import without_given_keys
from .recipe import Form
from .rows import Rows
from .theirs import noting

__all__ = [
    "Host",
    "Job",
    "Part",
    "Run",
    "apart",
    "fitted",
    "is_out_of_memory",
    "prepared",
    "run_rows",
    "run_uncached",
    "settle_quietly",
]

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
        undisturbed: opened around a run that the user did not ask for, it leaves what the module notes as it was.
    """

    run: Callable[..., object]
    bind: Binder
    settle: Callable[[], str | None]
    grad: bool
    turn: int
    undisturbed: Callable[[], AbstractContextManager[None]] = nullcontext


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


class Run(NamedTuple):
    """One run of the module: what it returned, and whether on the very arguments of the call."""

    output: object
    whole: bool
    rows: int


def run_uncached(
    options: Options, run: Callable[..., object], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> object:
    """The module on these arguments, prepared if that is asked for."""
    return prepared(options, run, args, kwargs)()


def prepared(
    options: Options, run: Callable[..., object], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Callable[[], object]:
    """The run that is left when ``prepare`` is done: what it gave is positional, keywords, or one argument."""
    if options.prepare is None:
        return partial(run, *args, **kwargs)
    inputs = noting(options.prepare)(*args, **kwargs)
    if isinstance(inputs, tuple) and not hasattr(inputs, "_fields"):
        return partial(run, *inputs)
    if isinstance(inputs, Mapping):
        return partial(run, **inputs)
    return partial(run, inputs)


def fitted(batch: Batch, tokens: TokenRows | None, width: int) -> Batch:
    """The batch padded to so many tokens; the very same one where it is that wide, or has no tokens."""
    return batch if tokens is None or width == tokens.width else fit_tokens(batch, tokens, width)


def run_rows(job: Job, places: list[int], width: int) -> Run:
    """Run the module on some rows; on the very arguments of the call if these are all its rows in order."""
    arguments = job.arguments
    batch = fitted(job.batch, job.keyed.tokens, width)
    whole = batch is job.batch and places == list(range(batch.size))
    taken = arguments if whole else arguments.taken(batch, places)
    unknown = job.memo.findings.passed(job.site.namespace, job.form) is None
    before, contents = _versions(taken), contents_of(dict(taken.bound())) if unknown else []
    try:
        ready = prepared(job.memo.options, job.host.run, taken.args, taken.kwargs)
    except Exception as error:
        if whole:
            raise
        _only_whole_batches(job, error, None)
    try:
        output = ready() if whole else apart(ready)
    except Exception as error:
        if whole or is_out_of_memory(error):
            settle_quietly(job.host)
            raise
        _only_whole_batches(job, error, ready)
    if before != _versions(taken) or is_changed(contents):
        job.memo.block(job.form, "writes into its input")
        raise Bypass(
            "writes into its input",
            "its forward changes an input in place, which a stored row would not do; it runs uncached from now on. "
            "Clone the input inside of the module.",
            *((output,) if whole else ()),
        )
    return Run(output, whole, len(places))


def _versions(arguments: Arguments) -> list[int]:
    return [tensor._version for tensor in tensors_in(dict(arguments.bound())) if not tensor.is_inference()]


def is_out_of_memory(error: Exception) -> bool:
    """Whether it says nothing of the rows: fewer of them may well fit."""
    return isinstance(error, MemoryError) or "out of memory" in str(error)


def _only_whole_batches(job: Job, error: Exception, ready: Callable[[], object] | None) -> NoReturn:
    """Something failed on a part of the batch: does it on the whole? Then it is no matter of rows.

    What fails once (a file, a service, a time that is up) says nothing; a forward is judged when it fails again.

    Args:
        job: the call.
        error: what was raised.
        ready: runs the forward on the part once more; ``None`` where ``prepare`` failed.
    """
    arguments = job.arguments
    try:
        output = run_uncached(job.memo.options, job.host.run, arguments.args, arguments.kwargs)
    except Exception:
        settle_quietly(job.host)
        raise
    reason = "fails on some of its rows"
    culprit = "prepare" if ready is None else "forward"
    what = f"its {culprit} raised {type(error).__name__} on some of its rows ({error}), but not on the whole batch"
    if ready is None or _runs_now(job, ready):
        raise Bypass(reason, f"{what}; that call ran uncached.", output) from None
    job.memo.block(job.form, reason)
    raise Bypass(
        reason,
        f"{what}; it runs uncached from now on. If an argument is the same for all rows, name it in broadcast=.",
        output,
    ) from None


def settle_quietly(host: Host) -> None:
    """What a forward noted on itself that failed, or whose rows are not stored, is no other state of the module."""
    with suppress(Exception):  # the user is to get what the forward gave or raised
        host.settle()


def _runs_now(job: Job, ready: Callable[[], object]) -> bool:
    try:
        with preserved_randomness(), job.host.undisturbed():
            apart(ready)
    except Exception:
        return False
    return True


def apart(ready: Callable[[], object]) -> object:
    """Run on a part of the batch, where keys that were given for the whole batch fit nothing inside."""
    with without_given_keys():
        return ready()
