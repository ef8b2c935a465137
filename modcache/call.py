"""One call of a cached module: split → keys → get → plan → compute → put → assemble."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch

from .arguments import Arguments
from .ask import batch_of, home_of, keyed_of, refuse_blocked, refuse_grad, row_count
from .batch import Batch
from .compute import Computed, compute
from .confirm import confirm, verify
from .errors import CacheMissError
from .hit import Missed, Site
from .keys.keyed import Given, Keyed
from .keys.padding import pad_rows
from .keys.parts import shared_digests
from .memo import Bypass, Memo
from .modes import current_mode
from .outputs import UnknownClassError, tree_of
from .plan import CallPlan, distinct, plan_call, rows_to_serve
from .precision import difference
from .recipe import Outline, form_of, recipe_of
from .rows import Rows, join_rows
from .running import Host, Job, Part, run_uncached, settle_quietly
from .sameness import differences
from .selfcheck import self_check_failed
from .stores import Found
from .theirs import note

__all__ = ["bypass", "call"]

_RECIPES = 1024

_UNKNOWN = object()
"""No output could be put together."""


def call(
    memo: Memo,
    site: Site,
    host: Host,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    given: Given | None,
    missed: Missed,
) -> object:
    """Serve what is stored, compute what is missing, and return what the module would have returned.

    Args:
        memo: what the calls of this module share.
        site: the state that the module is in.
        host: the module.
        args: the positional arguments.
        kwargs: the others.
        given: keys that the caller gave.
        missed: what is known of the call already.

    Raises:
        CacheMissError: rows are missing in mode "require-hit".
        StaleRecordError: a verified row was not what the module gives now.
        KeyExtractionError, UsageError: a key function or given keys cannot be right.
        Exception: whatever the module itself raises.
    """
    began = perf_counter()
    batch = None
    if missed.refused is not None and missed.recipe is not None:
        try:
            return bypass(memo, host.run, args, kwargs, Bypass(missed.refused), missed.recipe.size)
        finally:
            settle_quietly(host)
    try:
        arguments = host.bind(args, kwargs)
    except TypeError as error:
        output = run_uncached(memo.options, host.run, args, kwargs)  # raises what the module raises of wrong arguments
        advice = f"its arguments do not fit its signature ({error}), though it takes them; it runs uncached."
        return bypass(memo, host.run, args, kwargs, Bypass("arguments do not fit the signature", advice, output))
    try:
        batch = batch_of(memo.options, arguments)
        if host.grad:
            refuse_grad(arguments)
        if missed.recipe is not None and missed.keys is not None:
            recipe, found = missed.recipe, missed.found
            keyed = recipe.keyed(missed.keys, args, kwargs, given)
            job = Job(memo, site, host, arguments, batch, keyed, recipe.form, recipe.home)
            keyed_at = began
        else:
            keyed = _keyed(memo, batch, arguments, given)
            job = Job(memo, site, host, arguments, batch, keyed, form_of(batch, keyed), home_of(site, batch))
            _remember(memo, missed.outline, -1 if given is None else given.number, job)
            keyed_at = perf_counter()
            found = () if current_mode() == "refresh" else memo.get(site.namespace, keyed.keys)
        refuse_blocked(memo, site.namespace, job.form)
        return _cached(job, found, began, keyed_at)
    except Bypass as reason:
        try:
            return bypass(memo, host.run, args, kwargs, reason, None if batch is None else batch.size)
        finally:
            settle_quietly(host)


def _keyed(memo: Memo, batch: Batch, arguments: Arguments, given: Given | None) -> Keyed:
    try:
        return keyed_of(memo, batch, arguments, given)
    except OSError as error:  # a file of theirs that cannot be read
        note(error)
        raise


def _remember(memo: Memo, outline: Outline | None, number: int, job: Job) -> None:
    if outline is None or not memo.options.per_row:
        return
    if job.keyed.tokens is None and not (job.keyed.given or memo.options.extractor.reads_alike(job.batch)):
        return
    recipe = recipe_of(job.batch, job.keyed, job.form, job.home, [*job.arguments.args, *job.arguments.kwargs.values()])
    if recipe is not None:
        if len(memo.recipes) >= _RECIPES:
            memo.recipes.clear()
        memo.recipes[outline, number] = recipe


def bypass(
    memo: Memo,
    run: Callable[..., object],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    reason: Bypass,
    rows: int | None = None,
) -> object:
    """Run a call as if uncached, count it by its reason, and say once what to do about it."""
    output = reason.output if reason.ran else run_uncached(memo.options, run, args, kwargs)
    if reason.advice is not None:
        memo.say(reason.reason, reason.advice)
    count = row_count(memo.options, args, kwargs) if rows is None else rows
    memo.count(None, count, bypassed=count, reason=reason.reason)
    return output


# --- get, plan, compute, put, assemble ------------------------------------------------------------------


def _cached(job: Job, found: tuple[Found, ...], began: float, keyed_at: float) -> object:
    memo, namespace, keyed = job.memo, job.site.namespace, job.keyed
    mode = current_mode()
    unchecked = mode != "require-hit" and memo.findings.passed(namespace, job.form) is None
    untested = differences(job.batch, memo.findings.untested(namespace, job.form)) if mode != "require-hit" else ()
    ragged = keyed.tokens is not None
    plan = plan_call(keyed.keys, found, unchecked=unchecked, ragged=ragged)
    if untested and not plan.found:
        plan = plan_call(keyed.keys, (), unchecked=True, ragged=ragged)
    output = _UNKNOWN if plan.compute else _served(job, plan)
    computed = None
    looked_at = computed_at = stored_at = perf_counter()
    if output is _UNKNOWN:
        plan = plan if plan.compute else _all_rows(job, check=unchecked or bool(untested))
        if mode == "require-hit":
            raise _missing_rows(job, plan)
        plan, computed, output = _computed(job, plan)
        if found and not plan.found and keyed.tokens is None:
            _refuse_contradiction(job, found, plan, computed)
            plan, computed, output = _with_stored(job, found, plan, computed) or (plan, computed, output)
    if untested and plan.found:
        confirm(job, plan, computed, untested)
    if computed is not None:
        computed_at = perf_counter()
        if mode != "read-only" and plan.compute:
            _put(job, plan, computed)
        stored_at = perf_counter()
    if memo.options.verify and plan.found:
        verify(job, plan)
    rows, count = job.batch.size, len(plan.compute)
    seconds = keyed_at - began, looked_at - keyed_at, computed_at - looked_at, stored_at - computed_at
    memo.count(namespace, rows, rows - count, count, seconds=seconds)
    return output


def _all_rows(job: Job, *, check: bool) -> CallPlan:
    rows = tuple(distinct(job.keyed.keys).values())
    return CallPlan((), rows, check and len(rows) > 1)


def _missing_rows(job: Job, plan: CallPlan) -> CacheMissError:
    keys = job.keyed.keys
    missing = {keys[place] for place in plan.compute}
    places = [place for place, key in enumerate(keys) if key in missing]
    shown = ", ".join(map(str, places[:10])) + (", ..." if len(places) > 10 else "")
    return CacheMissError(
        f"{job.memo.name}: mode 'require-hit' asks for stored rows only, but {len(places)} of {len(keys)} are not "
        f"stored: rows {shown}. Fill the cache first; cache_of(module).explain(...) says what differs."
    )


def _computed(job: Job, plan: CallPlan) -> tuple[CallPlan, Computed, object]:
    """Compute what is planned and put it together with what was found; everything, if they do not go together."""
    computed = compute(job, list(plan.compute), check=plan.check)
    output = _assembled(job, plan, computed)
    if output is _UNKNOWN:
        plan = _all_rows(job, check=False)
        computed = compute(job, list(plan.compute), check=False)
        output = _assembled(job, plan, computed)
    if output is _UNKNOWN:
        raise AssertionError(f"{job.memo.name}: {len(plan.compute)} rows of one run do not go together")
    return plan, computed, output


def _refuse_contradiction(job: Job, found: tuple[Found, ...], plan: CallPlan, computed: Computed) -> None:
    """Rows that are stored were computed once more, among others: did they come out as before?"""
    keys = job.keyed.keys
    number = {keys[place]: index for index, place in enumerate(plan.compute)}
    for part in found:
        if _built(job.memo, part.rows, job.home) is _UNKNOWN:  # of a class that is not loaded here, say
            continue
        own = computed.parts[0][1].take([number[keys[place]] for place in part.positions.tolist()])
        differs = difference(part.rows, own, job.site.floor)
        if differs is not None:
            raise self_check_failed(job, f"rows that were stored came out otherwise in this batch: {differs}")


def _with_stored(
    job: Job, found: tuple[Found, ...], plan: CallPlan, computed: Computed
) -> tuple[CallPlan, Computed, object] | None:
    """What is stored of a whole batch that was run for the check, and passed it, stays as it is.

    Such rows were computed one by one, or an earlier run left no word of its check. ``None`` if they do not go
    together with the others.
    """
    if not computed.checked:
        return None
    number = {place: index for index, place in enumerate(plan.compute)}
    plan = plan_call(job.keyed.keys, found, unchecked=False, ragged=False)
    if not plan.found:
        return None
    fresh = computed.parts[0][1].take([number[place] for place in plan.compute])
    computed = computed._replace(parts=((np.arange(len(plan.compute)), fresh),))
    output = _assembled(job, plan, computed) if plan.compute else _served(job, plan)
    return None if output is _UNKNOWN else (plan, computed, output)


def _put(job: Job, plan: CallPlan, computed: Computed) -> None:
    memo, keys = job.memo, [job.keyed.keys[place] for place in plan.compute]
    if not computed.checked:
        memo.findings.note_unchecked(job.site.namespace, job.form, keys)
    memo.note_put(job.host.turn, job.site.namespace, keys)
    for numbers, rows in computed.parts:
        memo.put(job.site.namespace, [keys[number] for number in numbers.tolist()], rows)
    shared = shared_digests(job.batch)
    memo.recent.remember(job.site.namespace, job.keyed, shared, plan.compute)
    _say_why_they_miss(job, shared, plan.compute)


def _say_why_they_miss(job: Job, shared: tuple[tuple[str, bytes], ...], places: Sequence[int]) -> None:
    memo = job.memo
    if job.keyed.tokens is None and memo.padding.notices(job.batch, places):
        memo.say(
            "padding is part of the key",
            "rows that are stored already miss because they are padded to another length. If nothing reads outputs at "
            'masked positions, key="tokens" leaves padding out of the key.',
        )
    names = memo.shared.notices(job.batch, job.keyed, shared, places)
    if names:
        memo.say(
            "what all rows share is part of the key",
            f"rows that are stored already miss because {', '.join(names)}, which all rows of a call share, had many "
            "values in many calls. If the output does not depend on it, leave it out of the call.",
        )


# --- assembling -----------------------------------------------------------------------------------------


def _served(job: Job, plan: CallPlan) -> object:
    if len(plan.found) == 1 and job.keyed.tokens is None:
        return _built(job.memo, plan.found[0].rows, job.home)
    return _joined(job, [(part.positions, part.rows) for part in plan.found])


def _assembled(job: Job, plan: CallPlan, computed: Computed) -> object:
    if len(plan.compute) == job.batch.size and job.keyed.tokens is None:
        return _built(
            job.memo, computed.parts[0][1], job.home
        )  # the store copies, so what was computed can be handed out
    places, numbers = rows_to_serve(job.keyed.keys, plan)
    parts: list[Part] = [(part.positions, part.rows) for part in plan.found]
    for own, rows in computed.parts:
        where = np.full(len(plan.compute), -1)
        where[own] = np.arange(len(own))
        index = where[numbers]
        here = index >= 0
        parts.append((places[here], rows.take(index[here].tolist())))
    return _joined(job, parts)


def _joined(job: Job, parts: Sequence[Part]) -> object:
    """All rows in order as one output, if they fit into one layout."""
    if job.keyed.tokens is not None:
        rows = pad_rows(job.batch.size, job.keyed.tokens.width, parts)
        return _UNKNOWN if rows is None else _built(job.memo, rows, job.home)
    if len({rows.layout for _, rows in parts}) > 1:
        return _UNKNOWN
    return _built(job.memo, join_rows(job.batch.size, parts), job.home)


def _built(memo: Memo, rows: Rows, home: torch.device) -> object:
    try:
        return tree_of(rows, home, whole=not memo.options.per_row)
    except UnknownClassError:
        return _UNKNOWN
