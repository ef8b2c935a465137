"""Why a call is run as if uncached, whatever its arguments: the process, or how the module stands."""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from .fingerprint import Standing
from .memo import Bypass
from .modes import current_mode

__all__ = ["refuse_standing", "unusual"]


def unusual(module: nn.Module) -> str | None:
    """What keeps a call from being cached, whatever the module is now."""
    if current_mode() == "off":
        return "mode off"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform"
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"  # a row has no tangent
    if torch._C._len_torch_function_stack() and not _only_a_device():
        return "a function mode"
    return "a DataParallel replica" if "_is_replica" in module.__dict__ else None


def _only_a_device() -> bool:
    """Whether the function modes that are on say no more than where new tensors lie (`torch.set_default_device`)."""
    modes = map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))
    return all(type(mode) is DeviceContext for mode in modes)


def refuse_standing(standing: Standing, grad: bool, *, versioned: bool, frozen: bool) -> None:
    """Bypass a module whose rows would not be what it gives, or would be missed by autograd.

    Args:
        standing: how the module stands.
        grad: whether grad mode is on.
        versioned: whether a ``version=`` stands for weights that cannot be read.
        frozen: whether it was wrapped with ``freeze=True``.
    """
    if standing.lazy:
        raise Bypass("not materialised")
    if standing.trainable is not None and grad:
        remedy = (
            "It was added, or made trainable, after freeze=True: call requires_grad_(False) on it"
            if frozen
            else "Wrap it with freeze=True"
        )
        raise Bypass(
            "trainable parameters",
            f"{standing.trainable} is trainable and grad mode is on, so it runs uncached. {remedy} if it is not "
            "trained, or call it under torch.no_grad().",
        )
    if standing.training is not None:
        raise Bypass(
            "training mode",
            f"{standing.training} is in training mode, where its rows may be random or depend on each other, so it "
            f"runs uncached. Call eval() on it{'' if frozen else ', or wrap it with freeze=True'}.",
        )
    if standing.unreadable and not versioned:
        raise Bypass(
            "weights cannot be read",
            f"the values of {', '.join(standing.unreadable[:3])} cannot be read (meta, sparse, sharded, offloaded, "
            "freed, or of a scripted module), so it runs uncached. Give version= to name these weights yourself.",
        )
    if standing.restless:
        raise Bypass(
            "weights keep moving",
            "its weights were written three times in a row without a change, and each time they had to be digested "
            "again, so it runs uncached until they lie still. Find what writes them, or give the module a copy.",
        )
