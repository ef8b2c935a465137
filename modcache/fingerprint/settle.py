"""Tell what a forward left behind: bookkeeping of its own, or weights that it moved."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Protocol

import torch

from .weights import Weights, leaf_digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from .walk import Walk
    from .watch import Watch


@dataclasses.dataclass(frozen=True, slots=True)
class Changes:
    """What differs after a forward."""

    bookkeeping: frozenset[str]
    moved: str | None


class Before(Protocol):
    """What must be known of the time before."""

    @property
    def fields(self) -> dict[str, bytes]:
        """Bytes read at each named place."""

    @property
    def raw(self) -> dict[str, object]:
        """The plain attributes themselves."""

    @property
    def buffers(self) -> frozenset[str]:
        """Names of the registered buffers."""


def changes(old: Watch, before: Before, found: Walk, new: Watch, weights: Weights) -> Changes:
    """Compare two looks at a module, one before and one after a forward."""
    replaced = {
        place for place in {*before.raw, *found.raw} if before.raw.get(place, old) is not found.raw.get(place, old)
    }
    differing = _differing(before.fields, found.seen.fields)
    places = replaced | {place for place in _deepest(differing) if not _inside(place, replaced)}
    moved = None
    written = old.written()
    was = {name: (at, leaf) for at, (name, leaf) in enumerate(zip(old.names, old.leaves, strict=True))}
    for at, (name, leaf) in enumerate(zip(new.names, new.leaves, strict=True)):
        if _inside(name, places) or name in places:
            continue
        before_at, same = was.get(name, (-1, None))
        if same is leaf and before_at not in written and old.stamp(before_at) == new.stamp(at):
            continue
        if _counts_calls(name, leaf, before.buffers):
            places.add(name)
        elif moved is None and (name not in was or leaf_digest(leaf) != weights.known(was[name][1])):
            moved = name
    gone = next((name for name in was if name not in new.names and name not in places), None)
    return Changes(frozenset(places), moved or gone)


def _counts_calls(name: str, leaf: object, buffers: frozenset[str]) -> bool:
    """An integer buffer of one element, like BatchNorm's count of batches."""
    return name in buffers and isinstance(leaf, torch.Tensor) and leaf.numel() == 1 and not leaf.is_floating_point()


def _differing(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> set[str]:
    return {place for place in {*before, *after} if before.get(place) != after.get(place)}


def _deepest(places: Iterable[str]) -> set[str]:
    """Those that do not merely differ because something inside them does."""
    found = set(places)
    return {place for place in found if not any(other != place and _within(other, place) for other in found)}


def _within(inner: str, outer: str) -> bool:
    return inner.startswith(outer) and inner[len(outer) : len(outer) + 1] in (".", "[", " ")


def _inside(place: str, outers: Iterable[str]) -> bool:
    return any(_within(place, outer) for outer in outers)
