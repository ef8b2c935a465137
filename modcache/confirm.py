"""Run rows again that are about to be served, and make sure that they come out the same."""

from __future__ import annotations

import random

import numpy as np

from .compute import Computed, compute_again
from .errors import StaleRecordError
from .plan import CallPlan, distinct
from .precision import difference
from .rows import Rows
from .running import Job, is_out_of_memory
from .sameness import telling_rows
from .selfcheck import self_check_failed

__all__ = ["confirm", "verify"]

_chance = random.Random()  # noqa: S311 - a sample, not a secret; the user's generators stay as they are


def verify(job: Job, plan: CallPlan) -> None:
    """Recompute a share of the hits and compare.

    Raises:
        StaleRecordError: naming the row and the difference.
    """
    share = job.memo.options.verify
    served = {int(place) for part in plan.found for place in part.positions}
    places = [place for place in distinct(job.keyed.keys).values() if place in served and _chance.random() < share]
    found = _found_otherwise(job, plan, None, places) if places else None
    if found is not None:
        raise StaleRecordError(
            f"{job.memo.name}: row {found[0]} of this call is stored, but the module gives another one "
            f"now: {found[1]}. Weights were changed unnoticed, or the store was; cache_of(module).recheck() looks "
            "at all weights, cache_of(module).clear() drops the rows."
        )


def confirm(job: Job, plan: CallPlan, computed: Computed | None, names: tuple[str, ...]) -> None:
    """Run a stored row among rows that differ from it in what no self-check could show so far.

    It was computed alone, or among rows that were the same in it. One of the others is run twice: no batch has a row
    twice, so these rows were never computed together like this.

    Args:
        job: the call.
        plan: what is served.
        computed: what was computed.
        names: in what the rows of the call differ, as `sameness` names it.

    Raises:
        Bypass: a row came out otherwise, so it depends on more than itself.
    """
    memo, namespace = job.memo, job.site.namespace
    stored = int(plan.found[0].positions[0])
    others = telling_rows(job.batch, names, stored)
    try:
        found = _found_otherwise(job, plan, computed, [*others, stored, *others[:1]])
    except Exception as error:
        if is_out_of_memory(error):  # another call may tell more
            return
        raise
    if found is not None:
        raise self_check_failed(job, f"rows that are stored came out otherwise among rows of another kind: {found[1]}")
    dims = memo.findings.passed(namespace, job.form)
    if dims is not None:
        memo.let_pass(namespace, job.form, dims, memo.findings.untested(namespace, job.form).difference(names))


def _found_otherwise(job: Job, plan: CallPlan, computed: Computed | None, places: list[int]) -> tuple[int, str] | None:
    """The first of these rows that the module does not give any more as it is served, and in what it differs."""
    for numbers, fresh in compute_again(job, places):
        for own, number in enumerate(numbers.tolist()):
            differs = difference(_row(job, plan, computed, places[number]), fresh.take([own]), job.site.floor)
            if differs is not None:
                return places[number], differs
    return None


def _row(job: Job, plan: CallPlan, computed: Computed | None, place: int) -> Rows:
    """A row as it is served."""
    for part in plan.found:
        at = np.flatnonzero(part.positions == place)
        if len(at):
            return part.rows.take([int(at[0])])
    if computed is not None:
        keys = job.keyed.keys
        number = next(number for number, own in enumerate(plan.compute) if keys[own] == keys[place])
        for numbers, rows in computed.parts:
            at = np.flatnonzero(numbers == number)
            if len(at):
                return rows.take([int(at[0])])
    raise AssertionError(f"row {place} was neither found nor computed")
