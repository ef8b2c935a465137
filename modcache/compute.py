"""Compute the rows that are missing, checked where nothing is known yet of such calls."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import numpy as np

from .batch import tensors_in
from .chance import preserved_randomness, random_state
from .findings import NOT_ROWS
from .keys.padding import unpad_rows
from .manifests import TokenDims
from .memo import Bypass
from .outputs import NotRowsError, rows_of
from .rows import Rows
from .running import Job, Part, Run, run_rows
from .selfcheck import self_check, stays_steady

__all__ = ["Computed", "compute", "compute_again"]


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
        found = self_check(job, places, rows, run, width, draws=draws)
        dims = dims if found is None and tokens is not None else found
    elif unknown and (not draws or stays_steady(job, places, rows, run, width, ((),) * len(rows.layout.leaves))):
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
        if run.rows > 1 and "needs grad" not in str(error):  # in another call one row is not squeezed, and no grad
            job.memo.findings.note_not_rows(job.site.namespace, job.form)
        raise Bypass(
            NOT_ROWS,
            f"{error}; it runs uncached. {_remedy(str(error))}",
            *((run.output,) if run.whole else ()),
        ) from None


def _remedy(error: str) -> str:
    if "needs grad" in error:
        return "If that is not trained, call requires_grad_(False) on it, or the module under torch.no_grad()."
    if "past_key_values" in error:
        return "Call it with use_cache=False, which leaves that out."
    return (
        "Cache a submodule, or a module of your own around it, whose output has one row per input, or give "
        "per_row=False if it has no batch dimension."
    )


def _weights_moved(job: Job, run: Run, name: str) -> NoReturn:
    """Rows of a forward that changed its own weights belong to no state."""
    advice = None
    if job.memo.note_moved():
        job.memo.block(job.form, "changes its own weights")
        advice = (
            f"its forward keeps changing {name}, so no row stays valid; it runs uncached from now on. Take that out of "
            "the forward, or cache a submodule."
        )
    raise Bypass("changes its own weights", advice, *((run.output,) if run.whole else ()))


def _give_up(run: Run) -> NoReturn:
    """Nothing can be told from this batch; the next one may tell more."""
    raise Bypass("undecided", None, *((run.output,) if run.whole else ()))
