"""Make of what the runs of a probe gave the plan of a kind of call."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import CutError
from .axes import Axis, CoupledError, Slope, axis_of, slopes_of, to_rows
from .captures import Captured, value_in
from .kinds import Asked
from .origins import Origin, Spec
from .plan import Asking, Plan, Stored
from .runs import Called, Template
from .trace import BY_PYTHON, Mark, Trace
from .trees import Step, located

__all__ = ["Evidence", "plan_of"]

Source = Step | Origin


class Evidence(NamedTuple):
    """What the runs of a probe gave.

    Args:
        asked: the call.
        asking: where the model is to be cut.
        captures: of all rows, in reverse, of the first row, and of the others.
        rows: how many rows.
        trace: of the first of these.
        floor: the tolerance of comparisons.
        stored: the tensors that a resumed call needs.
        marks: what these were made of.
        after: modules that are called after the cut.
        fires: whether hooks of skipped modules are called with stand-ins.
    """

    asked: Asked
    asking: Asking
    captures: tuple[Captured, ...]
    rows: int
    trace: Trace
    floor: float
    stored: Sequence[Source]
    marks: frozenset[Mark]
    after: Collection[str]
    fires: bool


def plan_of(model: nn.Module, found: Evidence) -> Plan:
    """The plan.

    Raises:
        CutError: rows depend on each other, on chance, or on their place.
    """
    full = found.captures[0].capture
    axes = _axes(found)
    feeding = {(mark.name, mark.number) for mark in found.marks if mark.kind == "module"}
    stubs = frozenset(called for called in full.templates if called in feeding)
    trunk = tuple(sorted({path for path, _ in feeding}))
    both = _on_both_sides(model, trunk, (found.asking.at, *found.after))
    values = {source: value_in(found.captures[0], source) for source in found.stored}
    _refuse_shared(found, {source: value for source, value in values.items() if axes[source] is None})
    return Plan(
        tag=found.asked.tag,
        at=found.asking.at,
        call=found.asking.call,
        inputs=tuple(sorted({mark.name for mark in found.marks if mark.kind == "input"})),
        stubs=stubs,
        live=frozenset(called for called in full.templates if called not in feeding),
        bare=frozenset(full.bare),
        stored=tuple(_stored(source, axes[source], value) for source, value in values.items()),
        slopes={called: _slopes(called, found) for called in stubs},
        trunk=trunk,
        both=frozenset(name for _, name in both),
        twins=frozenset(path for path, _ in both),
        direct=_direct(model, found.marks, feeding),
        frozen=_frozen(model, found, stubs),
        floor=found.floor,
        fires=found.fires,
    )


def _on_both_sides(model: nn.Module, trunk: Sequence[str], above: Sequence[str]) -> list[tuple[str, str]]:
    """The modules of the trunk, and those inside of them, that are used from the cut on as well: by which, and name."""
    modules = dict(model.named_modules(remove_duplicate=False))
    used = {id(module) for path in above if path in modules for module in modules[path].modules()}
    return [
        (path, name)
        for path in trunk
        if path in modules
        for name, module in modules[path].named_modules(prefix=path)
        if id(module) in used
    ]


def _frozen(model: nn.Module, found: Evidence, stubs: Collection[Called]) -> tuple[str, ...]:
    """All parameters that feed the cut, by all their names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # What is worked out anew on each call, such as a parameter that is handed to the cut, feeds it all the same.
    marks = found.marks | found.trace.all_marks(list(found.captures[0].values.values()))
    fed = {mark.name for mark in marks if mark.kind == "parameter"}
    ids = {id(value) for name, value in parameters.items() if name in fed or _lies_in(name, stubs)}
    return tuple(sorted(name for name, value in parameters.items() if id(value) in ids))


def _direct(model: nn.Module, marks: Collection[Mark], feeding: Collection[Called]) -> tuple[str, ...]:
    """Parameters and buffers that feed the cut and lie in none of the modules that do; each once."""
    names = {mark.name for mark in marks if mark.kind in ("parameter", "buffer")}
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    known = {id(tensor) for name, tensor in tensors.items() if _lies_in(name, feeding)}
    found = []
    for name, tensor in tensors.items():
        if name in names and id(tensor) not in known:
            known.add(id(tensor))
            found.append(name)
    return tuple(sorted(found))


def _axes(found: Evidence) -> dict[Source, Axis | None]:
    axes: dict[Source, Axis | None] = {}
    at = found.asking.at
    for source in found.stored:
        try:
            full, turned, first, rest = (value_in(one, source) for one in found.captures)
        except KeyError:
            raise CutError(
                f"{at}: which tensors it is given depends on which rows are in the batch. Cut at an earlier submodule."
            ) from None
        try:
            axes[source] = axis_of(full, turned, first, rest, found.rows, found.floor)
        except CoupledError as reason:
            what = str(source) if isinstance(source, Origin) else f"what {at} is given"
            raise CutError(
                f"{what} cannot be stored by row: {reason}. Its rows depend on each other, on chance, or on their "
                "place. Cut at an earlier submodule, or make the trunk deterministic."
            ) from None
    if all(axis is None for axis in axes.values()):
        raise CutError(f"{at}: nothing that crosses the cut has rows. Cut at a later submodule.")
    return axes


def _refuse_shared(found: Evidence, values: dict[Source, torch.Tensor]) -> None:
    """What all rows share is stored once, so it must not be made of rows."""
    rows = {column.path for column in found.asked.batch.columns}
    for source, value in values.items():
        marks = found.trace.marks_of(value)
        made_of = sorted({mark.name for mark in marks if mark.kind == "input" and mark.number != BY_PYTHON} & rows)
        if made_of:
            what = str(source) if isinstance(source, Origin) else f"a tensor that {found.asking.at} is given"
            raise CutError(
                f"{what} is the same for all rows of the first batch, though it is made of {', '.join(made_of)}: "
                "rows depend on each other. Cut at an earlier submodule."
            )


def _slopes(called: Called, found: Evidence) -> tuple[tuple[Slope, ...], ...]:
    full, _, first, rest = (one.capture.templates[called] for one in found.captures)
    all_slopes = []
    each = zip(*map(_specs, (full, first, rest)), strict=True)
    for one, alone, others in each:
        slopes = slopes_of(one.shape, alone.shape, others.shape, found.rows)
        if slopes is None:
            raise CutError(
                f"{called[0]}, which comes before the cut, returns a tensor whose shape depends on which rows are "
                f"in the batch ({one.shape}, {alone.shape}, {others.shape}). Cut at an earlier submodule."
            )
        all_slopes.append(slopes)
    return tuple(all_slopes)


def _specs(template: Template) -> list[Spec]:
    return [spec for _, spec in located(template.value, Spec)]


def _stored(source: Any, axis: Any, value: torch.Tensor) -> Stored:
    rows = value if axis is None else to_rows(value, axis)[0]
    return Stored(source, axis, rows.numel() * rows.element_size(), tuple(rows.shape), rows.dtype)


def _lies_in(name: str, modules: Any) -> bool:
    return any(name.startswith(f"{path}.") for path, _ in modules)
