"""Freeze what feeds a cut, keep it in eval mode, and put back what that changed."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..memo import Memo
from ..notices import log
from .plan import Plan

__all__ = ["Frozen"]


class Frozen:
    """What freezing changed about a model, by name, so that it can be undone, also in a copy of the model.

    Args:
        grads: parameters that were trainable.
        modes: the modes that modules would be in.
    """

    def __init__(self, grads: Iterable[str] = (), modes: Iterable[tuple[str, bool]] = ()) -> None:
        self._grads = set(grads)
        self._modes = dict(modes)

    def copy(self) -> Frozen:
        """The same, for a copy of the model, or for another cut of it."""
        return Frozen(self._grads, self._modes.items())

    def __reduce__(self) -> tuple[type[Frozen], tuple[list[str], list[tuple[str, bool]]]]:
        """Names."""
        return Frozen, (sorted(self._grads), sorted(self._modes.items()))

    def freeze(self, model: nn.Module, plan: Plan, plans: Iterable[Plan], memo: Memo) -> None:
        """Freeze what feeds a cut, and let learn again what a cut before it froze and this one does not.

        Gradients of before are dropped: with one, momentum and weight decay would go on moving what is frozen.

        Args:
            model: the model.
            plan: of the latest kind of call.
            plans: of all kinds of calls, this one among them.
            memo: to tell what was trainable and is no longer.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        trainable = [name for name in plan.frozen if name in parameters and parameters[name].requires_grad]
        for name in trainable:
            self._grads.add(name)
        for name in trainable:
            parameters[name].requires_grad_(False).grad = None
        still = {name for known in plans for name in known.frozen}
        for name in self._grads - still:
            self._grads.discard(name)
            if name in parameters:
                parameters[name].requires_grad_(True)
        for name, module in _modules(model, [plan]):
            if module.training:
                self._modes[name] = True
                module.training = False
        self._tell(parameters, trainable, plan, memo)

    def _tell(self, parameters: dict[str, nn.Parameter], trainable: list[str], plan: Plan, memo: Memo) -> None:
        if trainable:
            log.info("%s: frozen, because they feed the cut %s: %s", memo.name, plan.at, ", ".join(trainable))
        outside = [name for name in trainable if not _in_trunk(name, plan)]
        if not outside:
            return
        same = {id(parameters[name]): name for name in plan.frozen if name in parameters and name not in outside}
        shown = [f"{name} (tied to {same[key]})" if (key := id(parameters[name])) in same else name for name in outside]
        memo.say(
            "frozen with the trunk",
            f"frozen, because they feed the cut {plan.at}: {', '.join(shown)}. They were trainable, and are no part of "
            "the modules before the cut; cache_of(model).cut lists all that is frozen.",
        )

    def after_train(self, model: nn.Module, plans: Iterable[Plan]) -> None:
        """The model was put into a mode: note what its trunk would be in now, and put that into eval again."""
        for name, module in _modules(model, plans):
            self._modes[name] = module.training
            module.training = False

    def undo(self, model: nn.Module) -> None:
        """Put back gradients and modes, as far as the model still has the names."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name in self._grads & parameters.keys():
            parameters[name].requires_grad_(True)
        modules = dict(model.named_modules(remove_duplicate=False))
        for name in self._modes.keys() & modules.keys():
            modules[name].training = self._modes[name]


def _modules(model: nn.Module, plans: Iterable[Plan]) -> list[tuple[str, nn.Module]]:
    """The modules that only feed the cut, each once."""
    found: dict[int, tuple[str, nn.Module]] = {}
    names = dict(model.named_modules(remove_duplicate=False))
    for path, both in {(path, plan.both) for plan in plans for path in plan.trunk}:
        if path in names:
            for name, module in names[path].named_modules(prefix=path):
                if name not in both:
                    found.setdefault(id(module), (name, module))
    return list(found.values())


def _in_trunk(name: str, plan: Plan) -> bool:
    return name in plan.direct or any(name.startswith(f"{path}.") for path in plan.trunk)
