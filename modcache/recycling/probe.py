"""Find out, once per kind of call, how a model is parted at a cut; and refuse where that cannot be done rightly."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..arguments import Arguments
from ..batch import items_of
from ..errors import CutError
from ..keys.tokens import find_tokens
from ..selfcheck import preserved_randomness
from .axes import CoupledError, agree, axis_of, floor_of, from_rows, slopes_of, to_rows
from .branches import Branch, Branches
from .captures import Found, capture, not_reached, value_in
from .ghosts import Ghost, Origin, Spec, unwrapped
from .kinds import Asked, with_values
from .plan import Asking, Plan, Stored
from .runs import Called, Capture, Reached, Resume, Template
from .shadow import Shadow, running
from .stashes import Stashes
from .trace import BY_PYTHON, Mark, Trace
from .trees import Step, located, mapped, same_but_tensors
from .untouched import seed, untouched

__all__ = ["probe"]

_ROWS = 4
"""Rows of the first batch that the probe runs on."""

_LOOKED_AT = 64
"""Rows among which these are looked for."""


# --- the probe ------------------------------------------------------------------------------------------


class _Probe:
    """One probe of one kind of call."""

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        shadow: Shadow,
        asked: Asked,
        asking: Asking,
        tokens: bool,
    ) -> None:
        self.model, self.forward, self.shadow, self.asked = model, forward, shadow, asked
        self.at, self.call, self.extra, self.tokens = asking.at, asking.call, asking.extra, tokens
        self.places = _distinct_rows(asked)
        self.count = len(self.places)
        if self.count < 2:
            raise CutError(
                f"{self.at}: all rows of the first batch are the same, which tells nothing about rows. Call the model "
                "with two different rows first, or give recycle(..., batch=...) such a batch."
            )
        self.branches = Branches()
        self.seeds = itertools.count(1)
        self.fires = False
        self.trace = Trace()
        self.floor = 0.0

    def taken(self, places: Sequence[int]) -> Arguments:
        if self.asked.batch.size == len(places) and list(places) == list(range(len(places))):
            return self.asked.arguments
        return self.asked.arguments.taken(self.asked.batch, list(places))

    def full(self, arguments: Arguments) -> Any:
        with torch.inference_mode(False), torch.no_grad(), running(None), preserved_randomness():
            return self.forward(self.model, *arguments.args, **arguments.kwargs)

    def captured(self, arguments: Arguments, trace: Trace | None = None) -> Found:
        run = Capture(self.call, trace=trace)
        self.branches.trace = trace
        with preserved_randomness():
            seed(next(self.seeds))  # what draws random numbers shall give itself away
            return capture(run, self.shadow, self.forward, arguments, self.at, self.branches)

    def run(self) -> tuple[Plan, frozenset[Branch]]:
        """The plan, and the ways that were looked at."""
        batch = self.taken(self.places)
        output = self.full(batch)
        try:
            plan = self._parted(batch, output)
            if self.tokens:
                self._refuse_padding(plan, batch)
            return plan, frozenset(self.branches.new | self.branches.irrelevant(plan.inputs))
        except (CutError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise CutError(
                f"{self.at}: run again on a few of its rows, or resumed at the cut, the model raises "
                f"{type(error).__name__} ({error}), which it does not do in full. What comes before the cut depends on "
                "earlier calls or on which rows are in the batch. Cut at an earlier submodule."
            ) from error

    def _parted(self, batch: Arguments, output: Any) -> Plan:
        rows = self.places
        if any(leaf.is_nested for _, leaf in located(output)):
            raise CutError(f"{self.at}: the model returns a nested tensor. Call uncached(model).")
        self.full(batch)
        stashes = Stashes(self.model)
        trace, found = self._traced(batch)
        stashes.refuse_tensors(trace, found.capture)
        others = []
        for places in (rows[::-1], rows[:1], rows[1:]):
            others.append(self.captured(self.taken(places)))
            stashes.note()
        captures = (found, *others)
        self._compare_structures(captures)
        ghostly = self._ghostly(found, batch)
        if not ghostly:
            raise CutError(
                f"{self.at}: nothing that it is given is computed by a module with parameters before it, so there is "
                "nothing to store. Cut at a later submodule."
            )
        marks = trace.all_marks([found.values[step] for step in ghostly])
        extras, marks, after = self._learned(found, ghostly, marks, trace, batch, output)
        stashes.refuse_numbers({mark.name for mark in marks if mark.kind == "module"})
        stored = [*ghostly, *extras]
        axes = self._axes(stored, captures)
        return self._plan(found, captures, stored, axes, marks, after)

    def _traced(self, batch: Arguments) -> tuple[Trace, Found]:
        trace = self.trace = Trace()
        named = ((Mark("parameter", name), p) for name, p in self.model.named_parameters(remove_duplicate=False))
        for mark, tensor in named:
            trace.mark([tensor], mark, given=True)
        for name, buffer in self.model.named_buffers(remove_duplicate=False):
            trace.mark([buffer], Mark("buffer", name), given=True)
        taken = Asked(batch, self.asked.batch, (), ())
        for path, value in self._leaves(taken):
            trace.mark([leaf for _, leaf in located(value)], Mark("input", path), given=True)
        with trace:
            found = self.captured(batch, trace)
        self.floor = floor_of(trace.dtypes)
        for marks in trace.written:
            kinds = {mark.kind for mark in marks}
            name = ", ".join(sorted({mark.name for mark in marks if mark.kind in ("buffer", "input", "parameter")})[:3])
            what = "a buffer" if "buffer" in kinds else "an input" if "input" in kinds else "a parameter"
            raise CutError(
                f"{self.at}: before the cut, the forward writes into {what} in place ({name}), which a resumed call "
                "would not do. Cut at an earlier submodule, or take that write out."
            )
        return trace, found

    def _leaves(self, asked: Asked) -> Iterator[tuple[str, Any]]:
        """Paths of all inputs, with their values in the call that the probe runs on."""
        for column in self.asked.batch.columns:
            yield column.path, _at(asked.arguments, column.path)
        for path, _ in self.asked.batch.shared:
            yield path, _at(asked.arguments, path)

    def _compare_structures(self, captures: tuple[Found, ...]) -> None:
        full = captures[0]
        for other in captures[1:]:
            if full.capture.templates.keys() != other.capture.templates.keys():
                names = {path for path, _ in full.capture.templates.keys() ^ other.capture.templates.keys()}
                raise CutError(
                    f"{', '.join(sorted(names)[:3])}: whether it is called before the cut depends on which rows are in "
                    "the batch. Cut at an earlier submodule, or make the way the same for all rows."
                )
            for called, output in full.capture.outputs.items():
                if not same_but_tensors(output, other.capture.outputs[called]):
                    raise CutError(
                        f"{called[0]}, which comes before the cut, returns beside tensors something that depends on "
                        "which rows are in the batch. Cut at an earlier submodule."
                    )

    def _ghostly(self, found: Found, batch: Arguments) -> tuple[Step, ...]:
        """The places among the arguments of the cut that only modules before it can fill."""
        run = Resume(self.call, found.capture.templates, frozenset(), frozenset(), None, {})
        with contextlib.suppress(Reached):
            self._resumed(run, batch)
        if run.error is not None:
            raise run.error
        return run.ghostly

    def _resumed(self, run: Resume, arguments: Arguments) -> Any:
        self.shadow.take_over(training=False)
        run.branches = self.branches
        inside = torch.inference_mode(False), torch.no_grad(), running(run), preserved_randomness(), run.watched()
        with contextlib.ExitStack() as stack:
            for one in inside:
                stack.enter_context(one)
            output = self.forward(self.shadow.root, *arguments.args, **arguments.kwargs)
            return mapped(output, unwrapped, Ghost)

    def _learned(
        self,
        found: Found,
        ghostly: tuple[Step, ...],
        marks: frozenset[Mark],
        trace: Trace,
        batch: Arguments,
        output: Any,
    ) -> tuple[list[Origin], frozenset[Mark], set[str]]:
        """Resume, and see which other outputs are needed; the result must be that of the whole model."""
        extras: dict[Origin, None] = {}
        while True:
            feeding = {(mark.name, mark.number) for mark in marks if mark.kind == "module"}
            live = frozenset(called for called in found.capture.templates if called not in feeding)
            self.full(self.taken([self.places[0]] * self.count))  # what was hidden away in the first run is overwritten
            known = found.capture.outputs if self.extra else {}
            values = {step: found.values[step].detach().clone() for step in ghostly}
            known = {called: mapped(output, torch.clone) for called, output in known.items()}
            run = Resume(self.call, found.capture.templates, live, frozenset(), values, {}, known)
            run.fires = self.fires
            try:
                again = self._finished(run, batch)
            except Exception:
                if self.fires or not self.extra:
                    raise
                self.fires = True
                continue
            new = [origin for origin in run.needed if origin not in extras]
            extras.update(dict.fromkeys(new))
            if not new and not self.fires and self.extra and _difference(output, again, self.floor) is not None:
                self.fires = True  # hooks of what is skipped may hand values on, as transformers' output_hidden_states
                continue
            if not new:
                break
            outputs = [dict(located(found.capture.outputs[o.path, o.number]))[o.place] for o in new]
            marks |= trace.all_marks(outputs)
        if (differs := _difference(output, again, self.floor)) is not None:
            raise CutError(
                f"{self.at}: resumed at the cut, the model gives something else than in full ({differs}). A value from "
                "before the cut reaches what comes after it by a way that nobody can see (a global, a closure, an "
                "object, a hook). Cut at a later submodule, or at one that comes before that."
            )
        return list(extras), marks, run.after

    def _finished(self, run: Resume, batch: Arguments) -> Any:
        try:
            output = self._resumed(run, batch)
        except Exception:
            if run.error is not None:
                raise run.error from None
            raise
        if run.error is not None:
            raise run.error
        if not run.reached:
            raise not_reached(self.at, self.call, 0)
        return output

    def _refuse_padding(self, plan: Plan, batch: Arguments) -> None:
        """Is the result the same when the trunk gives zeros at masked positions?"""
        columns = tuple(column._replace(value=_at(batch, column.path)) for column in self.asked.batch.columns)
        tokens = find_tokens(self.asked.batch._replace(size=self.count, columns=columns))
        if tokens is None:
            return
        kept = torch.arange(tokens.width) < torch.from_numpy(tokens.lengths)[:, None]
        if bool(kept.all()) and tokens.width > 1:
            kept[0, -1] = False  # no row is padded, so one is made shorter
        values = {column.path: column.value for column in columns}
        mask = values[tokens.mask]
        values[tokens.mask] = torch.where(kept.to(mask.device), mask, torch.zeros_like(mask))
        arguments = with_values(batch, values)
        output, found = self.full(arguments), self.captured(arguments)
        tensors = {}
        for stored in plan.stored:
            value = value_in(found, stored.source).detach().clone()
            if stored.axis is not None:
                rows = to_rows(value, stored.axis)
                if rows.dim() > 1 and rows.shape[1] == tokens.width:
                    rows = torch.where(_beside(kept, rows), rows, torch.zeros_like(rows))
                value = from_rows(rows, stored.axis)
            tensors[stored.source] = value
        crossing = {source: value for source, value in tensors.items() if not isinstance(source, Origin)}
        extras = {source: value for source, value in tensors.items() if isinstance(source, Origin)}
        run = Resume(self.call, found.capture.templates, plan.live, frozenset(), crossing, extras)
        run.fires = self.fires
        again = self._finished(run, arguments)

        def seen(leaf: torch.Tensor) -> torch.Tensor:
            per_token = leaf.dim() > 1 and leaf.shape[:2] == kept.shape
            return torch.where(_beside(kept, leaf), leaf, torch.zeros_like(leaf)) if per_token else leaf

        if (differs := _difference(mapped(output, seen), mapped(again, seen), self.floor)) is not None:
            raise CutError(
                f'{self.at}: with key="tokens" the trunk gives zeros at masked positions, and what comes after the cut '
                f"looks at them ({differs}). Leave key= out, or cut at a later submodule."
            )

    def _axes(self, stored: list[Any], captures: tuple[Found, ...]) -> dict[Any, Any]:
        axes = {}
        for source in stored:
            try:
                full, turned, first, rest = (value_in(found, source) for found in captures)
            except KeyError:
                raise CutError(
                    f"{self.at}: which tensors it is given depends on which rows are in the batch. Cut at an earlier "
                    "submodule."
                ) from None
            try:
                axes[source] = axis_of(full, turned, first, rest, self.count, self.floor)
            except CoupledError as reason:
                what = str(source) if isinstance(source, Origin) else f"what {self.at} is given"
                raise CutError(
                    f"{what} cannot be stored by row: {reason}. Its rows depend on each other, on chance, or on their "
                    "place. Cut at an earlier submodule, or make the trunk deterministic."
                ) from None
        if all(axis is None for axis in axes.values()):
            raise CutError(f"{self.at}: nothing that crosses the cut has rows. Cut at a later submodule.")
        return axes

    def _plan(
        self,
        found: Found,
        captures: tuple[Found, ...],
        stored: list[Any],
        axes: dict[Any, Any],
        marks: frozenset[Mark],
        after: set[str],
    ) -> Plan:
        full, _, first, rest = (one.capture for one in captures)
        feeding = {(mark.name, mark.number) for mark in marks if mark.kind == "module"}
        stubs = frozenset(called for called in full.templates if called in feeding)
        trunk = tuple(sorted({path for path, _ in feeding}))
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        fed = {mark.name for mark in marks if mark.kind == "parameter"}
        # What is worked out anew on each call, a parameter that is handed to the cut, feeds it all the same.
        anew = {mark.name for mark in self.trace.all_marks(list(found.values.values())) if mark.kind == "parameter"}
        frozen = {name for name in parameters if name in fed | anew or _lies_in(name, stubs)}
        tied = {id(parameters[name]) for name in frozen}
        frozen |= {name for name, value in parameters.items() if id(value) in tied}
        buffers = {mark.name for mark in marks if mark.kind == "buffer"}
        inside = {id(value) for name, value in parameters.items() if _lies_in(name, feeding)}
        first_names = {id(value): name for name, value in reversed(parameters.items())}
        alone = {
            name for name in fed if id(parameters[name]) not in inside and first_names[id(parameters[name])] == name
        }
        direct = tuple(sorted(alone | {name for name in buffers if not _lies_in(name, feeding)}))
        slopes = {called: self._slopes(called, full, first, rest) for called in stubs}
        facts = tuple(_stored(source, axes[source], value_in(found, source)) for source in stored)
        inputs = tuple(sorted({mark.name for mark in marks if mark.kind == "input"}))
        self._refuse_shared({source: value_in(found, source) for source in stored if axes[source] is None})
        return Plan(
            tag=self.asked.tag,
            at=self.at,
            call=self.call,
            inputs=inputs,
            stubs=stubs,
            live=frozenset(called for called in full.templates if called not in feeding),
            bare=frozenset(full.bare),
            stored=facts,
            slopes=slopes,
            trunk=trunk,
            twins=frozenset(trunk) & after,
            direct=direct,
            frozen=tuple(sorted(frozen)),
            floor=self.floor,
            fires=self.fires,
        )

    def _refuse_shared(self, values: dict[Any, torch.Tensor]) -> None:
        """What all rows share is stored once, so it must not be made of rows."""
        rows = {column.path for column in self.asked.batch.columns}
        for source, value in values.items():
            marks = self.trace.marks_of(value)
            made_of = sorted({mark.name for mark in marks if mark.kind == "input" and mark.number != BY_PYTHON} & rows)
            if made_of:
                what = str(source) if isinstance(source, Origin) else f"a tensor that {self.at} is given"
                raise CutError(
                    f"{what} is the same for all rows of the first batch, though it is made of {', '.join(made_of)}: "
                    "rows depend on each other. Cut at an earlier submodule."
                )

    def _slopes(self, called: Called, full: Capture, first: Capture, rest: Capture) -> Any:
        shapes: list[Template] = [run.templates[called] for run in (full, first, rest)]
        found = []
        each = zip(*(_specs(template) for template in shapes), strict=True)
        for one, alone, others in each:
            slopes = slopes_of(one.shape, alone.shape, others.shape, self.count)
            if slopes is None:
                raise CutError(
                    f"{called[0]}, which comes before the cut, returns a tensor whose shape depends on which rows are "
                    f"in the batch ({one.shape}, {alone.shape}, {others.shape}). Cut at an earlier submodule."
                )
            found.append(slopes)
        return tuple(found)


def _specs(template: Template) -> list[Any]:
    return [spec for _, spec in located(template.value, Spec)]


def _stored(source: Any, axis: Any, value: torch.Tensor) -> Stored:
    rows = value if axis is None else to_rows(value, axis)[0]
    return Stored(source, axis, rows.numel() * rows.element_size(), tuple(rows.shape), rows.dtype)


def _lies_in(name: str, modules: Any) -> bool:
    return any(name.startswith(f"{path}.") for path, _ in modules)


def _at(arguments: Arguments, path: str) -> Any:
    """The value at a path of the arguments."""
    for name, value in arguments.bound():
        if path == name:
            return value
        if path.startswith((f"{name}.", f"{name}[")):
            return _inside(value, path[len(name) :])
    raise AssertionError(f"{path} is no argument")


def _inside(value: Any, path: str) -> Any:
    for step, item in items_of(value):
        if path == step:
            return item
        if path.startswith((f"{step}.", f"{step}[")):
            return _inside(item, path[len(step) :])
    return value


def _distinct_rows(asked: Asked) -> list[int]:
    """The first few rows that all differ."""
    found: list[int] = []
    for place in range(min(asked.batch.size, _LOOKED_AT)):
        if not any(_same_row(asked, place, other) for other in found):
            found.append(place)
        if len(found) == _ROWS:
            break
    return found


def _same_row(asked: Asked, place: int, other: int) -> bool:
    for column in asked.batch.columns:
        if column.single:
            continue
        one, two = column.value[place], column.value[other]
        if isinstance(one, torch.Tensor | np.ndarray):
            one, two = torch.as_tensor(one), torch.as_tensor(two)
            if one.shape != two.shape or not torch.equal(one, two):
                return False
        elif one is not two and one != two:
            return False
    return True


def _beside(kept: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Which positions are kept, in a shape that goes with rows of tokens."""
    return kept.to(rows.device).reshape(*kept.shape, *(1,) * (rows.dim() - 2))


def _difference(one: Any, other: Any, floor: float) -> str | None:
    """In what two outputs differ."""
    left, right = list(located(one)), list(located(other))
    if [step for step, _ in left] != [step for step, _ in right] or not same_but_tensors(one, other):
        return "another structure"
    for (step, mine), (_, yours) in zip(left, right, strict=True):
        where = "".join(f"[{part!r}]" for part in step) or "the output"
        if mine.shape != yours.shape or mine.dtype != yours.dtype:
            return f"{where}: shape {tuple(yours.shape)} for {tuple(mine.shape)}"
        if not agree(mine, yours, floor):
            return f"{where}: other values"
    return None


def probe(
    model: nn.Module, forward: Callable[..., Any], shadow: Shadow, asked: Asked, asking: Asking, tokens: bool
) -> tuple[Plan, frozenset[Branch]]:
    """Part a model for this kind of call; the plan, and the ways that were looked at.

    Raises:
        CutError: that cannot be done rightly.
    """
    if asked.batch.size < 2:
        raise CutError(
            f"{asking.at}: the first batch has one row, which does not tell rows from the rest. Call it with two "
            "or more rows first, or give recycle(..., batch=...) such a batch."
        )
    with untouched(model, shadow.written):
        return _Probe(model, forward, shadow, asked, asking, tokens).run()
