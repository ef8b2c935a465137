"""Run a model up to the cut, and take from that what is stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..arguments import Arguments
from ..chance import preserved_randomness
from ..errors import CutError
from .alike import agree
from .axes import to_rows
from .branches import Branches
from .gates import running
from .ghosts import Origin
from .kinds import Asked, owned
from .plan import Plan, Shapes
from .runs import Capture, Reached
from .shadow import ABSENT, Shadow, Written
from .trees import Step, located, same_but_tensors

__all__ = [
    "Captured",
    "capture",
    "captured_rows",
    "not_reached",
    "refuse_feeding",
    "refuse_other_structures",
    "rows_of_capture",
    "shapes_of",
    "value_in",
]


class Captured(NamedTuple):
    """What a capture gave.

    Args:
        capture: the run.
        values: the tensors among the arguments of the cut, by place.
    """

    capture: Capture
    values: dict[Step, torch.Tensor]


def capture(
    run: Capture, shadow: Shadow, forward: Callable[..., Any], arguments: Arguments, at: str, branches: Branches
) -> Captured:
    """Run a model up to the cut, in eval mode and without grad; ``branches`` notes which way it takes.

    Raises:
        CutError: the cut was not reached.
    """
    shadow.put_in_eval()
    given, run.branches, before = owned(arguments), branches, _versions(shadow)
    try:
        with torch.inference_mode(False), torch.no_grad(), running(run), branches:
            forward(shadow.root, *given.args, **given.kwargs)
    except Reached:
        pass
    if _versions(shadow) != before:
        raise CutError(
            f"{at}: on the way to the cut, the forward writes into a parameter in place, in eval mode or as it leaves "
            "training mode, and did so now. Cut at an earlier submodule, or take that write out."
        )
    if run.arguments is None:
        raise not_reached(at, run.call, run.cut_calls)
    return Captured(run, dict(located(run.arguments)))


def _versions(shadow: Shadow) -> list[int]:
    return [value._version for value in shadow.model.parameters() if not value.is_inference()]


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


def value_in(found: Captured, source: Any) -> torch.Tensor:
    """A tensor that is stored, in a capture."""
    if isinstance(source, Origin):
        output = found.capture.outputs[source.path, source.number]
        value: torch.Tensor = dict(located(output))[source.place]
        return value
    return found.values[source]


def shapes_of(plan: Plan, found: Captured, rows: int) -> Shapes:
    """The shapes, and the values that all rows share, of a capture."""
    shared = {stored.source: value_in(found, stored.source).detach().clone() for stored in plan.shared}
    return Shapes(rows, found.capture.templates, shared)


def rows_of_capture(plan: Plan, found: Captured) -> tuple[torch.Tensor, ...]:
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


def refuse_other_structures(captures: Sequence[Captured]) -> None:
    """Look at captures of some rows each: were the same modules called, and did they give the same but for tensors?

    Raises:
        CutError: they were not.
    """
    full = captures[0].capture
    for other in (found.capture for found in captures[1:]):
        if full.templates.keys() != other.templates.keys():
            names = {path for path, _ in full.templates.keys() ^ other.templates.keys()}
            raise CutError(
                f"{', '.join(sorted(names)[:3])}: whether it is called before the cut depends on which rows are in "
                "the batch. Cut at an earlier submodule, or make the way the same for all rows."
            )
        for called, output in full.outputs.items():
            if not same_but_tensors(output, other.outputs[called]):
                raise CutError(
                    f"{called[0]}, which comes before the cut, returns beside tensors something that depends on "
                    "which rows are in the batch. Cut at an earlier submodule."
                )


def captured_rows(
    plan: Plan, shadow: Shadow, forward: Callable[..., Any], asked: Asked, part: slice, at: Branches
) -> tuple[torch.Tensor, ...]:
    """What would be stored of some rows of a call."""
    places = range(asked.batch.size)[part]
    taken = asked.arguments.taken(asked.batch, places) if len(places) < asked.batch.size else asked.arguments
    with preserved_randomness():
        run = Capture(plan.call, plan.extras)
        return rows_of_capture(plan, capture(run, shadow, forward, taken, plan.at, at))


def refuse_feeding(plan: Plan, shadow: Shadow, forward: Callable[..., Any], asked: Asked, written: Written) -> None:
    """A forward set an attribute that none of the probe did: does that feed the cut?

    Raises:
        CutError: it does, so what is stored belongs to a value that is gone.
    """
    fields, name = vars(written.module), written.name
    now = fields[name]

    def rows() -> tuple[torch.Tensor, ...]:
        return captured_rows(plan, shadow, forward, asked, slice(None), Branches())

    try:
        fields[name] = written.before
        if written.before is ABSENT:
            del fields[name]
        before = rows()
    finally:
        fields[name] = now
    after = rows()
    if _same(before, after) or (not _same(after, rows()) and all(map(agree, before, after))):
        return
    shadow.written.discard((id(written.module), name))
    raise CutError(
        f"{plan.at}: the forward sets the attribute {name} of a {type(written.module).__name__}, which feeds the cut, "
        "so what is stored is of a state that is gone. Cut at an earlier submodule, or do not set it in the forward."
    )


def _same(rows: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> bool:
    return all(
        one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
        for one, other in zip(rows, others, strict=True)
    )
