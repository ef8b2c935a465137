"""One call of a recycled model: rows of the trunk from the store, then the model's own forward from the cut on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ..chance import preserved_randomness
from ..errors import CutError
from ..fingerprint import context
from ..memo import Bypass
from .axes import from_rows
from .branches import Branches, Ways
from .captures import capture, refuse_feeding, rows_of_capture, shapes_of
from .forms import Form
from .gates import called_in
from .ghosts import Ghost, Origin, unwrapped
from .kinds import Asked, first_row, rows_in, with_inputs
from .plan import Plan, Shapes
from .proving import Proof, Sample, sample_of
from .runs import Capture, Resume
from .shadow import Shadow
from .trees import Step, fill_inside, mapped

__all__ = ["Call", "Resuming", "given_to_trunk"]

_SIZES = 512
_STATES = 16
_SAMPLED = 8
_SAMPLES = 8

_Sizes = tuple[object, ...]
"""What shapes before the cut depend on: the kind of call, the sizes of its inputs, the context, the trunk's state."""


class Call:
    """One call, and what it is resumed with.

    Args:
        form: what is known of all calls like it.
        asked: as it was looked at, or what does that.
        shadow: of the model, in this thread.
        forward: the model's own.
        inputs: those that feed the cut, by path.
        keys: keys of the rows that the caller gave.
    """

    __slots__ = ("_asked", "form", "forward", "inputs", "keys", "looked", "made", "shadow", "ways")

    def __init__(
        self,
        form: Form,
        asked: Asked | Callable[[], Asked],
        shadow: Shadow,
        forward: Callable[..., Any],
        inputs: Mapping[str, Any],
        keys: Any,
    ) -> None:
        self.form, self._asked, self.shadow, self.forward = form, asked, shadow, forward
        self.inputs, self.keys = inputs, keys
        self.ways = Branches(form.ways)
        self.made: Shapes | None = None
        self.looked = False

    @property
    def asked(self) -> Asked:
        """The call as rows, in lists and mappings of its own."""
        if not isinstance(self._asked, Asked):
            self._asked = self._asked()
        return self._asked


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

    def ways(self, kind: tuple[object, ...]) -> Ways:
        """The ways to the cut that were looked at in calls of this kind."""
        return self._ways.get(kind) or self._ways.setdefault(kind, Ways())

    def forget(self) -> None:
        """The model is another one."""
        self._shapes.clear()
        self._samples.clear()

    def __call__(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the model gives."""
        form, ways = call.form, call.ways
        parted = form.parted
        try:
            stored = parted.rows(partial(self._computed, call), given_to_trunk(form.plan, call.inputs, call.keys))
            if ways.new:
                ways.new.clear()  # those of a row that was alone
            around = context(), parted.attached.state
            shapes = form.shapes.get(around)
            if shapes is None or (call.made is not None and form.plan.shared):
                shapes = self._shapes_of(call, (form.kind, form.sizes, *around))
                if len(form.shapes) >= _STATES:
                    form.shapes.clear()
                form.shapes[around] = shapes
        except _RefusedError as refused:
            raise refused.error from None
        output = self._head(call, args, kwargs, shapes, stored)
        if ways.new:
            call.looked = True
            self._proof(call).refuse_other(stored)
            self._proved(call)
        if form.ways.by_values and form.rows > 1:
            self._remember(call, (form.kind, form.sizes, *around), stored)
        return output

    def _computed(self, call: Call, given: dict[str, Any]) -> Any:
        """What is stored of rows that are missing."""
        asked, plan, ways = call.asked, call.form.plan, call.ways
        whole = all(given.get(path) is value for path, value in call.inputs.items())
        arguments = asked.arguments if whole else with_inputs(asked, given, rows_in(asked, given))
        with preserved_randomness():  # what a hit does not draw, a miss must not draw either
            found = capture(Capture(plan.call, plan.extras), call.shadow, call.forward, arguments, plan.at, ways)
        if call.made is None and _fits(asked, given):
            call.made = shapes_of(plan, found, rows_in(asked, given))
        rows = rows_of_capture(plan, found)
        if ways.new:
            call.looked = True
            try:
                if not self._proved(call, given, rows):
                    raise Bypass("took a new way alone", None, rows)
            except CutError as error:
                raise _RefusedError(error) from None
        return rows

    def _proved(self, call: Call, given: Mapping[str, Any] | None = None, rows: Any = None) -> bool:
        """Whether rows come out the same on new ways, which are known from now on.

        A row that is alone is right, but nobody knows of it among others.

        Raises:
            CutError: they do not.
        """
        samples = [sample for sample in self._samples_of(_sizes_of(call)) if sample.goes_with(call.asked)]
        if call.form.rows + len(samples) < 2:
            return False
        self._proof(call).refuse_coupled(samples, given, rows)
        call.form.ways.learn(call.ways.new)
        call.ways.new.clear()
        return True

    def _remember(self, call: Call, sizes: _Sizes, stored: Any) -> None:
        """Keep a row of a batch, one for each new way: rows on other ways are to be the same beside it."""
        samples = self._samples_of(sizes)
        if (call.looked or not samples) and len(samples) < _SAMPLES:
            samples.extend(filter(None, [sample_of(call.asked, stored)]))

    def _proof(self, call: Call) -> Proof:
        tokens = call.form.parted.attached.memo.options.extractor.name == "tokens"
        return Proof(call.form.plan, call.shadow, call.forward, call.asked, call.ways, tokens=tokens)

    def _samples_of(self, sizes: _Sizes) -> list[Sample]:
        """Rows of earlier batches of the same sizes and state."""
        found = self._samples.get(sizes)
        if found is None:
            if len(self._samples) >= _SAMPLED:
                self._samples.clear()
            found = self._samples[sizes] = []
        return found

    def _shapes_of(self, call: Call, sizes: _Sizes) -> Shapes:
        """Shapes are those of the latest capture, or of an earlier one of the same sizes and state, or of one row."""
        shapes = self._shapes.get(sizes)
        if shapes is None or (call.made is not None and call.form.plan.shared):
            if call.made is None:
                row = {path: first_row(call.asked, path, value) for path, value in call.inputs.items()}
                with contextlib.suppress(Bypass):  # of a row that is alone: its shapes are known all the same
                    self._computed(call, row)
            assert call.made is not None
            if len(self._shapes) >= _SIZES:
                self._shapes.clear()
            shapes = self._shapes[sizes] = call.made
        return shapes

    def _head(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any], shapes: Shapes, stored: Any) -> Any:
        form, plan, shadow = call.form, call.form.plan, call.shadow
        wants_grad = self._cut_requires_grad and torch.is_grad_enabled()
        values: dict[Step, torch.Tensor] = {}
        extras: dict[Origin, torch.Tensor] = {}
        for source, value in _stored_tensors(plan, shapes, stored):
            if wants_grad and value.is_floating_point():
                value.requires_grad_()
            if isinstance(source, Origin):
                extras[source] = value
            else:
                values[source] = value
        templates = shapes.templates if shapes.rows == form.rows else shapes.scaled(plan, form.rows)
        run = Resume(plan.call, templates, plan.live, plan.twins, values, extras)
        run.branches, run.fires = call.ways, plan.fires
        if not shadow.ready:  # modules before the cut ran on it
            shadow.follow()
        shadow.skipped = plan.skipped
        try:
            run.watch()
            try:
                output = called_in(run, call.forward, shadow.root, args, kwargs)
            finally:
                run.unwatch()
            if not run.reached and run.error is None:
                raise run.failed(_not_called(plan))
            if type(output) is not torch.Tensor:
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


def _stored_tensors(plan: Plan, shapes: Shapes, stored: Any) -> list[tuple[Step | Origin, torch.Tensor]]:
    """What a resumed call needs, as the model had it."""
    found = [(source, value.clone()) for source, value in shapes.shared.items()] if shapes.shared else []
    for kept, rows in zip(plan.per_row, stored, strict=True):
        assert kept.axis is not None
        found.append((kept.source, from_rows(rows, kept.axis)))
    return found


def given_to_trunk(plan: Plan, inputs: Mapping[str, Any], keys: Any) -> dict[str, Any]:
    """What a trunk is called with: the inputs that feed it, the kind of call, and given keys."""
    given = {**inputs, "call of the kind": plan.tag}
    if keys is not None:
        given["cache_keys"] = keys
    return given


def _sizes_of(call: Call) -> _Sizes:
    return call.form.kind, call.form.sizes, context(), call.form.parted.attached.state


def _fits(asked: Asked, given: Mapping[str, Any]) -> bool:
    """Whether rows have the sizes that they were given with: token rows are trimmed."""
    for column in asked.batch.columns:
        value = given.get(column.path)
        if isinstance(value, torch.Tensor) and value.shape[1:] != column.value.shape[1:]:
            return False
    return True
