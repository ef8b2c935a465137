"""Part a model at a submodule: what feeds it runs once per row, the rest runs and trains as before."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ..attached import Attached
from ..classes import ATTACHED, original_class
from ..errors import CutError, UsageError, UsageTypeError
from ..requested import requested_of
from .classes import recycled_class
from .distributed import reducer_around
from .plan import Asking
from .recycled import Recycled
from .submodules import is_never_called, nearest_names

__all__ = ["arguments_of", "check_model", "recycle"]

M = TypeVar("M", bound=nn.Module)


def recycle(
    model: M,
    at: str,
    call: int = 0,
    extra: bool = False,
    batch: Any = None,
    cut_requires_grad: bool = False,
    **options: Any,
) -> M:
    """Run what comes before a submodule once per distinct row: the same model, whose forward resumes at the cut.

    >>> import torch
    >>> from modcache import cache_of, recycle
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    >>> batch = torch.eye(3)
    >>> _ = recycle(model, at="2", batch=(batch,))
    >>> model(batch).sum().backward()
    >>> model[0].weight.grad is None, model[2].weight.grad is None
    (True, False)
    >>> cache_of(model).cut.frozen
    ('0.bias', '0.weight')

    The model is converted in place and returned; `uncached` undoes it. Everything that feeds the input of the submodule
    is the trunk: it is frozen, in eval mode for ever, and skipped for rows that are stored. Everything else, in the
    model's own forward, runs and trains as before. Recycling a recycled model moves the cut; rows of other cuts stay.

    What follows from the cut is found out from a first batch of two rows or more: ``batch=``, or that of the first
    call. Under DistributedDataParallel give ``batch=``, and recycle before wrapping.

    Args:
        model: a model that runs eagerly.
        at: the name of the submodule at whose input the model is cut, as in ``named_modules()``.
        call: which call of it, if a forward calls it several times.
        extra: whether values that go around the cut (skips of a U-Net, ``output_hidden_states``) may be stored too.
        batch: a first batch: a mapping is keywords, a tuple positional, anything else the only argument.
        cut_requires_grad: whether tensors at the cut require grad, as reentrant checkpointing of the head needs.
        **options: those of `cached_module`: ``store``, ``key``, ``broadcast``, ``version``, ``verify``.

    Returns:
        The model.

    Raises:
        CutError: it cannot be parted there: with the reason, the module at fault, and the way out (a ``ValueError``).
            A call raises it too, when it is of a kind that was not probed before or takes another way.
        UsageError, UsageTypeError: an option that cannot be right.
    """
    _check_arguments(model, at, call, extra, cut_requires_grad)
    before = model.__dict__.get(ATTACHED)
    moved = before if isinstance(before, Recycled) else None
    check_model(model, at, moved)
    asking = Asking(at, call, extra, cut_requires_grad)
    requested = requested_of(**_checked(options)) if options or moved is None else moved.requested
    hung = Recycled(_class_of(model).__name__, asking, requested, moved.memo if moved and not options else None)
    if moved is not None:
        hung.take_from(moved)
    try:
        made = recycled_class(_class_of(model))
    except TypeError as error:  # an __init_subclass__ with arguments, a final class
        raise UsageTypeError(f"recycle(...) cannot derive from {_class_of(model).__name__}: {error}") from None
    was = type(model), before
    model.__class__ = made  # type: ignore[assignment]
    model.__dict__[ATTACHED] = hung
    if batch is not None:
        args, kwargs = arguments_of(batch)
        try:
            hung.prepare(model, args, kwargs)
        except BaseException:
            model.__class__, earlier = was
            del model.__dict__[ATTACHED]
            if earlier is not None:
                model.__dict__[ATTACHED] = earlier
            raise
    return model


def arguments_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as a call: a mapping is keywords, a tuple positional, anything else the only argument."""
    if isinstance(batch, Mapping):
        return (), {str(name): value for name, value in batch.items()}
    return (tuple(batch), {}) if isinstance(batch, tuple) and not hasattr(batch, "_fields") else ((batch,), {})


def _class_of(model: nn.Module) -> type[nn.Module]:
    return original_class(type(model)) or type(model)


_NOT_HERE = {
    "prepare": "a recycled model is called with its own inputs; give it prepared ones",
    "per_row": "the rows of a recycled model are those of its batch",
    "freeze": "what feeds the cut is frozen anyway",
}


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    for name, why in _NOT_HERE.items():
        if name in options:
            raise UsageError(f"recycle(...) takes no {name}=: {why}")
    known = ("broadcast", "key", "store", "verify", "version")
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, (*known, "extra", "batch", "call", "cut_requires_grad"), 1)
            raise UsageTypeError(f"recycle(...) takes no {name}=" + (f"; did you mean {near[0]}=?" if near else ""))
    return options


def _check_arguments(model: Any, at: Any, call: Any, extra: Any, cut_requires_grad: Any) -> None:
    if not isinstance(model, nn.Module):
        raise UsageTypeError(f"recycle(...) takes an nn.Module; found {model!r}")
    if not isinstance(at, str):
        raise UsageTypeError(f"at must be the name of a submodule; found {at!r}")
    if isinstance(call, bool) or not isinstance(call, int):
        raise UsageTypeError(f"call must be a whole number; found {call!r}")
    if call < 0:
        raise UsageError(f"call must not be negative (the first call is 0); found {call}")
    for name, value in (("extra", extra), ("cut_requires_grad", cut_requires_grad)):
        if not isinstance(value, bool):
            raise UsageTypeError(f"{name} must be True or False; found {value!r}")


def check_model(model: nn.Module, at: str, moved: Recycled | None) -> None:
    """Refuse what cannot be parted, whatever is called.

    Raises:
        CutError: with the reason and the way out.
    """
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise CutError(
            f"{name} is TorchScript, whose forward cannot be parted. Recycle the model before it is scripted."
        )
    if isinstance(vars(model).get(ATTACHED), Attached):
        raise CutError(f"{name} is cached as a whole by cached_module. Call uncached(model) first.")
    if type(model).__module__.startswith(("torch._dynamo", "torch.nn.parallel", "torch.distributed")):
        what = "is compiled" if "dynamo" in type(model).__module__ else "is a wrapper around a model"
        raise CutError(f"{name} {what}. Recycle the model inside of it, before it is wrapped.")
    modules = dict(model.named_modules(remove_duplicate=False))
    if at not in modules or at == "":
        found = f"{name} has no submodule {at!r}{nearest_names(model, at)}" if at else f"{name} cannot be cut at itself"
        raise CutError(f"{found}. Give the name of a submodule, as in named_modules().")
    cut = modules[at]
    if is_never_called(cut):
        raise CutError(f"{at} is a {type(cut).__name__}, which is never called. Cut at one of its children.")
    for path, module in modules.items():
        if module is not cut and any(child is cut for child in module.modules()):
            _check_ancestor(path or name, module, model)
    if moved is None and reducer_around(model) is not None:
        raise CutError(
            f"{name} is inside of DistributedDataParallel, which waits for the gradient of each parameter that was "
            "trainable when it was made. Call recycle(model, ..., batch=...) first, and wrap the model then."
        )


def _check_ancestor(path: str, module: nn.Module, model: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise CutError(f"{path} is TorchScript, which cannot be cut inside. Cut at {path} itself, or do not script it.")
    if "forward" in vars(module):
        raise CutError(
            f"the forward of {path} was patched on the instance ({vars(module)['forward']!r}), so it cannot be cut "
            "inside. Take the patch away, cut at a submodule outside of it, or recycle first."
        )
    if vars(module).get("_compiled_call_impl") is not None or type(module).__module__.startswith("torch._dynamo"):
        raise CutError(
            f"{path} is compiled, so it cannot be cut inside. Recycle first, then compile parts of the head."
        )
    if module is not model and isinstance(vars(module).get(ATTACHED), Attached | Recycled):
        raise CutError(f"{path} is cached, so it cannot be cut inside. Call uncached(...) on it first.")
