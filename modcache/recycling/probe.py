"""Find out, once per kind of call, how a model is parted at a cut; and refuse where that cannot be done rightly."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..arguments import Arguments
from ..errors import CutError
from ..selfcheck import preserved_randomness
from .axes import CoupledError, agree, axis_of, floor_of, slopes_of, to_rows
from .branches import Branch, Branches
from .ghosts import Ghost, Origin, Spec, unwrapped
from .kinds import Asked
from .plan import Plan, Shapes, Stored
from .runs import Called, Capture, Reached, Resume, Template
from .shadow import Shadow, running
from .stashes import Stashes, buffers_of
from .trace import Mark, Trace
from .trees import Step, located, mapped, same_but_tensors

__all__ = ["Found", "capture", "probe", "refuse_coupled", "rows_of_capture", "shapes_of", "untouched"]

_ROWS = 4
"""Rows of the first batch that the probe runs on."""

_LOOKED_AT = 64
"""Rows among which these are looked for."""


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
        raise _not_reached(at, run.cut_calls)
    return Found(run, dict(located(run.arguments)))


def _not_reached(at: str, calls: int) -> CutError:
    if calls:
        return CutError(
            f"{at} is called {calls} time{'s' if calls > 1 else ''} in this forward: there is no call={calls} of it. "
            f"Give a lower call= (the first is 0)."
        )
    return CutError(
        f"{at} is not called in this forward, so the model cannot be cut there. Cut at a submodule that is called (one "
        "of its children, or what calls it)."
    )


# --- leaving no trace -----------------------------------------------------------------------------------


@contextlib.contextmanager
def untouched(model: nn.Module, written: set[tuple[int, str]]) -> Iterator[None]:
    """Run things with the model in eval mode, and leave attributes, buffers, modes and randomness as they were.

    The attributes that were set meanwhile, by ``id`` of the module, are added to ``written``.
    """
    modules = list(model.modules())
    before = [dict(vars(module)) for module in modules]
    buffers = [
        (module, name, value, None if value is None else value.detach().clone())
        for module in modules
        for name, value in buffers_of(module).items()
    ]
    with preserved_randomness():
        try:
            for module in modules:
                vars(module)["training"] = False
            yield
        finally:
            for module, was in zip(modules, before, strict=True):
                written.update((id(module), name) for name in _put_back(module, was))
            with torch.no_grad():
                for module, name, value, content in buffers:
                    buffers_of(module)[name] = value
                    if value is not None and content is not None and not _same(value, content):
                        value.copy_(content)


def _put_back(module: nn.Module, was: dict[str, Any]) -> set[str]:
    """Put attributes back; the names of those that had been set."""
    now = vars(module)
    names = {name for name in {*now, *was} if name not in _INNER and now.get(name, was) is not was.get(name, now)}
    kept = {name for name in names if name.startswith("_output_capturing")}  # transformers' hooks stay installed
    for name in names - was.keys() - kept:
        del now[name]
    now.update({name: value for name, value in was.items() if name not in kept})
    return names


_INNER = frozenset(vars(nn.Module())) | {"_modcache"}


def _seed(number: int) -> None:
    """Begin other random numbers; the caller has preserved the user's."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and (torch.equal(one, other) or torch.equal(one.nan_to_num(), other.nan_to_num()))


# --- the probe ------------------------------------------------------------------------------------------


class _Probe:
    """One probe of one kind of call."""

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        shadow: Shadow,
        asked: Asked,
        at: str,
        call: int,
        extra: bool,
    ) -> None:
        self.model, self.forward, self.shadow = model, forward, shadow
        self.asked, self.at, self.call, self.extra = asked, at, call, extra
        self.places = _distinct_rows(asked)
        self.count = len(self.places)
        if self.count < 2:
            raise CutError(
                f"{at}: all rows of the first batch are the same, which tells nothing about rows. Call the model "
                "with two different rows first, or give recycle(..., batch=...) such a batch."
            )
        self.branches = Branches()
        self.seeds = itertools.count(1)
        self.fires = False
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
            _seed(next(self.seeds))  # what draws random numbers shall give itself away
            return capture(run, self.shadow, self.forward, arguments, self.at, self.branches)

    def run(self) -> tuple[Plan, frozenset[Branch]]:
        """The plan, and the ways that were looked at."""
        batch = self.taken(self.places)
        output = self.full(batch)
        try:
            plan = self._parted(batch, output)
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
        trace = Trace()
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
            values = {step: found.values[step].clone() for step in ghostly}
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
            raise _not_reached(self.at, 0)
        return output

    def _axes(self, stored: list[Any], captures: tuple[Found, ...]) -> dict[Any, Any]:
        axes = {}
        for source in stored:
            try:
                full, turned, first, rest = (_value(found, source) for found in captures)
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
        frozen = {name for name in parameters if name in fed or _lies_in(name, stubs)}
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
        facts = tuple(_stored(source, axes[source], _value(found, source)) for source in stored)
        inputs = tuple(sorted({mark.name for mark in marks if mark.kind == "input"}))
        if any(stored.axis is None for stored in facts):
            self._refuse_coupled(found, [source for source in stored if axes[source] is None])
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

    def _refuse_coupled(self, found: Found, shared: list[Any]) -> None:
        return None

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


def _value(found: Found, source: Any) -> torch.Tensor:
    if isinstance(source, Origin):
        output = found.capture.outputs[source.path, source.number]
        value: torch.Tensor = dict(located(output))[source.place]
        return value
    return found.values[source]


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
    from ..batch import items_of

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
    model: nn.Module, forward: Callable[..., Any], shadow: Shadow, asked: Asked, at: str, call: int, extra: bool
) -> tuple[Plan, frozenset[Branch]]:
    """Part a model for this kind of call; the plan, and the ways that were looked at.

    Raises:
        CutError: that cannot be done rightly.
    """
    if asked.batch.size < 2:
        raise CutError(
            f"{at}: the first batch has one row, which does not tell rows from the rest. Call the model with two "
            "or more rows first, or give recycle(..., batch=...) such a batch."
        )
    with untouched(model, shadow.written):
        return _Probe(model, forward, shadow, asked, at, call, extra).run()


def shapes_of(plan: Plan, found: Found, rows: int) -> Shapes:
    """The shapes, and the values that all rows share, of a capture."""
    shared = {stored.source: _value(found, stored.source).detach().clone() for stored in plan.shared}
    return Shapes(rows, found.capture.templates, shared)


def rows_of_capture(plan: Plan, found: Found) -> tuple[torch.Tensor, ...]:
    """The tensors of the records, rows first.

    Raises:
        CutError: a tensor that is to be stored did not come.
    """
    tensors = []
    for stored in plan.per_row:
        try:
            value = _value(found, stored.source)
        except KeyError:
            raise CutError(f"{plan.at}: {stored} is not given on this call. Cut at an earlier submodule.") from None
        assert stored.axis is not None
        tensors.append(to_rows(value, stored.axis))
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
