"""Ask which cut of a model pays: choose candidates, part the model at each, time it, and work out the advice."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..arguments import Binder
from ..errors import CutError, UsageError, UsageTypeError
from ..recycling import arguments_of
from ..recycling.kinds import asked_of
from ..recycling.runs import Called
from ..recycling.trees import located, mapped
from ..stores.budget import shared_budget
from ..wrap import is_cached
from .advice import Advice
from .as_it_was import as_it_was
from .blocks import blocks_of, named_candidates
from .costs import AdvisedCut, Costs, Size, advised_cut
from .parting import Found, checked, parted, partings_of, shared_parameters
from .reading import Disk, disk_of, gather_seconds
from .steps import Steps, timed_steps
from .watching import Reached, clock_of, reached_calls

__all__ = ["advise"]

Loss = Callable[[Any], torch.Tensor]


def advise(
    model: nn.Module,
    batch: Any,
    *,
    rows: int | None = None,
    epochs: int | None = None,
    loss: Loss | None = None,
    candidates: Iterable[str] | None = None,
    store: str | os.PathLike[str] | None = None,
) -> Advice:
    """What `recycle` would cost and gain at each block of a model, as a table to print; the model stays as it is.

    >>> import torch
    >>> from modcache import advise
    >>> blocks = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()) for _ in range(4)]
    >>> advice = advise(torch.nn.Sequential(*blocks), torch.randn(16, 8), rows=1_000)
    >>> [cut.at for cut in advice.cuts]
    ['1', '2', '3']
    >>> print(advice.reason)  # doctest: +ELLIPSIS
    none: every trunk is cheaper than reading its rows; at ...

    The model runs some steps on the batch as it is now, in its mode, under the caller's autocast and grad mode; in
    ``torch.no_grad()``, or if nothing is trainable, a step is the forward alone. A step holds forward, loss and
    backward, and neither the optimizer nor the loader.

    Args:
        model: a model that runs eagerly; gradient checkpointing must be without ``use_reentrant``.
        batch: what a step is given, as it is in training: a mapping is keywords, a tuple positional, anything else the
            only argument.
        rows: the number of rows of the data set.
        epochs: the number of epochs; total times are worked out if ``rows`` is given, too.
        loss: what makes a number of the model's output. Without it: its ``loss`` if it has one, else the sum of it.
        candidates: names of submodules; without them the blocks of the model.
        store: the directory in which the rows would lie: its disk is measured. Without it they lie in memory.

    Returns:
        The costs of each cut, the `best` of them, and why.

    Raises:
        CutError: a candidate is no submodule, or is never called; the model or the call cannot be recycled at all.
        UsageError, UsageTypeError: an option that cannot be right.
    """
    _check(model, rows, epochs, loss, store)
    names = blocks_of(model) if candidates is None else named_candidates(model, candidates)
    _refuse_whole(model, names)
    args, kwargs = arguments_of(batch)
    room = shared_budget(torch.device("cpu")).max_bytes if rows else None
    size = Size(_rows_of(model, args, kwargs), rows, epochs, room)
    disk = None if store is None else _disk(store)
    device = _device(model, args, kwargs)
    now = clock_of(device)
    with as_it_was(model):
        ready = partial(_ready, model, args, kwargs, loss)
        reached = reached_calls(model, names, ready)
        if candidates is not None:
            _refuse_unreached(model, names, reached)
        answers = {called: parted(model, mapped(batch, _copied), called, now) for called in reached.cuts}
        found = {called: answer for called, answer in answers.items() if isinstance(answer, Found)}
        steps = timed_steps(model, partings_of(model, found, reached), ready, now)
    refused = {called: str(answer) for called, answer in answers.items() if isinstance(answer, CutError)}
    if candidates is None:  # blocks that nothing comes before
        refused = {called: why for called, why in refused.items() if "nothing to store" not in why}
    return Advice(
        model=type(model).__name__,
        cuts=_advised(model, found, reached, steps, size, disk, device),
        refused=tuple((_shown(called), why) for called, why in refused.items()),
        forward_seconds=steps.forward,
        backward_seconds=steps.backward,
        size=size,
        store="memory" if store is None else os.path.abspath(store),
    )


# --- the question ---------------------------------------------------------------------------------------


def _check(model: object, rows: object, epochs: object, loss: object, store: object) -> None:
    if not isinstance(model, nn.Module):
        raise UsageTypeError(f"advise(...) takes an nn.Module; found {model!r}")
    if is_cached(model):
        raise UsageError(
            f"this {type(model).__name__} is cached or recycled already, and advice is about what it would be without: "
            "call uncached(model) first"
        )
    for name, value in (("rows", rows), ("epochs", epochs)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise UsageTypeError(f"{name} must be a whole number; found {value!r}")
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1; found {value}")
    if loss is not None and not callable(loss):
        raise UsageTypeError(f"loss must be a function of the model's output; found {loss!r}")
    if store is not None and (not isinstance(store, str | os.PathLike) or not os.fspath(store)):
        raise UsageTypeError(f"store must be the path of the directory in which rows would lie; found {store!r}")
    if any(map(nn.parameter.is_lazy, (*model.parameters(), *model.buffers()))):
        raise UsageError(
            f"this {type(model).__name__} has lazy modules that no batch has gone through yet: call it once first"
        )


def _refuse_whole(model: nn.Module, names: tuple[str, ...]) -> None:
    """Refuse a model that can be parted nowhere, before it runs."""
    why = [error for name in names if (error := checked(model, name)) is not None]
    if why and len(why) == len(names):
        raise why[0]


def _rows_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    asked = asked_of(Binder(model.forward)(args, kwargs), frozenset(), type(model).__name__)
    if asked.batch.size < 2:
        raise UsageError("advise(...) takes a batch of at least two rows, as a step of the training has")
    return asked.batch.size


def _disk(store: str | os.PathLike[str]) -> Disk:
    try:
        return disk_of(Path(store).absolute())
    except OSError as error:
        raise UsageError(f"nothing can be written to the store at {os.fspath(store)}: {error}") from None


def _device(model: nn.Module, args: Any, kwargs: Any) -> torch.device:
    """Where it runs: what is no CPU has to be waited for."""
    devices = [value.device for value in (*model.parameters(), *(one for _, one in located((args, kwargs))))]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def _refuse_unreached(model: nn.Module, names: tuple[str, ...], reached: Reached) -> None:
    called = {path for path, _ in reached.cuts}
    missing = [name for name in names if name not in called]
    if missing:
        raise CutError(
            f"{', '.join(missing)}: never called when this {type(model).__name__} runs on the batch, so it cannot be "
            "cut there. Ask about a submodule that is called."
        )


# --- running --------------------------------------------------------------------------------------------


def _ready(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Loss | None
) -> Callable[[], torch.Tensor]:
    """A step on a copy of the batch, which a model may write into."""
    args, kwargs = mapped((args, kwargs), _copied)
    return lambda: _loss_of(model(*args, **kwargs), loss)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _loss_of(output: Any, loss: Loss | None) -> torch.Tensor:
    """The number that a step runs backwards from."""
    if loss is not None:
        value = loss(output)
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
            raise UsageTypeError(f"loss must make a tensor of one element of the model's output; found {found}")
        return value
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, torch.Tensor):
        return own.sum()
    floats = [tensor.sum() for _, tensor in located(output) if tensor.is_floating_point()]
    trained = [value for value in floats if value.requires_grad]
    return torch.stack([value.float() for value in trained or floats]).sum() if floats else torch.zeros(())


# --- the answer -----------------------------------------------------------------------------------------


def _advised(
    model: nn.Module,
    found: Mapping[Called, Found],
    reached: Reached,
    steps: Steps,
    size: Size,
    disk: Disk | None,
    device: torch.device,
) -> tuple[AdvisedCut, ...]:
    counts = {name: value.numel() for name, value in model.named_parameters()}
    gathers: dict[int, float] = {}
    advised = []
    for called, timed in steps.cuts.items():
        cut, extra, resumed = found[called]
        if cut.row_bytes not in gathers:
            gathers[cut.row_bytes] = gather_seconds(cut.row_bytes, size.batch, device)
        costs = Costs(
            trunk=timed.trunk,
            forward=timed.forward,
            backward=timed.backward,
            fixed=max(resumed - gathers[cut.row_bytes], 0.0),
            reading=gathers[cut.row_bytes],
            parameters=sum(counts.get(name, 0) for name in cut.frozen) / max(sum(counts.values()), 1),
            row_bytes=cut.row_bytes,
            disk_reading=None if disk is None else disk.reading,
            disk_writing=None if disk is None else disk.writing,
        )
        shared = shared_parameters(model, called, cut, reached)
        step = steps.forward + steps.backward
        advised.append(advised_cut(*called, extra, shared, step, costs, size))
    return tuple(advised)


def _shown(called: Called) -> str:
    at, call = called
    return f"{at}, call={call}" if call else at
