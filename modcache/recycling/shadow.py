"""The shadow of a model: copies of the ancestors of the cut, and gates in the place of everything else."""

from __future__ import annotations

import threading
import weakref
from operator import is_not
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ..classes import original_class
from ..errors import CutError
from .classes import is_never_called
from .ghosts import Ghost, filled, settled
from .trees import mapped

__all__ = ["ABSENT", "Place", "Run", "Shadow", "Written", "current", "eval_twin", "running"]


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


ABSENT = object()
"""There was no such attribute."""


class Written(NamedTuple):
    """An attribute that a forward set.

    Args:
        module: whose.
        name: its name.
        before: the value until then.
    """

    module: nn.Module
    name: str
    before: Any


class Run(Protocol):
    """One forward of a shadow: decides what calling a gate does."""

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


# --- gates ----------------------------------------------------------------------------------------------

_gates: weakref.WeakKeyDictionary[type, weakref.ref[type]] = weakref.WeakKeyDictionary()
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def _call(gate: Any, *args: Any, **kwargs: Any) -> Any:
    place, shadow = gate._modcache_gate
    run = _local.run
    if run is None:  # after the forward: checkpointing runs parts of it again in the backward
        if place.path in shadow.skipped:
            raise CutError(
                f"{place.path}, which comes before the cut, is called after the forward (by checkpointing around it, "
                "by a function that the model returned). Checkpoint only what comes after the cut."
            )
        args, kwargs = filled(args, kwargs)
        return place.module(*args, **kwargs)
    return run.called(place, args, kwargs)


class _Shield:
    """Stands before a class, so that what this does with its subclasses is not done with a gate."""

    __slots__ = ()

    def __init_subclass__(cls, **more: Any) -> None:
        """Nothing."""


def _gate_class(cls: type[nn.Module]) -> type[nn.Module]:
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


# --- the tree -------------------------------------------------------------------------------------------


class Shadow:
    """The shadow of one model in one thread.

    Args:
        model: the model.
        cut: the submodule at which it is cut.
        written: attributes (of a module, by ``id``) that a forward was seen to set.
    """

    def __init__(self, model: nn.Module, cut: nn.Module, written: set[tuple[int, str]] | None = None) -> None:
        self._names: dict[int, str] = {}
        for name, module in model.named_modules():
            self._names.setdefault(id(module), name)
        self._cut = cut
        self._above = {id(module) for module in model.modules() if any(child is cut for child in module.modules())}
        self._above.discard(id(cut))
        self._made: dict[int, nn.Module] = {}
        self._own: set[int] = set()
        self._copies: list[tuple[nn.Module, nn.Module, dict[str, nn.Module | None], dict[str, Any]]] = []
        self.model = model
        self.skipped: frozenset[str] = frozenset()
        """Modules that only run before the cut, and so not at all when resumed."""
        self.written = set() if written is None else written
        self.root = self._copy(model)

    def stand_in(self, module: nn.Module) -> nn.Module:
        """The copy or the gate that stands for a module of the model."""
        found = self._made.get(id(module))
        if found is None:
            if id(module) in self._own or "_modcache_gate" in vars(type(module)):
                return module
            held = isinstance(module, nn.ModuleList | nn.ModuleDict) and is_never_called(module)
            if id(module) in self._above or held:
                return self._copy(module)
            found = self._gate(module)
        return found

    def _copy(self, module: nn.Module) -> nn.Module:
        cls: Any = original_class(type(module)) or type(module) if module is self.model else type(module)
        other: nn.Module = object.__new__(cls)
        self._made[id(module)] = other
        self._own.add(id(other))
        inner: dict[str, Any] = {}
        object.__setattr__(other, "__dict__", dict(vars(module)))
        vars(other)["_modules"] = inner
        self._remember(module, other, inner)
        return other

    def _remember(self, module: nn.Module, other: nn.Module, inner: dict[str, Any]) -> None:
        children = vars(module)["_modules"]
        for name, child in children.items():
            inner[name] = None if child is None else self.stand_in(child)
        self._copies.append((module, other, dict(children), inner))

    def _gate(self, module: nn.Module) -> nn.Module:
        made = _gate_class(type(module))
        gate = object.__new__(made)
        self._made[id(module)] = gate
        bare = module is not self._cut and next(module.parameters(), None) is None and _keeps_nothing(module)
        place = Place(self._names.get(id(module), type(module).__name__), module, bare, module is self._cut)
        made._modcache_gate.__set__(gate, (place, self))  # type: ignore[attr-defined]
        if isinstance(module, _CONTAINERS) and module is not self._cut:
            object.__setattr__(gate, "__dict__", dict(vars(module)))
            inner: dict[str, Any] = {}
            vars(gate)["_modules"] = inner
            self._remember(module, gate, inner)
        else:
            object.__setattr__(gate, "__dict__", vars(module))  # the very same one: nothing to keep in step
        return gate

    def is_current(self) -> bool:
        """Whether the modules of the model are the same as when the shadow was made."""
        return all(vars(module)["_modules"] == children for module, _, children, _ in self._copies)

    def take_over(self, training: bool | None = None) -> None:
        """Give the copies the attributes of their originals; ``training`` overrides theirs."""
        for module, other, _, inner in self._copies:
            mine = vars(other)
            mine.clear()
            mine.update(vars(module))
            mine["_modules"] = inner
            mine.pop("_compiled_call_impl", None)
            if training is not None:
                mine["training"] = training

    def hand_back(self) -> list[Written]:
        """Give the originals what the forward set on their copies; what no forward before was seen to set."""
        news: list[Written] = []
        for module, other, _, _ in self._copies:
            mine, theirs = vars(other), vars(module)
            if list(mine) == list(theirs) and sum(map(is_not, mine.values(), theirs.values())) == 1:
                continue  # but for the children, the very same
            for name, value in mine.items():
                if name not in _OWN and theirs.get(name, _local) is not value:
                    if (id(module), name) not in self.written:
                        news.append(Written(module, name, theirs.get(name, ABSENT)))
                    self.written.add((id(module), name))
                    theirs[name] = mapped(value, settled, Ghost)
            for name in [name for name in theirs if name not in mine and name not in _OWN]:
                del theirs[name]
        return news


_OWN = frozenset({"_modules", "training", "_compiled_call_impl", "_modcache"})


def _keeps_nothing(module: nn.Module) -> bool:
    """Whether no module of it has buffers that are saved: tables that are computed anew are no weights."""
    for child in module.modules():
        if "_buffers" not in vars(child):
            return False  # TorchScript
        lasting = set(vars(child)["_buffers"]) - vars(child)["_non_persistent_buffers_set"]
        if any(vars(child)["_buffers"][name] is not None for name in lasting):
            return False
    return True


def eval_twin(module: nn.Module) -> nn.Module:
    """The same module in eval mode, for one that is in training mode elsewhere in the model; it shares all else."""
    if isinstance(module, torch.jit.ScriptModule) or not any(child.training for child in module.modules()):
        return module
    made: dict[int, nn.Module] = {}

    def twin(child: nn.Module) -> nn.Module:
        if id(child) not in made:
            other = made[id(child)] = object.__new__(type(child))
            object.__setattr__(other, "__dict__", dict(vars(child)))
            vars(other)["training"] = False
            vars(other)["_modules"] = {
                name: None if inner is None else twin(inner) for name, inner in vars(child)["_modules"].items()
            }
        return made[id(child)]

    return twin(module)
