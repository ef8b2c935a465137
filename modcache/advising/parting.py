"""Recycle a twin of a model at a candidate: what that freezes and stores, and how soon a resumed call is at the cut."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..cut import Cut
from ..errors import CacheWarning, CutError
from ..recycling import arguments_of, check_model, recycle
from ..recycling.runs import Called
from ..wrap import cache_of
from .steps import Parting
from .watching import Reached

__all__ = ["Found", "checked", "parted", "partings_of", "shared_parameters"]

_HITS = 7


class Found(NamedTuple):
    """A cut at which the model can be parted.

    Args:
        cut: what it freezes and stores.
        extra: whether values go around it.
        resumed: seconds from the begin of a resumed call to its cut, the rows of a whole batch read from memory.
    """

    cut: Cut
    extra: bool
    resumed: float


def checked(model: nn.Module, name: str) -> CutError | None:
    """Why a model cannot be parted at a submodule, as far as that is known before it runs."""
    try:
        check_model(model, name, None)
    except CutError as error:
        return error
    return None


def parted(model: nn.Module, batch: Any, called: Called, now: Callable[[], float]) -> Found | CutError:
    """How `recycle` would part the model, or why it would not; the model itself is left alone."""
    if (refusal := checked(model, called[0])) is not None:
        return refusal
    try:
        return _recycled(model, batch, called, extra=False, now=now)
    except CutError as error:
        if "extra=True" not in str(error):
            return error
    try:
        return _recycled(model, batch, called, extra=True, now=now)
    except CutError as error:
        return error


def _twin_of(model: nn.Module) -> nn.Module:
    """A model of the same modules and memory, of which nothing that is set or frozen reaches the model."""
    made: dict[int, Any] = {}

    def twin(module: nn.Module) -> nn.Module:
        if id(module) not in made:
            other = made[id(module)] = object.__new__(type(module))
            object.__setattr__(other, "__dict__", dict(vars(module)))
            for kind in [name for name, value in vars(module).items() if isinstance(value, dict | list | set)]:
                vars(other)[kind] = vars(module)[kind].copy()
            children = vars(module)["_modules"].items()
            vars(other)["_modules"].update((name, child and twin(child)) for name, child in children)
            for name, value in vars(module)["_parameters"].items():
                vars(other)["_parameters"][name] = value if value is None else weight(value)
        return made[id(module)]  # type: ignore[no-any-return]

    def weight(value: nn.Parameter) -> nn.Parameter:
        if id(value) not in made:
            made[id(value)] = nn.Parameter(value.detach(), requires_grad=False)
        return made[id(value)]  # type: ignore[no-any-return]

    return twin(model)


class _AtTheCut(BaseException):
    """A resumed call is at its cut."""


def _recycled(model: nn.Module, batch: Any, called: Called, *, extra: bool, now: Callable[[], float]) -> Found:
    at, call = called
    twin = _twin_of(model)
    armed = False
    alive: list[float] = []

    def at_the_cut(*_: Any) -> None:
        if armed:
            raise _AtTheCut

    twin.get_submodule(at).register_forward_pre_hook(at_the_cut)
    args, kwargs = arguments_of(batch)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", CacheWarning)
        recycle(twin, at, call=call, extra=extra, batch=batch)
        cut = cache_of(twin).cut
        assert cut is not None, "a recycled model has a cut"
        twin(*args, **kwargs)  # computes the rows, and the first resumed call
        for path in cut.bystanders:
            twin.get_submodule(path).register_forward_pre_hook(lambda *_: alive.append(-time.perf_counter()))
            twin.get_submodule(path).register_forward_hook(lambda *_: alive.append(time.perf_counter()))
        armed = True
        taken = []
        for _ in range(_HITS):
            alive.clear()
            began = now()
            try:
                twin(*args, **kwargs)
            except _AtTheCut:
                taken.append(now() - began - sum(alive))
    return Found(cut, extra, min(taken, default=0.0))


# --- what follows for a step ----------------------------------------------------------------------------


def partings_of(model: nn.Module, found: Mapping[Called, Found], reached: Reached) -> dict[Called, Parting]:
    """What each cut parts, as timing needs to know it."""
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    heads = {called: frozenset(trained - set(one.cut.frozen)) for called, one in found.items()}
    # A tower that does not feed the cut still trains, and a tied weight does not although it is used in the head.
    chained = {
        called: not shared_parameters(model, called, one.cut, reached)
        and not _lie_in(heads[called], one.cut.bystanders)
        for called, one in found.items()
    }
    partings = {}
    for called, after in zip(found, [*list(found)[1:], None], strict=False):
        between = None
        if after is not None and chained[called] and chained[after]:
            between = heads[called] - heads[after]
        partings[called] = Parting(heads[called], between, frozenset(found[called].cut.bystanders))
    return partings


def _lie_in(names: Iterable[str], paths: Iterable[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths for name in names)


def shared_parameters(model: nn.Module, called: Called, cut: Cut, reached: Reached) -> tuple[str, ...]:
    """Trainable parameters that feed the cut and that the head uses, by another name or in a module called again."""
    named = dict(model.named_parameters(remove_duplicate=False))
    late = reached.called_from(called)
    return tuple(
        name
        for name in cut.frozen
        if named[name].requires_grad and (name in cut.tied or name.rpartition(".")[0] in late)
    )
