"""What a probe found out about one kind of call, as plain facts: nothing in it refers to a module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from .axes import Axis, Slope
from .origins import Origin, Spec
from .runs import Called, Template
from .trees import Step, mapped

__all__ = ["Asking", "Plan", "Shapes", "Stored"]


@dataclass(frozen=True, slots=True)
class Asking:
    """What `recycle` was asked for.

    Args:
        at: the name of the cut.
        call: its number.
        extra: whether other values than the arguments of the cut may be stored.
        cut_requires_grad: whether the tensors at the cut require grad, for reentrant checkpointing.
    """

    at: str
    call: int = 0
    extra: bool = False
    cut_requires_grad: bool = False


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that a resumed call needs.

    Args:
        source: its place among the arguments of the cut, or the output of a module that it is.
        axis: where its rows lie; ``None`` if all rows share it.
        row_bytes: the bytes of one row of it in the probe.
        shape: of one row.
        dtype: of its values.
    """

    source: Step | Origin
    axis: Axis | None
    row_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        """Where it comes from."""
        if isinstance(self.source, Origin):
            return str(self.source)
        group, *rest = self.source
        return f"{'argument' if group == 0 else 'keyword'} {'.'.join(map(str, rest))} of the cut"


@dataclass(frozen=True)
class Plan:
    """How calls of one kind are parted.

    Args:
        tag: names the kind of call: keywords, flags, dtypes and ranks.
        at: the name of the cut.
        call: its number.
        inputs: paths of the inputs that feed the cut, or that are flags.
        stubs: calls of modules that feed the cut.
        live: calls of modules that come before the cut and do not feed it.
        bare: calls, before the cut, of modules without parameters.
        stored: the tensors of a record.
        slopes: how shapes grow with the rows, for each tensor that a stub returns.
        trunk: names of the modules before the cut that feed it.
        both: those of them, and of the modules inside of these, that are used after the cut as well.
        twins: modules of the trunk that are such, or hold one.
        direct: parameters and buffers of the ancestors that feed it.
        frozen: all parameters that feed it.
        floor: the tolerance of the least precise arithmetic in it.
        fires: hooks of modules that are skipped hand values on: they are called with stand-ins.
    """

    tag: str
    at: str
    call: int
    inputs: tuple[str, ...]
    stubs: frozenset[Called]
    live: frozenset[Called]
    bare: frozenset[Called]
    stored: tuple[Stored, ...]
    slopes: Mapping[Called, tuple[tuple[Slope, ...], ...]]
    trunk: tuple[str, ...]
    both: frozenset[str]
    twins: frozenset[str]
    direct: tuple[str, ...]
    frozen: tuple[str, ...]
    floor: float
    fires: bool

    @cached_property
    def skipped(self) -> frozenset[str]:
        """Modules that only run before the cut."""
        return frozenset(path for path, _ in self.stubs if path not in self.both)

    @cached_property
    def wanted(self) -> frozenset[str]:
        """The inputs that feed the cut, to be looked up."""
        return frozenset(self.inputs)

    @cached_property
    def per_row(self) -> tuple[Stored, ...]:
        """What has rows."""
        return tuple(stored for stored in self.stored if stored.axis is not None)

    @cached_property
    def shared(self) -> tuple[Stored, ...]:
        """What all rows share."""
        return tuple(stored for stored in self.stored if stored.axis is None)

    @cached_property
    def extras(self) -> frozenset[Called]:
        """Calls of modules of which an output is stored."""
        found = (stored.source for stored in self.stored if isinstance(stored.source, Origin))
        return frozenset((origin.path, origin.number) for origin in found)


@dataclass(slots=True)
class Shapes:
    """What the modules before the cut return for inputs of certain sizes, but for the number of rows.

    Args:
        rows: the number of rows of the capture that they were taken from.
        templates: of each call.
        shared: the values that all rows share.
    """

    rows: int
    templates: Mapping[Called, Template]
    shared: Mapping[Step | Origin, torch.Tensor]
    _scaled: dict[int, Mapping[Called, Template]] = field(default_factory=dict)

    def scaled(self, plan: Plan, rows: int) -> Mapping[Called, Template]:
        """The templates for this number of rows."""
        if rows == self.rows:
            return self.templates
        found = self._scaled.get(rows)
        if found is None:
            found = {
                called: _scaled(template, plan.slopes[called], self.rows, rows)
                for called, template in self.templates.items()
                if called in plan.slopes
            }
            if len(self._scaled) >= 64:
                self._scaled.clear()
            self._scaled[rows] = found
        return found


def _scaled(template: Template, slopes: tuple[tuple[Slope, ...], ...], before: int, rows: int) -> Template:
    each = iter(slopes)
    return template._replace(value=mapped(template.value, lambda spec: _grown(spec, next(each), before, rows), Spec))


def _grown(spec: Spec, slopes: tuple[Slope, ...], before: int, rows: int) -> Spec:
    shape = tuple(
        size // before * rows if whole else size + step * (rows - before)
        for size, (step, whole) in zip(spec.shape, slopes, strict=True)
    )
    if shape == spec.shape:
        return spec
    order = sorted(range(len(shape)), key=lambda dim: (spec.stride[dim], -dim))
    stride, step = [0] * len(shape), 1
    for dim in order:
        stride[dim] = step
        step *= max(shape[dim], 1)
    return Spec(shape, tuple(stride), spec.dtype, spec.device)
