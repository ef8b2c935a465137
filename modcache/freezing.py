"""Freeze a module, and put back what that changed."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

__all__ = ["Before", "freeze_module", "freeze_replaced", "parameters_of", "thaw"]


@dataclass(frozen=True, slots=True)
class Before:
    """What freezing changed, by name, so that it can be undone, also in a copy of the module."""

    training: tuple[tuple[str, bool], ...]
    requires_grad: tuple[tuple[str, bool], ...]


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
    children = dict(module.named_modules(remove_duplicate=False))
    for name, training in before.training:
        if name in children:
            children[name].training = training
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, requires_grad in before.requires_grad:
        if name in parameters:
            parameters[name].requires_grad_(requires_grad)
