"""Decide what a call computes and what it serves, from its keys and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .stores import Found

__all__ = ["CallPlan", "distinct", "plan_call", "rows_to_serve"]


@dataclass(frozen=True, slots=True)
class CallPlan:
    """What one call does.

    Args:
        found: rows to serve from the store.
        compute: the first row of each distinct key that is to be computed.
        check: whether computing is followed by the self-check, because nothing is known yet of calls of this form.
    """

    found: tuple[Found, ...]
    compute: tuple[int, ...]
    check: bool


def distinct(keys: Sequence[bytes]) -> dict[bytes, int]:
    """The first row of each key, in order of the rows."""
    first: dict[bytes, int] = {}
    for place, key in enumerate(keys):
        first.setdefault(key, place)
    return first


def plan_call(keys: Sequence[bytes], found: tuple[Found, ...], *, unchecked: bool, ragged: bool) -> CallPlan:
    """Decide what to serve and what to compute.

    Args:
        keys: one per row.
        found: what the store gave.
        unchecked: calls of this form were not yet checked for rows that depend on each other; then a batch of
            several rows is computed as a whole, for rows that were stored one by one say nothing about it.
        ragged: rows of several layouts may stand in one batch (they are padded when they are assembled).
    """
    if len(found) > 1 and not ragged:
        found = ()
    if unchecked and len(keys) > 1:
        return CallPlan((), tuple(distinct(keys).values()), check=True)
    missing = _missing(keys, found)
    return CallPlan(found, missing, check=False)


def _missing(keys: Sequence[bytes], found: tuple[Found, ...]) -> tuple[int, ...]:
    if not found:
        return tuple(distinct(keys).values())
    if sum(len(part.positions) for part in found) == len(keys):
        return ()
    left = np.ones(len(keys), bool)
    for part in found:
        left[part.positions] = False
    places = np.flatnonzero(left).tolist()
    return tuple(places[number] for number in distinct([keys[place] for place in places]).values())


def rows_to_serve(keys: Sequence[bytes], plan: CallPlan) -> tuple[np.ndarray, np.ndarray]:
    """Where computed rows go: the places that the store did not answer, and for each the number of its computed row."""
    number = {keys[place]: index for index, place in enumerate(plan.compute)}
    left = np.ones(len(keys), bool)
    for part in plan.found:
        left[part.positions] = False
    places = np.flatnonzero(left)
    return places, np.fromiter((number[keys[place]] for place in places.tolist()), np.int64, len(places))
