"""What hangs on a recycled model: from a call to the plan of its kind, the rows of the trunk, and a resumed forward."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import astuple
from functools import partial
from typing import Any

import torch
from torch import nn

from ..arguments import Binder
from ..attached import Requested
from ..batch import tensors_in
from ..classes import original_class
from ..errors import CutError
from ..fingerprint import context
from ..memo import Bypass, Memo
from ..modes import current_mode
from ..notices import log
from ..opening import open_store
from ..selfcheck import preserved_randomness
from .axes import from_rows
from .branches import Branch, Branches
from .cache import RecycledCache
from .captures import capture, refuse_coupled, rows_of_capture, shapes_of
from .distributed import reducer_around
from .ghosts import Ghost, Origin, unwrapped
from .kinds import Asked, asked_of, inputs_of, with_inputs
from .plan import Asking, Plan, Shapes
from .probe import probe
from .runs import Capture, Resume
from .shadow import Shadow, current, running
from .trees import fill_inside, mapped
from .trunk import Parted, ProbedMemo, TrunkAttached, capturing

__all__ = ["Recycled"]


class _Local(threading.local):
    shadow: Shadow | None = None
    plain: bool = False


class Recycled:
    """What hangs on a recycled model. It does not hold the model.

    Args:
        name: the class name of the model.
        asking: where it is cut.
        requested: how the rows of its trunk are cached.
        memo: shared with the model that this one is a copy of.
    """

    def __init__(self, name: str, asking: Asking, requested: Requested, memo: Memo | None = None) -> None:
        self.asking, self.requested = asking, requested
        self.closed = False
        if memo is None:
            store, advice = open_store(requested.store)
            memo = ProbedMemo(name, requested.options, store)
            if advice is not None:
                memo.say("directory unusable", advice)
        self.memo = memo
        self.plans: dict[tuple[object, ...], Plan] = {}
        self.grads: dict[str, bool] = {}  # what freezing changed, by name
        self.modes: dict[str, bool] = {}
        self.parted: dict[tuple[object, ...], Parted] = {}
        self._shapes: dict[tuple[object, ...], Shapes] = {}
        self._ways: dict[tuple[object, ...], set[Branch]] = {}
        self.written: set[tuple[int, str]] = set()  # attributes of ancestors that a forward sets
        self._binder: Binder | None = None
        self._lock = threading.RLock()
        self._local = _Local()

    # --- copies

    def __deepcopy__(self, copies: dict[int, Any]) -> Recycled:
        """A copy counts for itself, and shares the store and what was found out."""
        memo = ProbedMemo(self.memo.name, self.memo.options, self.memo.store)
        other = Recycled(self.memo.name, self.asking, self.requested, memo)
        other.plans, other.closed = dict(self.plans), self.closed
        other.grads, other.modes = dict(self.grads), dict(self.modes)
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle holds what was asked for, and neither rows nor findings."""
        given = astuple(self.asking)
        return _restored, (self.memo.name, given, self.requested, self.grads, self.modes, self.closed)

    # --- the verbs

    def prepare(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Probe calls like this one now."""
        kwargs.pop("cache_keys", None)
        cls = original_class(type(model))
        assert cls is not None
        self.plan_of(model, cls, self._asked(cls, args, kwargs))

    def take_from(self, other: Recycled) -> None:
        """What another cut froze stays frozen, until it is known what this one freezes."""
        self.grads, self.modes = dict(other.grads), dict(other.modes)

    def undo(self, module: nn.Module) -> None:
        """Put back modes and gradients."""
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for name in self.grads:
            if name in parameters:
                parameters[name].requires_grad_(True)
        modules = dict(module.named_modules(remove_duplicate=False))
        for name, training in self.modes.items():
            if name in modules:
                modules[name].training = training

    def seen_through(self, module: nn.Module) -> RecycledCache:
        """What `cache_of` gives."""
        return RecycledCache(module, self)

    def trunk_call(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Parted, dict[str, Any]]:
        """The trunk, and what it would be called with on such a call.

        Raises:
            CutError: calls of this kind were not probed yet.
        """
        keys = kwargs.pop("cache_keys", None)
        cls = original_class(type(model))
        assert cls is not None
        asked = self._asked(cls, args, kwargs)
        plan = self.plans.get(asked.kind)
        if plan is None:
            raise CutError(
                f"{self.asking.at}: calls with these keywords, flags, dtypes and ranks were not probed yet, so nothing "
                "is stored of them. Call the model so once, or give recycle(..., batch=...)."
            )
        if asked.kind not in self.parted:
            self.part(model, asked.kind, plan)
        return self.parted[asked.kind], self._inputs(plan, asked, keys)

    def _inputs(self, plan: Plan, asked: Asked, keys: Any) -> dict[str, Any]:
        named = {} if keys is None else {"cache_keys": keys}
        return {**inputs_of(asked, frozenset(plan.inputs)), "call of the kind": plan.tag, **named}

    def moved(self) -> None:
        """The model is being moved or cast: nothing that depends on where it was may be kept."""
        for parted in self.parted.values():
            parted.attached.moved()
        self._shapes.clear()

    # --- a call

    def forward(self, model: nn.Module, cls: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model's forward gives, from the stored values at the cut on."""
        keys = kwargs.pop("cache_keys", None)
        run = partial(cls.forward, model)
        if self._local.plain or current() is not None:
            return run(*args, **kwargs)
        asked = self._asked(cls, args, kwargs)
        if asked.batch.size == 0:
            return run(*args, **kwargs)
        plan = self.plan_of(model, cls, asked)
        if plan is None or self.closed or current_mode() == "off":
            return self._plain(run, args, kwargs, asked.batch.size)
        return self._resumed(model, cls, plan, asked, keys)

    def _plain(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Any:
        reason = "closed" if self.closed else "mode off" if current_mode() == "off" else "one row of a new kind of call"
        self._local.plain = True
        try:
            output = run(*args, **kwargs)
        finally:
            self._local.plain = False
        self.memo.count(None, rows, bypassed=rows, reason=reason)
        return output

    def _asked(self, cls: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Asked:
        if self._binder is None:
            self._binder = Binder(partial(cls.forward, None))
        arguments = self._binder(args, kwargs)
        return asked_of(arguments, self.requested.broadcast, self.memo.name)

    def shadow(self, model: nn.Module) -> Shadow:
        """The shadow of the model in this thread."""
        found = self._local.shadow
        if found is None or not found.is_current():
            found = self._local.shadow = Shadow(model, model.get_submodule(self.asking.at), self.written)
        return found

    def plan_of(self, model: nn.Module, cls: type[nn.Module], asked: Asked) -> Plan | None:
        """How calls of this kind are parted; probed now if that is not known, ``None`` if it cannot be."""
        plan = self.plans.get(asked.kind)
        if plan is not None and (parted := self.parted.get(asked.kind)) is not None:
            if parted.is_current():
                return plan
            self._forget_plans()  # a module of the trunk was exchanged
            plan = None
        with self._lock:
            if plan is None and (plan := self.plans.get(asked.kind)) is None:
                if asked.batch.size < 2 and self.plans and not torch.is_grad_enabled():
                    return None
                plan = self._probed(model, cls, asked)
            if asked.kind not in self.parted:
                self.part(model, asked.kind, plan)
        return plan

    def _forget_plans(self) -> None:
        with self._lock:
            self.plans.clear()
            self.parted.clear()
            self._shapes.clear()
            self._ways.clear()

    def _probed(self, model: nn.Module, cls: type[nn.Module], asked: Asked) -> Plan:
        self._local.plain = True
        try:
            asking = self.asking
            shadow, tokens = self.shadow(model), self.memo.options.extractor.name == "tokens"
            plan, ways = probe(model, cls.forward, shadow, asked, asking, tokens)
        finally:
            self._local.plain = False
        self._ways.setdefault(asked.kind, set()).update(ways)
        self._refuse_grad(plan, asked)
        self._refuse_scripted(model, plan)
        late = [name for name in plan.frozen if model.get_parameter(name).requires_grad]
        if late and (around := reducer_around(model)) is not None:
            raise CutError(
                f"{asking.at}: {', '.join(late[:3])} would be frozen now, but {around} was put around the model, "
                "and waits for its gradient in each step. Call recycle(model, ..., batch=...) before wrapping it."
            )
        return plan

    def _refuse_scripted(self, model: nn.Module, plan: Plan) -> None:
        if self.requested.version is not None:
            return
        for path in plan.trunk:
            for name, module in model.get_submodule(path).named_modules(prefix=path):
                if isinstance(module, torch.jit.ScriptModule):
                    raise CutError(
                        f"{name}, which feeds the cut, is TorchScript, of which the code and the weights cannot be "
                        "read. Give version= to name them yourself, or cut at an earlier submodule."
                    )

    def part(self, model: nn.Module, kind: tuple[object, ...], plan: Plan) -> None:
        """Part the model as planned, and freeze what feeds the cut."""
        attached = TrunkAttached(self.requested, self.memo)
        parted = Parted(model, plan, attached)
        self.plans[kind] = plan
        self._freeze(model, plan)
        self.parted[kind] = parted

    def _freeze(self, model: nn.Module, plan: Plan) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        before = [name for name in plan.frozen if name in parameters and parameters[name].requires_grad]
        for name in before:
            self.grads[name] = True
        for name in before:
            parameters[name].requires_grad_(False)
        for name in [name for name in self.grads if not any(name in known.frozen for known in self.plans.values())]:
            del self.grads[name]  # a cut before this one froze it, and this one does not
            if name in parameters:
                parameters[name].requires_grad_(True)
        self.keep_in_eval(model, plan)
        if before:
            log.info("%s: frozen, because they feed the cut %s: %s", self.memo.name, plan.at, ", ".join(before))
        outside = [name for name in before if not _in_trunk(name, plan)]
        if outside:
            same = {id(parameters[name]): name for name in plan.frozen if name not in outside}
            shown = [
                f"{name} (tied to {same[id(parameters[name])]})" if id(parameters[name]) in same else name
                for name in outside
            ]
            self.memo.say(
                "frozen with the trunk",
                f"frozen, because they feed the cut {plan.at}: {', '.join(shown)}. They were trainable, and are no "
                "part of the modules before the cut; cache_of(model).cut lists all that is frozen.",
            )

    def keep_in_eval(self, model: nn.Module, plan: Plan | None = None) -> None:
        """Put what only feeds the cut into eval mode, whatever the rest of the model is in."""
        for one in [plan] if plan is not None else list(self.plans.values()):
            for path in one.trunk:
                if path in one.twins:
                    continue
                for name, module in model.get_submodule(path).named_modules(prefix=path):
                    if module.training:
                        self.modes[name] = True
                        module.training = False

    def _refuse_grad(self, plan: Plan, asked: Asked) -> None:
        for path, value in inputs_of(asked, frozenset(plan.inputs)).items():
            if any(tensor.requires_grad for tensor in tensors_in(value)):
                raise CutError(
                    f"{self.memo.name}: its argument {path} needs grad, but it feeds the cut {plan.at}, and what is "
                    "stored passes no gradient on. Detach it, cut at an earlier submodule, or call uncached(model)."
                )

    # --- trunk and head

    def _resumed(self, model: nn.Module, cls: type[nn.Module], plan: Plan, asked: Asked, keys: Any) -> Any:
        if torch.is_grad_enabled():
            self._refuse_grad(plan, asked)
        shadow, parted = self.shadow(model), self.parted[asked.kind]
        inputs = inputs_of(asked, frozenset(plan.inputs))
        sizes: tuple[object, ...] = (asked.kind, asked.sizes, context())
        made: list[Shapes] = []
        known = self._ways.setdefault(asked.kind, set())
        ways = Branches(known)

        def run(given: dict[str, Any]) -> Any:
            rows = _count(asked, given)
            whole = all(given.get(path) is value for path, value in inputs.items())
            arguments = asked.arguments if whole else with_inputs(asked, given, rows)
            with preserved_randomness():  # what a hit does not draw, a miss must not draw either
                found = capture(Capture(plan.call, plan.extras), shadow, cls.forward, arguments, plan.at, ways)
            if not made and rows_fit(asked, given):
                made.append(shapes_of(plan, found, rows))
            rows_made = rows_of_capture(plan, found)
            if ways.new:
                if asked.batch.size == 1:  # alone it is right, but nobody knows of it among others
                    raise Bypass("took a new way alone", None, rows_made)
                refuse_coupled(plan, shadow, cls.forward, asked, ways)
                known.update(ways.new)
                ways.new.clear()
            return rows_made

        parted.take_over(self.written)
        with capturing(run):
            stored = parted.attached.forward(parted.trunk, type(parted.trunk), (), self._inputs(plan, asked, keys))
            sizes = (*sizes, parted.attached.state)
            shapes = self._shapes.get(sizes)
            if made and (shapes is None or plan.shared):
                shapes = made[0]
                self._remember(sizes, shapes)
            elif shapes is None:
                run({path: _one(asked, path, value) for path, value in inputs.items()})
                shapes = made[0]
                self._remember(sizes, shapes)
        return self._head(shadow, cls, plan, asked, shapes, stored, ways)

    def _remember(self, sizes: tuple[object, ...], shapes: Shapes) -> None:
        if len(self._shapes) >= 512:
            self._shapes.clear()
        self._shapes[sizes] = shapes

    def _head(
        self,
        shadow: Shadow,
        cls: type[nn.Module],
        plan: Plan,
        asked: Asked,
        shapes: Shapes,
        stored: Any,
        ways: Branches,
    ) -> Any:
        tensors = {}
        for kept, rows in zip(plan.per_row, stored, strict=True):
            assert kept.axis is not None
            tensors[kept.source] = from_rows(rows, kept.axis)
        for source, value in shapes.shared.items():
            tensors[source] = value.clone()
        if self.asking.cut_requires_grad and torch.is_grad_enabled():
            for value in tensors.values():
                if value.is_floating_point():
                    value.requires_grad_()
        values = {source: value for source, value in tensors.items() if not isinstance(source, Origin)}
        extras = {source: value for source, value in tensors.items() if isinstance(source, Origin)}
        templates = shapes.scaled(plan, asked.batch.size)
        run = Resume(plan.call, templates, plan.live, plan.twins, values, extras)
        shadow.take_over()
        shadow.skipped = plan.skipped
        arguments = asked.arguments
        try:
            run.branches, run.fires = ways, plan.fires
            with running(run), run.watched():
                output = cls.forward(shadow.root, *arguments.args, **arguments.kwargs)
                output = mapped(output, unwrapped, Ghost)
                fill_inside(output, unwrapped, Ghost)
        except Exception:
            if run.error is not None:
                raise run.error from None
            raise
        finally:
            shadow.hand_back()
        if run.error is not None:
            raise run.error
        if ways.new and asked.batch.size > 1:
            refuse_coupled(plan, shadow, cls.forward, asked, ways)
            self._ways[asked.kind].update(ways.new)
        if not run.reached:
            raise CutError(
                f"{plan.at} was not called on this call, though it was when such a call was probed: it is skipped "
                "by chance (layer drop), in training, or by values. Switch that off, or cut at another submodule."
            )
        return output


def _count(asked: Asked, given: dict[str, Any]) -> int:
    for column in asked.batch.columns:
        if column.path in given:
            return 1 if column.single else len(given[column.path])
    return asked.batch.size


def rows_fit(asked: Asked, given: dict[str, Any]) -> bool:
    """Whether rows have the sizes that they were given with: token rows are trimmed."""
    for column in asked.batch.columns:
        value = given.get(column.path)
        if isinstance(value, torch.Tensor) and value.shape[1:] != column.value.shape[1:]:
            return False
    return True


def _one(asked: Asked, path: str, value: Any) -> Any:
    """An input with its first row alone."""
    for column in asked.batch.columns:
        if column.path == path:
            return value if column.single else value[:1]
    return value


def _in_trunk(name: str, plan: Plan) -> bool:
    return name in plan.direct or any(name.startswith(f"{path}.") for path in plan.trunk)


def _restored(
    name: str,
    given: tuple[str, int, bool, bool],
    requested: Requested,
    grads: dict[str, bool],
    modes: dict[str, bool],
    closed: bool,
) -> Recycled:
    made = Recycled(name, Asking(*given), requested)
    made.grads, made.modes, made.closed = grads, modes, closed
    return made
