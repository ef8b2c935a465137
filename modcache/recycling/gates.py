"""The gates of a shadow: what stands in the place of a module asks the forward that it is called in what to do."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from torch import nn

from ..errors import CutError
from .ghosts import filled
from .trees import ATOMS

__all__ = ["Place", "Run", "called_in", "current", "gate_class", "running"]


class Place(NamedTuple):
    """What stands behind a gate.

    Args:
        path: the name of the module in the model.
        module: the module itself.
        bare: it has neither parameters nor buffers that are saved, so it is not worth a stand-in.
        cut: it is the submodule at which the model is cut.
    """

    path: str
    module: nn.Module
    bare: bool
    cut: bool


class Run(Protocol):
    """One forward of a shadow: decides what calling a gate does."""

    passing: bool
    """Whether calling a gate is calling the module behind it, with values in the places of ghosts."""

    def called(self, place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A gate was called."""


class _Local(threading.local):
    run: Run | None = None


_local = _Local()


def current() -> Run | None:
    """The forward that this thread is in, if any."""
    return _local.run


class running:  # noqa: N801 - a context manager, used like a function
    """The forward that gates called by this thread belong to."""

    __slots__ = ("_before", "_run")

    def __init__(self, run: Run | None) -> None:
        self._run = run

    def __enter__(self) -> None:
        self._before, _local.run = _local.run, self._run

    def __exit__(self, *exc: object) -> None:
        _local.run = self._before


def called_in(
    run: Run, forward: Callable[..., Any], root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """What a forward gives that gates belong to while it runs."""
    before, _local.run = _local.run, run
    try:
        return forward(root, *args, **kwargs)
    finally:
        _local.run = before


_gates: weakref.WeakKeyDictionary[type, weakref.ref[type]] = weakref.WeakKeyDictionary()


def _call(gate: Any, *args: Any, **kwargs: Any) -> Any:
    place, shadow = gate._modcache_gate
    run = _local.run
    if run is not None and not run.passing:
        return run.called(place, args, kwargs)
    if run is None and place.path in shadow.skipped:
        # After the forward: checkpointing runs parts of it again in the backward.
        raise CutError(
            f"{place.path}, which comes before the cut, is called after the forward (by checkpointing around it, "
            "by a function that the model returned). Checkpoint only what comes after the cut."
        )
    if not (ATOMS.issuperset(map(type, args)) and ATOMS.issuperset(map(type, kwargs.values()))):
        args, kwargs = filled(args, kwargs)
    return place.module(*args, **kwargs)


class _Shield:
    """Stands before a class, so that what this does with its subclasses is not done with a gate."""

    __slots__ = ()

    def __init_subclass__(cls, **more: Any) -> None:
        """Nothing."""


def gate_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of a gate: what it makes cannot be told from the module, and asks when it is called."""
    known = _gates.get(cls)
    made = known() if known is not None else None
    if made is None:

        def __getattr__(self: Any, name: str) -> Any:  # noqa: N807 - it is the class's own
            found = cls.__getattr__(self, name)
            return self._modcache_gate[1].stand_in(found) if isinstance(found, nn.Module) else found

        body = {
            "__slots__": ("_modcache_gate",),
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__call__": _call,
            "__getattr__": __getattr__,
            "__class__": property(lambda self: cls),  # a slice of a Sequential is made by `self.__class__(...)`
        }
        made = type.__new__(type(cls), cls.__name__, (_Shield, cls), body)  # past what its metaclass does with classes
        _gates[cls] = weakref.ref(made)
    return made
