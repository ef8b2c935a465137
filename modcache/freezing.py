"""Freeze a module, and put back what that changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn

__all__ = [
    "Before",
    "freeze_copy",
    "freeze_module",
    "freeze_replaced",
    "frozen_around",
    "frozen_within",
    "handed_in",
    "handed_over",
    "parameters_of",
    "thaw",
]

_frozen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_COPYING = ("__setstate__", "__reduce_ex__", "__reduce__")


Flags = tuple[tuple[str, bool], ...]


@dataclass(frozen=True, slots=True)
class Before:
    """What freezing changed, by name, so that it can be undone, also in a copy of the module."""

    training: Flags
    requires_grad: Flags


def freeze_module(module: nn.Module) -> Before:
    """Switch off its gradients, put it into eval mode, and say what was.

    Gradients of before are dropped: with one, momentum and weight decay would go on moving what is frozen.
    """
    before = Before(
        tuple((name, child.training) for name, child in module.named_modules(remove_duplicate=False)),
        tuple((name, value.requires_grad) for name, value in module.named_parameters(remove_duplicate=False)),
    )
    for parameter in module.parameters():
        parameter.requires_grad = False  # a lazy parameter has no `requires_grad_`
        parameter.grad = None
    module.eval()
    _frozen.add(module)
    return before


def freeze_copy(module: nn.Module) -> None:
    """Put into eval mode, in a copy of a frozen module, what came out in training mode because it made itself anew.

    A layer with a state of its own (those of einops) calls its ``__init__`` when it is copied or unpickled.
    """
    for child in module.modules():
        cls = type(child)
        if child.training and any(getattr(cls, name) is not getattr(nn.Module, name) for name in _COPYING):
            child.training = False


def parameters_of(module: nn.Module) -> dict[str, weakref.ref[nn.Parameter]]:
    """Its parameters by name, without holding them."""
    return {name: weakref.ref(value) for name, value in module.named_parameters(remove_duplicate=False)}


def freeze_replaced(module: nn.Module, before: Mapping[str, weakref.ref[nn.Parameter]]) -> None:
    """Freeze the parameters that stand in the places of others by now, which were frozen.

    Whoever builds a module may load its weights into new parameters when it is built (``from_pretrained`` does).
    """
    for name, value in module.named_parameters(remove_duplicate=False):
        if name in before and before[name]() is not value:
            value.requires_grad_(False)


def thaw(module: nn.Module, before: Before, but: Collection[str] = ()) -> None:
    """Put back what freezing changed, as far as the module still has it, but in these parts of it."""
    _frozen.discard(module)
    children = dict(module.named_modules(remove_duplicate=False))
    for name, training in before.training:
        if name in children and not _is_in(name, but):
            children[name].training = training
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, requires_grad in before.requires_grad:
        if name in parameters and not _is_in(name, but):
            parameters[name].requires_grad_(requires_grad)


def _is_in(name: str, parts: Collection[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def frozen_around(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The frozen modules that contain this one, the innermost first, each with the name that it has there."""
    found = [
        (name, outer)
        for outer in tuple(_frozen)
        if outer is not module
        for name, child in outer.named_modules()
        if child is module
    ]
    return sorted(found, key=lambda place: place[0].count("."))


def frozen_within(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The frozen modules that this one contains, with the names that they have there."""
    return [(name, child) for name, child in module.named_modules() if name and child in _frozen]


# Freezing only switches off, so what was on before either of two is what was on before both, whichever came first.


def handed_over(before: Before, inner: Before, name: str) -> Before:
    """What freezing a module changed, and freezing one inside of it, of this name, that is undone first."""
    return _either(before, inner, str, partial(_inside, name))


def handed_in(before: Before, outer: Before, name: str) -> Before:
    """What freezing a module, which has this name in one around it that is undone first, and freezing that changed."""
    return _either(before, outer, partial(_inside, name), str)


def _inside(name: str, place: str) -> str:
    return f"{name}.{place}" if place else name


def _either(before: Before, other: Before, mine: Callable[[str], str], its: Callable[[str], str]) -> Before:
    """What was on before either of two; these say of their places by which name both know them."""

    def merged(own: Flags, theirs: Flags) -> Flags:
        on = {its(place) for place, value in theirs if value}
        return tuple((place, value or mine(place) in on) for place, value in own)

    return Before(merged(before.training, other.training), merged(before.requires_grad, other.requires_grad))
