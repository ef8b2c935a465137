"""Freeze a module, and put back what that changed."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

__all__ = ["Before", "freeze_module", "freeze_replaced", "frozen_around", "handed_over", "parameters_of", "thaw"]

_frozen: weakref.WeakSet[nn.Module] = weakref.WeakSet()


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


def thaw(module: nn.Module, before: Before) -> None:
    """Put back what freezing changed, as far as the module still has it."""
    _frozen.discard(module)
    children = dict(module.named_modules(remove_duplicate=False))
    for name, training in before.training:
        if name in children:
            children[name].training = training
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, requires_grad in before.requires_grad:
        if name in parameters:
            parameters[name].requires_grad_(requires_grad)


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


def handed_over(before: Before, inner: Before, name: str) -> Before:
    """What freezing a module changed, given what freezing one inside of it, of this name, had changed earlier."""

    def merged(
        own: tuple[tuple[str, bool], ...], earlier: tuple[tuple[str, bool], ...]
    ) -> tuple[tuple[str, bool], ...]:
        restored = {f"{name}.{place}" if place else name: value for place, value in earlier}
        return tuple((place, restored.get(place, value)) for place, value in own)

    return Before(merged(before.training, inner.training), merged(before.requires_grad, inner.requires_grad))
