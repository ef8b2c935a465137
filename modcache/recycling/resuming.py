"""One call of a recycled model: rows of the trunk from the store, then the model's own forward from the cut on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from ..arguments import Arguments
from ..chance import preserved_randomness
from ..errors import CutError
from ..fingerprint import context
from ..memo import Bypass
from .axes import from_rows
from .branches import Branches, Way, Ways
from .captures import capture, refuse_feeding, rows_of_capture, shapes_of
from .ghosts import Ghost, Origin, unwrapped
from .kinds import Asked, first_row, owned, rows_in, with_inputs
from .plan import Plan, Shapes
from .proving import Proof, Sample, sample_of
from .runs import Capture, Resume
from .shadow import Shadow, running
from .trees import Step, fill_inside, mapped
from .trunk import Parted, Trunk, capturing

__all__ = ["Call", "Resuming", "given_to_trunk"]

_SIZES = 512
_SAMPLED = 8
_SAMPLES = 8

_Sizes = tuple[object, ...]
"""What shapes before the cut depend on: the kind of call, the sizes of its inputs, the context, the trunk's state."""


class Call(NamedTuple):
    """One call, and what it is resumed with.

    Args:
        asked: the call.
        plan: how calls of its kind are parted.
        parted: the trunk.
        shadow: of the model, in this thread.
        forward: the model's own.
        inputs: those that feed the cut, by path.
        keys: keys of the rows that the caller gave.
    """

    asked: Asked
    plan: Plan
    parted: Parted
    shadow: Shadow
    forward: Callable[..., Any]
    inputs: Mapping[str, Any]
    keys: Any


class _RefusedError(BaseException):
    """Carries an error past those who would take it for one of some rows, and run the trunk on all of them."""

    def __init__(self, error: CutError) -> None:
        super().__init__()
        self.error = error


class Resuming:
    """What calls of a recycled model remember of each other: shapes before the cut, and ways to it that were looked at.

    Args:
        cut_requires_grad: whether tensors at the cut require grad.
    """

    def __init__(self, cut_requires_grad: bool) -> None:
        self._cut_requires_grad = cut_requires_grad
        self._shapes: dict[_Sizes, Shapes] = {}
        self._ways: dict[tuple[object, ...], Ways] = {}
        self._samples: dict[_Sizes, list[Sample]] = {}

    def looked_at(self, asked: Asked, ways: frozenset[Way]) -> None:
        """A probe looked at these ways."""
        self._ways.setdefault(asked.kind, Ways()).learn(ways)

    def forget(self) -> None:
        """The model is another one."""
        self._shapes.clear()
        self._samples.clear()

    def __call__(self, call: Call) -> Any:
        """What the model gives."""
        asked, plan, inputs = call.asked, call.plan, call.inputs
        given = asked.arguments
        kept = owned(given)  # the model's own code may take things out of what it is given, and is yet to be given it
        if kept is not given:
            asked = asked._replace(arguments=kept)
            call = call._replace(asked=asked)
        known = self._ways.get(asked.kind) or self._ways.setdefault(asked.kind, Ways())
        ways, made, looked = Branches(known), list[Shapes](), False

        def run(given: dict[str, Any]) -> Any:
            nonlocal looked
            whole = all(given.get(path) is value for path, value in inputs.items())
            arguments = asked.arguments if whole else with_inputs(asked, given, rows_in(asked, given))
            with preserved_randomness():  # what a hit does not draw, a miss must not draw either
                found = capture(Capture(plan.call, plan.extras), call.shadow, call.forward, arguments, plan.at, ways)
            if not made and _fits(asked, given):
                made.append(shapes_of(plan, found, rows_in(asked, given)))
            rows = rows_of_capture(plan, found)
            if ways.new:
                looked = True
                try:
                    if not self._proved(call, ways, given, rows):
                        raise Bypass("took a new way alone", None, rows)
                except CutError as error:
                    raise _RefusedError(error) from None
            return rows

        try:
            with capturing(run):
                trunk = call.parted.trunk
                stored = call.parted.attached.forward(trunk, Trunk, (), given_to_trunk(plan, inputs, call.keys))
                ways.new.clear()  # those of a row that was alone
                sizes = _sizes_of(call)
                shapes = self._shapes_of(call, sizes, made, run)
        except _RefusedError as refused:
            raise refused.error from None
        output = self._head(call, given, shapes, stored, ways)
        if ways.new:
            looked = True
            self._proof(call, ways).refuse_other(stored)
            self._proved(call, ways)
        if known.by_values and asked.batch.size > 1:
            self._remember(call, sizes, stored, anew=looked)
        return output

    def _proved(self, call: Call, ways: Branches, given: Mapping[str, Any] | None = None, rows: Any = None) -> bool:
        """Whether rows come out the same on new ways, which are known from now on.

        A row that is alone is right, but nobody knows of it among others.

        Raises:
            CutError: they do not.
        """
        samples = [sample for sample in self._samples_of(_sizes_of(call)) if sample.goes_with(call.asked)]
        if call.asked.batch.size + len(samples) < 2:
            return False
        self._proof(call, ways).refuse_coupled(samples, given, rows)
        self._ways[call.asked.kind].learn(ways.new)
        ways.new.clear()
        return True

    def _remember(self, call: Call, sizes: _Sizes, stored: Any, *, anew: bool) -> None:
        """Keep a row of a batch, one for each new way: rows on other ways are to be the same beside it."""
        samples = self._samples_of(sizes)
        if (anew or not samples) and len(samples) < _SAMPLES:
            samples.extend(filter(None, [sample_of(call.asked, stored)]))

    def _proof(self, call: Call, ways: Branches) -> Proof:
        tokens = call.parted.attached.memo.options.extractor.name == "tokens"
        return Proof(call.plan, call.shadow, call.forward, call.asked, ways, tokens=tokens)

    def _samples_of(self, sizes: _Sizes) -> list[Sample]:
        """Rows of earlier batches of the same sizes and state."""
        found = self._samples.get(sizes)
        if found is None:
            if len(self._samples) >= _SAMPLED:
                self._samples.clear()
            found = self._samples[sizes] = []
        return found

    def _shapes_of(self, call: Call, sizes: _Sizes, made: list[Shapes], run: Callable[[dict[str, Any]], Any]) -> Shapes:
        """Shapes are those of the latest capture, or of an earlier one of the same sizes and state, or of one row."""
        shapes = self._shapes.get(sizes)
        if shapes is None or (made and call.plan.shared):
            if not made:
                try:
                    run({path: first_row(call.asked, path, value) for path, value in call.inputs.items()})
                except Bypass:  # of a row that is alone: its shapes are known all the same
                    assert made
            if len(self._shapes) >= _SIZES:
                self._shapes.clear()
            shapes = self._shapes[sizes] = made[0]
        return shapes

    def _head(self, call: Call, arguments: Arguments, shapes: Shapes, stored: Any, ways: Branches) -> Any:
        plan, shadow = call.plan, call.shadow
        values: dict[Step, torch.Tensor] = {}
        extras: dict[Origin, torch.Tensor] = {}
        for source, value in _stored_tensors(plan, shapes, stored):
            if self._cut_requires_grad and torch.is_grad_enabled() and value.is_floating_point():
                value.requires_grad_()
            if isinstance(source, Origin):
                extras[source] = value
            else:
                values[source] = value
        run = Resume(plan.call, shapes.scaled(plan, call.asked.batch.size), plan.live, plan.twins, values, extras)
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
                if not run.reached and run.error is None:
                    raise run.failed(_not_called(plan))
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
        for new in news:
            refuse_feeding(plan, shadow, call.forward, call.asked, new)
        return output


def _not_called(plan: Plan) -> CutError:
    return CutError(
        f"{plan.at} was not called on this call, though it was when such a call was probed: it is skipped by chance "
        "(layer drop), in training, or by values. Switch that off, or cut at another submodule."
    )


def _stored_tensors(plan: Plan, shapes: Shapes, stored: Any) -> Iterator[tuple[Step | Origin, torch.Tensor]]:
    """What a resumed call needs, as the model had it."""
    for source, value in shapes.shared.items():
        yield source, value.clone()
    for kept, rows in zip(plan.per_row, stored, strict=True):
        assert kept.axis is not None
        yield kept.source, from_rows(rows, kept.axis)


def given_to_trunk(plan: Plan, inputs: Mapping[str, Any], keys: Any) -> dict[str, Any]:
    """What a trunk is called with: the inputs that feed it, the kind of call, and given keys."""
    given = {**inputs, "call of the kind": plan.tag}
    if keys is not None:
        given["cache_keys"] = keys
    return given


def _sizes_of(call: Call) -> _Sizes:
    return call.asked.kind, call.asked.sizes, context(), call.parted.attached.state


def _fits(asked: Asked, given: Mapping[str, Any]) -> bool:
    """Whether rows have the sizes that they were given with: token rows are trimmed."""
    for column in asked.batch.columns:
        value = given.get(column.path)
        if isinstance(value, torch.Tensor) and value.shape[1:] != column.value.shape[1:]:
            return False
    return True
