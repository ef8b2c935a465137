"""Run a model up to the cut, and take from that what is stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..arguments import Arguments
from ..errors import CutError
from ..selfcheck import preserved_randomness
from .axes import agree, to_rows
from .branches import Branches
from .ghosts import Origin
from .kinds import Asked
from .plan import Plan, Shapes
from .runs import Capture, Reached
from .shadow import Shadow, running
from .trees import Step, located

__all__ = [
    "Found",
    "capture",
    "not_reached",
    "refuse_coupled",
    "refuse_other_rows",
    "rows_of_capture",
    "shapes_of",
    "value_in",
]


class Found(NamedTuple):
    """What a capture gave.

    Args:
        capture: the run.
        values: the tensors among the arguments of the cut, by place.
    """

    capture: Capture
    values: dict[Step, torch.Tensor]


def capture(
    run: Capture, shadow: Shadow, forward: Callable[..., Any], arguments: Arguments, at: str, branches: Branches
) -> Found:
    """Run a model up to the cut, in eval mode and without grad; ``branches`` notes which way it takes.

    Raises:
        CutError: the cut was not reached.
    """
    shadow.take_over(training=False)
    try:
        with torch.inference_mode(False), torch.no_grad(), running(run), branches:
            forward(shadow.root, *arguments.args, **arguments.kwargs)
    except Reached:
        pass
    if run.arguments is None:
        raise not_reached(at, run.call, run.cut_calls)
    return Found(run, dict(located(run.arguments)))


def not_reached(at: str, call: int, calls: int) -> CutError:
    """The cut was not reached; to be raised."""
    if calls:
        return CutError(
            f"{at} is called {calls} time{'s' if calls > 1 else ''} in this forward: there is no call={call} of it. "
            f"Give a lower call= (the first is 0)."
        )
    return CutError(
        f"{at} is not called in this forward, so the model cannot be cut there. Cut at a submodule that is called (one "
        "of its children, or what calls it)."
    )


def value_in(found: Found, source: Any) -> torch.Tensor:
    """A tensor that is stored, in a capture."""
    if isinstance(source, Origin):
        output = found.capture.outputs[source.path, source.number]
        value: torch.Tensor = dict(located(output))[source.place]
        return value
    return found.values[source]


def shapes_of(plan: Plan, found: Found, rows: int) -> Shapes:
    """The shapes, and the values that all rows share, of a capture."""
    shared = {stored.source: value_in(found, stored.source).detach().clone() for stored in plan.shared}
    return Shapes(rows, found.capture.templates, shared)


def rows_of_capture(plan: Plan, found: Found) -> tuple[torch.Tensor, ...]:
    """The tensors of the records, rows first.

    Raises:
        CutError: a tensor that is to be stored did not come.
    """
    tensors = []
    for stored in plan.per_row:
        try:
            value = value_in(found, stored.source)
        except KeyError:
            raise CutError(f"{plan.at}: {stored} is not given on this call. Cut at an earlier submodule.") from None
        assert stored.axis is not None
        tensors.append(to_rows(value.detach(), stored.axis))
    return tuple(tensors)


def refuse_coupled(plan: Plan, shadow: Shadow, forward: Callable[..., Any], asked: Asked, at: Branches) -> None:
    """Look at a batch that took a way that was never looked at: do its rows come out the same among others?

    Raises:
        CutError: they do not.
    """
    count = asked.batch.size
    parts = [list(range(count)), list(range(0, count, 2)), list(range(1, count, 2))]
    with preserved_randomness():
        full, even, odd = (
            rows_of_capture(plan, capture(Capture(plan.call, plan.extras), shadow, forward, taken, plan.at, at))
            for taken in (asked.arguments.taken(asked.batch, places) for places in parts)
        )
    for stored, rows, some, rest in zip(plan.per_row, full, even, odd, strict=True):
        fits = some.shape[1:] == rest.shape[1:] == rows.shape[1:]
        if not fits or not (agree(rows[::2], some, plan.floor) and agree(rows[1::2], rest, plan.floor)):
            raise CutError(
                f"{plan.at}: on the way to the cut the model decides by values of the whole batch, and {stored} comes "
                "out otherwise for a row among other rows. Cut at an earlier submodule, or make the way the same."
            )


def refuse_other_rows(
    plan: Plan, shadow: Shadow, forward: Callable[..., Any], asked: Asked, stored: tuple[torch.Tensor, ...]
) -> None:
    """A single row took a way that was never looked at: is it what is stored of it?

    Raises:
        CutError: it is not.
    """
    with preserved_randomness():
        found = capture(Capture(plan.call, plan.extras), shadow, forward, asked.arguments, plan.at, Branches())
    for kept, old, new in zip(plan.per_row, stored, rows_of_capture(plan, found), strict=True):
        if not agree(old, new, plan.floor):
            raise CutError(
                f"{plan.at}: on the way to the cut the model decides by values, and {kept} comes out otherwise for a "
                "row alone than among others. Cut at an earlier submodule, or make the way the same."
            )
