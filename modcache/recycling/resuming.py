"""One call of a recycled model: rows of the trunk from the store, then the model's own forward from the cut on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ..arguments import Arguments
from ..errors import CutError
from ..fingerprint import context
from ..memo import Bypass
from ..selfcheck import preserved_randomness
from .axes import from_rows
from .branches import Branch, Branches
from .captures import capture, refuse_coupled, refuse_feeding, refuse_other_rows, rows_of_capture, shapes_of
from .ghosts import Ghost, Origin, unwrapped
from .kinds import Asked, first_row, inputs_of, owned, rows_in, with_inputs
from .plan import Plan, Shapes
from .runs import Capture, Resume
from .shadow import Shadow, running
from .trees import fill_inside, mapped
from .trunk import Parted, capturing

__all__ = ["Call", "Resuming", "inputs_of_trunk"]

_SIZES = 512


class Call(NamedTuple):
    """One call, and what it is resumed with.

    Args:
        asked: the call.
        plan: how calls of its kind are parted.
        parted: the trunk.
        shadow: of the model, in this thread.
        forward: the model's own.
        keys: keys of the rows that the caller gave.
    """

    asked: Asked
    plan: Plan
    parted: Parted
    shadow: Shadow
    forward: Callable[..., Any]
    keys: Any


class Resuming:
    """What calls of a recycled model remember of each other: shapes before the cut, and ways to it that were looked at.

    Args:
        cut_requires_grad: whether tensors at the cut require grad.
    """

    def __init__(self, cut_requires_grad: bool) -> None:
        self._cut_requires_grad = cut_requires_grad
        self._shapes: dict[tuple[object, ...], Shapes] = {}
        self._ways: dict[tuple[object, ...], set[Branch]] = {}

    def looked_at(self, asked: Asked, ways: frozenset[Branch]) -> None:
        """A probe looked at these ways."""
        self._ways.setdefault(asked.kind, set()).update(ways)

    def forget(self) -> None:
        """The model is another one."""
        self._shapes.clear()

    def __call__(self, call: Call) -> Any:
        """What the model gives."""
        given, plan = call.asked.arguments, call.plan
        kept = owned(given)  # the model's own code may take things out of what it is given, and is yet to be given it
        asked = call.asked._replace(arguments=kept)
        call = call._replace(asked=asked)
        known = self._ways.setdefault(asked.kind, set())
        ways, made = Branches(known), list[Shapes]()
        inputs = inputs_of(asked, plan.wanted)

        def run(given: dict[str, Any]) -> Any:
            whole = all(given.get(path) is value for path, value in inputs.items())
            arguments = asked.arguments if whole else with_inputs(asked, given, rows_in(asked, given))
            with preserved_randomness():  # what a hit does not draw, a miss must not draw either
                found = capture(Capture(plan.call, plan.extras), call.shadow, call.forward, arguments, plan.at, ways)
            if not made and _fits(asked, given):
                made.append(shapes_of(plan, found, rows_in(asked, given)))
            rows = rows_of_capture(plan, found)
            if ways.new:
                if asked.batch.size == 1:  # alone it is right, but nobody knows of it among others
                    raise Bypass("took a new way alone", None, rows)
                refuse_coupled(plan, call.shadow, call.forward, asked, ways)
                known.update(ways.new)
                ways.new.clear()
            return rows

        with capturing(run):
            trunk = call.parted.trunk
            stored = call.parted.attached.forward(trunk, type(trunk), (), inputs_of_trunk(plan, asked, call.keys))
            ways.new.clear()  # those of a row that was alone
            shapes = self._shapes_of(call, made, run, inputs)
        output = self._head(call, given, shapes, stored, ways)
        if ways.new:
            refuse_other_rows(plan, call.shadow, call.forward, asked, stored)
            if asked.batch.size > 1:
                refuse_coupled(plan, call.shadow, call.forward, asked, ways)
                known.update(ways.new)
        return output

    def _shapes_of(
        self, call: Call, made: list[Shapes], run: Callable[[dict[str, Any]], Any], inputs: Mapping[str, Any]
    ) -> Shapes:
        """Shapes are those of the latest capture, or of an earlier one of the same sizes and state, or of one row."""
        asked = call.asked
        sizes = (asked.kind, asked.sizes, context(), call.parted.attached.state)
        shapes = self._shapes.get(sizes)
        if shapes is None or (made and call.plan.shared):
            if not made:
                try:
                    run({path: first_row(asked, path, value) for path, value in inputs.items()})
                except Bypass:  # of a row that is alone: its shapes are known all the same
                    assert made
            if len(self._shapes) >= _SIZES:
                self._shapes.clear()
            shapes = self._shapes[sizes] = made[0]
        return shapes

    def _head(self, call: Call, arguments: Arguments, shapes: Shapes, stored: Any, ways: Branches) -> Any:
        plan, shadow = call.plan, call.shadow
        tensors: dict[Any, torch.Tensor] = {source: value.clone() for source, value in shapes.shared.items()}
        for kept, rows in zip(plan.per_row, stored, strict=True):
            assert kept.axis is not None
            tensors[kept.source] = from_rows(rows, kept.axis)
        if self._cut_requires_grad and torch.is_grad_enabled():
            for value in tensors.values():
                if value.is_floating_point():
                    value.requires_grad_()
        run = Resume(
            plan.call,
            shapes.scaled(plan, call.asked.batch.size),
            plan.live,
            plan.twins,
            {source: value for source, value in tensors.items() if not isinstance(source, Origin)},
            {source: value for source, value in tensors.items() if isinstance(source, Origin)},
        )
        run.branches, run.fires = ways, plan.fires
        shadow.take_over()
        shadow.skipped = plan.skipped
        try:
            with running(run):
                run.watch()
                try:
                    output = call.forward(shadow.root, *arguments.args, **arguments.kwargs)
                finally:
                    run.unwatch()
                output = mapped(output, unwrapped, Ghost)
                fill_inside(output, unwrapped, Ghost)
        except Exception:
            if run.error is not None:
                raise run.error from None
            raise
        finally:
            news = shadow.hand_back()
        if run.error is not None:
            raise run.error
        if not run.reached:
            raise CutError(
                f"{plan.at} was not called on this call, though it was when such a call was probed: it is skipped "
                "by chance (layer drop), in training, or by values. Switch that off, or cut at another submodule."
            )
        for new in news:
            refuse_feeding(plan, shadow, call.forward, call.asked, new)
        return output


def inputs_of_trunk(plan: Plan, asked: Asked, keys: Any) -> dict[str, Any]:
    """What a trunk is called with: the inputs that feed it, the kind of call, and given keys."""
    named = {} if keys is None else {"cache_keys": keys}
    return {**inputs_of(asked, plan.wanted), "call of the kind": plan.tag, **named}


def _fits(asked: Asked, given: Mapping[str, Any]) -> bool:
    """Whether rows have the sizes that they were given with: token rows are trimmed."""
    for column in asked.batch.columns:
        value = given.get(column.path)
        if isinstance(value, torch.Tensor) and value.shape[1:] != column.value.shape[1:]:
            return False
    return True
