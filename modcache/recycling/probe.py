"""Find out, once per kind of call, how a model is parted at a cut; and refuse where that cannot be done rightly."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..arguments import Arguments
from ..batch import tensors_in
from ..errors import CutError
from .alike import difference, floor_of, rows_agree
from .branches import Branches, Way
from .captures import Captured, refuse_other_structures, rows_of_capture
from .kinds import Asked
from .origins import Origin
from .padding import refuse_padding
from .plan import Asking, Plan
from .planning import Evidence, plan_of
from .runs import Resume
from .sampling import distinct_rows, value_at
from .shadow import Shadow
from .spoiling import refuse_kept
from .stashes import Stashes
from .tags import Tags
from .trace import Mark, Trace
from .trees import Step, located, mapped
from .trials import Trials
from .untouched import untouched

__all__ = ["probe"]


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
        self.model, self.asked, self.asking, self.tokens = model, asked, asking, tokens
        self.at, self.call, self.extra = asking.at, asking.call, asking.extra
        self.places = distinct_rows(asked)
        self.count = len(self.places)
        if self.count < 2:
            raise CutError(
                f"{self.at}: all rows of the first batch are the same, which tells nothing about rows. Call the model "
                "with two different rows first, or give recycle(..., batch=...) such a batch."
            )
        self.trials = Trials(model, forward, shadow, self.at, self.call)
        self.trace = Trace()
        self.floor = 0.0

    def taken(self, places: Sequence[int]) -> Arguments:
        if self.asked.batch.size == len(places) and list(places) == list(range(len(places))):
            return self.asked.arguments
        return self.asked.arguments.taken(self.asked.batch, list(places))

    def run(self) -> tuple[Plan, frozenset[Way]]:
        """The plan, and the ways that were looked at."""
        batch = self.taken(self.places)
        tags = Tags(leaf for _, value in self._leaves(batch) for _, leaf in located(value))
        try:
            output = self.trials.full(batch)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            self.trials.full(self.asked.arguments)  # what the model raises on all rows is its own
            raise self._raises(error) from error
        finally:
            tags.put_back()
        try:
            plan = self._parted(batch, output, tags)
            if self.tokens:
                refuse_padding(self.trials, plan, self.asked, batch, self.count)
            if self.asked.batch.size > self.count:
                self._compare_sizes(plan)
            return plan, frozenset(self.trials.branches.new | self.trials.branches.irrelevant(plan.inputs))
        except (CutError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise self._raises(error) from error
        finally:
            tags.put_back()

    def _raises(self, error: Exception) -> CutError:
        """The model failed on some rows of a batch that it takes as a whole; to be raised."""
        told = f"{self.at}: run again on a few of its rows, or resumed at the cut, the model raises "
        told += f"{type(error).__name__} ({error}), which it does not do on all of them. "
        if shared := self._as_long_by_chance():
            return CutError(
                f"{told}It wants all of {' or '.join(shared)}, which is as long as the batch. Name it in broadcast= if "
                "it is the same for all rows."
            )
        return CutError(
            f"{told}What comes before the cut depends on earlier calls or on which rows are in the batch. Cut at an "
            "earlier submodule."
        )

    def _as_long_by_chance(self) -> list[str]:
        """The arguments with which a few rows run, if these are left whole."""
        batch, found = self.asked.batch, []
        for column in batch.columns:
            others = tuple(other for other in batch.columns if other is not column)
            with contextlib.suppress(Exception):
                self.trials.full(self.asked.arguments.taken(batch._replace(columns=others), self.places[1:]))
                found.append(column.path)
        return found

    def _parted(self, batch: Arguments, output: Any, tags: Tags) -> Plan:
        rows = self.places
        if any(leaf.is_nested for _, leaf in located(output)):
            raise CutError(f"{self.at}: the model returns a nested tensor. Call uncached(model).")
        self.trials.full(batch)
        tags.put_back()
        stashes = Stashes(self.model)
        trace, found = self._traced(batch)
        tags.refuse(self.at, lambda: self.trials.captured(batch))
        stashes.refuse_tensors(trace, found.capture)
        others = []
        for places in (rows[::-1], rows[:1], rows[1:]):
            others.append(self.trials.captured(self.taken(places)))
            stashes.note()
        captures = (found, *others)
        refuse_other_structures(captures)
        ghostly = self.trials.ghostly(found, batch)
        if not ghostly:
            raise CutError(
                f"{self.at}: nothing that it is given is computed by a module with parameters before it, so there is "
                "nothing to store. Cut at a later submodule."
            )
        marks = trace.all_marks([found.values[step] for step in ghostly])
        extras, marks, after = self._learned(found, ghostly, marks, trace, batch, output)
        stashes.refuse_numbers({mark.name for mark in marks if mark.kind == "module"})
        stored: list[Step | Origin] = [*ghostly, *extras]
        evidence = Evidence(
            self.asked,
            self.asking,
            captures,
            self.count,
            trace,
            self.floor,
            stored,
            marks,
            after,
            self.trials.fires,
        )
        return plan_of(self.model, evidence)

    def _traced(self, batch: Arguments) -> tuple[Trace, Captured]:
        trace = self.trace = Trace()
        named = ((Mark("parameter", name), p) for name, p in self.model.named_parameters(remove_duplicate=False))
        for mark, tensor in named:
            trace.mark([tensor], mark, given=True)
        for name, buffer in self.model.named_buffers(remove_duplicate=False):
            trace.mark([buffer], Mark("buffer", name), given=True)
        for path, value in self._leaves(batch):
            trace.mark([leaf for _, leaf in located(value)], Mark("input", path), given=True)
        with trace:
            found = self.trials.captured(batch, trace)
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

    def _leaves(self, arguments: Arguments) -> Iterator[tuple[str, Any]]:
        """Paths of all inputs, with their values in the call that the probe runs on."""
        for column in self.asked.batch.columns:
            yield column.path, value_at(arguments, column.path)
        for path, _ in self.asked.batch.shared:
            yield path, value_at(arguments, path)

    def _compare_sizes(self, plan: Plan) -> None:
        """Whether the rows come out among all of the first batch as they do among the few of the probe."""
        everything = self.asked.arguments.taken(self.asked.batch, range(self.asked.batch.size))
        found = [rows_of_capture(plan, self.trials.captured(given)) for given in (self.taken(self.places), everything)]
        for stored, some, rows in zip(plan.per_row, *found, strict=True):
            if rows.shape[1:] != some.shape[1:] or not rows_agree(rows[self.places], some, plan.floor):
                raise CutError(
                    f"{self.at}: {stored} comes out otherwise among {len(rows)} rows than among {len(some)}: rows "
                    "depend on each other, or on how many there are. Cut at an earlier submodule."
                )

    def _learned(
        self,
        found: Captured,
        ghostly: tuple[Step, ...],
        marks: frozenset[Mark],
        trace: Trace,
        batch: Arguments,
        output: Any,
    ) -> tuple[list[Origin], frozenset[Mark], set[str]]:
        """Resume, and see which other outputs are needed; the result must be that of the whole model."""
        extras: dict[Origin, None] = {}
        trials = self.trials

        def resume() -> Resume:
            values = {step: found.values[step].detach().clone() for step in ghostly}
            known = {called: mapped(output, torch.clone) for called, output in outputs.items()}
            return Resume(self.call, found.capture.templates, live, frozenset(), values, {}, known)

        outputs = found.capture.outputs if self.extra else {}
        while True:
            feeding = {(mark.name, mark.number) for mark in marks if mark.kind == "module"}
            live = frozenset(called for called in found.capture.templates if called not in feeding)
            trials.full(self.taken([self.places[0]] * self.count))  # what the first run hid away is overwritten
            run = resume()
            try:
                again = trials.finished(run, batch)
            except Exception:
                if trials.fires or not self.extra:
                    raise
                trials.fires = True
                continue
            new = [origin for origin in run.needed if origin not in extras]
            extras.update(dict.fromkeys(new))
            if not new and not trials.fires and self.extra and difference(output, again, self.floor) is not None:
                trials.fires = True  # hooks of what is skipped may hand values on (transformers' output_hidden_states)
                continue
            if not new:
                break
            needed = [dict(located(found.capture.outputs[o.path, o.number]))[o.place] for o in new]
            marks |= trace.all_marks(needed)
        if (differs := difference(output, again, self.floor)) is not None:
            raise CutError(
                f"{self.at}: resumed at the cut, the model gives something else than in full ({differs}). A value from "
                "before the cut reaches what comes after it by a way that nobody can see (a global, a closure, an "
                "object, a hook). Cut at a later submodule, or at one that comes before that."
            )
        skipped = {name for name, _ in feeding} - run.after
        refuse_kept(self.model, self.at, skipped, lambda: self._differently(resume(), batch, output))
        return list(extras), marks, run.after

    def _differently(self, run: Resume, batch: Arguments, output: Any) -> str | None:
        """In what a resumed run gives something else, or fails; the ways that it takes are none that calls take."""
        ways, self.trials.branches = self.trials.branches, Branches()
        try:
            return difference(output, self.trials.finished(run, batch), self.floor)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            self.trials.branches = ways


def probe(
    model: nn.Module, forward: Callable[..., Any], shadow: Shadow, asked: Asked, asking: Asking, tokens: bool
) -> tuple[Plan, frozenset[Way]]:
    """Part a model for this kind of call; the plan, and the ways that were looked at.

    Raises:
        CutError: that cannot be done rightly.
    """
    if asked.batch.size < 2:
        raise CutError(
            f"{asking.at}: the first batch has one row, which does not tell rows from the rest. Call it with two "
            "or more rows first, or give recycle(..., batch=...) such a batch."
        )
    values = [value for _, value in asked.arguments.bound()]
    if any(tensor.is_meta for tensor in itertools.chain(model.parameters(), model.buffers(), tensors_in(values))):
        raise CutError(
            f"{asking.at}: the model or its batch is on the meta device, where there are no values to look at. Give "
            "the weights their values first (to_empty() and load_state_dict()), and call recycle then."
        )
    with untouched(model, shadow.written):
        return _Probe(model, forward, shadow, asked, asking, tokens).run()
