"""What hangs on a recycled model: from a call to the plan of its kind, the rows of the trunk, and a resumed forward."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import astuple
from functools import partial
from typing import Any

import torch
from torch import nn

from ..arguments import Binder
from ..batch import tensors_in
from ..classes import original_class
from ..errors import CutError
from ..memo import Memo
from ..opening import open_store
from ..refusals import unusual
from ..requested import Requested
from .cache import RecycledCache
from .distributed import reducer_around
from .forms import Form, key_of
from .frozen import Frozen
from .kinds import Asked, asked_of, inputs_of, owned
from .plan import Asking, Plan
from .probe import probe
from .resuming import Call, Resuming, given_to_trunk
from .shadow import Shadow
from .trunk import Parted, TrunkAttached, probed_memo

__all__ = ["Recycled"]


_KINDS = 64
_FORMS = 512


class _Local(threading.local):
    shadow: Shadow | None = None
    inside: bool = False


class Recycled:
    """What hangs on a recycled model. The shadows of it do hold the model, which is freed when garbage is collected.

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
            memo = probed_memo(name, requested.options, store)
            if advice is not None:
                memo.say("directory unusable", advice)
        self.memo = memo
        self.plans: dict[tuple[object, ...], Plan] = {}
        self.frozen = Frozen()
        self.parted: dict[tuple[object, ...], Parted] = {}
        self._resuming = Resuming(asking.cut_requires_grad)
        self._forms: dict[tuple[object, ...], Form] = {}
        self.written: set[tuple[int, str]] = set()  # attributes of ancestors that a forward sets
        self._binder: Binder | None = None
        self._lock = threading.RLock()
        self._local = _Local()

    # --- copies

    def __deepcopy__(self, copies: dict[int, Any]) -> Recycled:
        """A copy counts for itself, and shares the store and what was found out."""
        memo = probed_memo(self.memo.name, self.memo.options, self.memo.store)
        other = Recycled(self.memo.name, self.asking, self.requested, memo)
        other.plans, other.closed = dict(self.plans), self.closed
        other.frozen = self.frozen.copy()
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle holds what was asked for, and neither rows nor findings."""
        given = astuple(self.asking)
        return _restored, (self.memo.name, given, self.requested, self.frozen, self.closed)

    # --- the verbs

    def prepare(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Probe calls like this one now."""
        kwargs.pop("cache_keys", None)
        cls = original_class(type(model))
        assert cls is not None
        self.plan_of(model, cls, self._asked(cls, args, kwargs))

    def take_from(self, other: Recycled) -> None:
        """What another cut froze stays frozen, until it is known what this one freezes."""
        self.frozen = other.frozen.copy()

    def undo(self, module: nn.Module) -> None:
        """Put back modes and gradients."""
        self.frozen.undo(module)

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
        parted = self.parted.get(asked.kind) or self.part(model, asked.kind, plan)
        return parted, given_to_trunk(plan, inputs_of(asked, plan.wanted), keys)

    def moved(self) -> None:
        """The model is being moved or cast: nothing that depends on where it was may be kept."""
        for parted in self.parted.values():
            parted.attached.moved()
        self._forget()

    def _forget(self) -> None:
        self._forms.clear()
        self._resuming.forget()

    # --- a call

    def forward(self, model: nn.Module, cls: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model's forward gives, from the stored values at the cut on."""
        keys = kwargs.pop("cache_keys", None)
        local = self._local
        if local.inside:  # the model calls itself, or is being probed
            return cls.forward(model, *args, **kwargs)
        strange = unusual(model)
        if strange is not None and strange != "mode off":
            return self._strangely(strange, partial(cls.forward, model), args, kwargs)
        local.inside = True
        try:
            key = None if strange is not None or self.closed else key_of(args, kwargs)
            form, shadow = None if key is None else self._forms.get(key), local.shadow
            if (
                form is not None
                and shadow is not None
                and shadow.model is model
                and shadow.follow()
                and form.parted.is_in_step(shadow.stamp)
            ):  # nothing was changed about the model since a call like this one
                asked: Asked | Callable[[], Asked] = partial(self._asked, cls, args, kwargs)
                inputs = form.inputs(args, kwargs)
            else:
                asked = self._asked(cls, args, kwargs)
                if asked.batch.size == 0:
                    return cls.forward(model, *args, **kwargs)
                found = self.plan_of(model, cls, asked)
                if found is None or self.closed or strange is not None:
                    reason = strange or ("closed" if self.closed else "one row of a new kind of call")
                    return self._in_full(reason, partial(cls.forward, model), args, kwargs, asked.batch.size)
                plan, parted = found
                shadow, inputs = self.shadow(model), inputs_of(asked, plan.wanted)
                parted.follow(shadow, self.written)
                form = Form(asked, plan, parted, inputs, self._resuming.ways(asked.kind))
                # The model's own code may take things out of what it is given, and is yet to be given it.
                asked = asked._replace(arguments=owned(asked.arguments))
                if key is not None:
                    self._note(key, form)
            if torch.is_grad_enabled():
                self._refuse_grad(form.plan, inputs)
            return self._resuming(Call(form, asked, shadow, cls.forward, inputs, keys), args, kwargs)
        finally:
            local.inside = False

    def _note(self, key: tuple[object, ...], form: Form) -> None:
        if len(self._forms) >= _FORMS:
            self._forms.clear()
        self._forms[key] = form

    def _strangely(
        self, reason: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not self.plans and torch.is_grad_enabled():
            raise CutError(
                f"{self.memo.name}: its first call is under {reason}, where nobody can find out what feeds the cut "
                f"{self.asking.at}, and so what to freeze. Give recycle(..., batch=...), or call the model once before."
            )
        return self._in_full(reason, forward, args, kwargs, 1)

    def _in_full(
        self, reason: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], rows: int
    ) -> Any:
        output = forward(*args, **kwargs)
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
        if found is None or found.model is not model or not found.follow():
            found = self._local.shadow = Shadow(model, model.get_submodule(self.asking.at), self.written)
            found.follow()
        return found

    def plan_of(self, model: nn.Module, cls: type[nn.Module], asked: Asked) -> tuple[Plan, Parted] | None:
        """How calls of this kind are parted; probed now if that is not known, ``None`` if it cannot be."""
        plan, parted = self.plans.get(asked.kind), self.parted.get(asked.kind)
        if plan is not None and parted is not None and parted.is_current():
            return plan, parted
        with self._lock:
            plan, parted = self.plans.get(asked.kind), self.parted.get(asked.kind)
            if parted is not None and not parted.is_current():  # a module of the trunk was exchanged
                self.plans.clear()
                self.parted.clear()
                self.written.clear()
                self._forget()
                plan = parted = None
            if plan is None:
                if asked.batch.size < 2 and self.plans and not torch.is_grad_enabled():
                    return None
                if len(self.plans) >= _KINDS:
                    raise CutError(
                        f"{self.memo.name}: its calls are of more than {_KINDS} kinds, so a number or a text among "
                        "the arguments is another one in each call, and each kind is probed. Pass it as a tensor."
                    )
                plan = self._probed(model, cls, asked)
            return plan, self.parted.get(asked.kind) or self.part(model, asked.kind, plan)

    def _probed(self, model: nn.Module, cls: type[nn.Module], asked: Asked) -> Plan:
        tokens, before = self.memo.options.extractor.name == "tokens", self._local.inside
        self._local.inside = True
        try:
            plan, ways = probe(model, cls.forward, self.shadow(model), asked, self.asking, tokens)
        finally:
            self._local.inside = before
        self._refuse_grad(plan, inputs_of(asked, plan.wanted))
        self._refuse_scripted(model, plan)
        late = [name for name in plan.frozen if model.get_parameter(name).requires_grad]
        if late and (around := reducer_around(model)) is not None:
            raise CutError(
                f"{plan.at}: {', '.join(late[:3])} would be frozen now, but {around} is around the model, and waits "
                "for its gradient in each step. Call recycle(model, ..., batch=...) before wrapping it."
            )
        self._resuming.ways(asked.kind).learn(ways)
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

    def part(self, model: nn.Module, kind: tuple[object, ...], plan: Plan) -> Parted:
        """Part the model as planned, and freeze what feeds the cut."""
        parted = Parted(model, plan, TrunkAttached(self.requested, self.memo))
        self.plans[kind] = plan
        self.frozen.freeze(model, plan, self.plans.values(), self.memo)
        self.parted[kind] = parted
        return parted

    def after_train(self, model: nn.Module) -> None:
        """The model was put into training or eval mode; the trunk stays in eval mode."""
        self.frozen.after_train(model, self.plans.values())

    def _refuse_grad(self, plan: Plan, inputs: Mapping[str, Any]) -> None:
        for path, value in inputs.items():
            if any(tensor.requires_grad for tensor in tensors_in(value)):
                raise CutError(
                    f"{self.memo.name}: its argument {path} needs grad, but it feeds the cut {plan.at}, and what is "
                    "stored passes no gradient on. Detach it, cut at an earlier submodule, or call uncached(model)."
                )


def _restored(
    name: str, given: tuple[str, int, bool, bool], requested: Requested, frozen: Frozen, closed: bool
) -> Recycled:
    made = Recycled(name, Asking(*given), requested)
    made.frozen, made.closed = frozen, closed
    return made
