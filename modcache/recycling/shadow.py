"""The shadow of a model: copies of the ancestors of the cut, and gates in the place of everything else."""

from __future__ import annotations

from collections.abc import Iterator
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import nn

from ..classes import original_class
from .gates import Place, gate_class
from .ghosts import Ghost, settled
from .submodules import is_never_called
from .trees import mapped

__all__ = ["ABSENT", "Shadow", "Written", "eval_twin"]

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)

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


class _Copy:
    """A module of a shadow that has attributes and children of its own, and what those of its original were.

    Args:
        original: the module of the model.
        other: what stands for it.
        inner: the children of that.
    """

    __slots__ = ("children", "children_names", "inner", "mine", "mine_names", "names", "original", "other", "values")

    def __init__(self, original: nn.Module, other: nn.Module, inner: dict[str, nn.Module | None]) -> None:
        self.original, self.other, self.inner = original, other, inner
        children = vars(original)["_modules"]
        self.children_names, self.children = list(children), list(children.values())
        self.take_over(None)

    def take_over(self, training: bool | None) -> None:
        """Give the copy the attributes of its original; ``training`` overrides that of these."""
        theirs, mine = vars(self.original), vars(self.other)
        mine.clear()
        mine.update(theirs)
        mine["_modules"] = self.inner
        mine.pop("_compiled_call_impl", None)
        self.names, self.values = list(theirs), list(theirs.values())
        self.mine_names, self.mine = list(mine), list(mine.values())
        if training is not None:
            mine["training"] = training
            self.names = []  # to be taken over anew

    def hand_back(self) -> Iterator[tuple[str, object]]:
        """Names of the attributes that were set on the copy since, and what the original had."""
        theirs, mine = vars(self.original), vars(self.other)
        before = dict(zip(self.mine_names, self.mine, strict=True))
        for name, value in mine.items():
            if name not in _OWN and before.get(name, ABSENT) is not value:
                yield name, theirs.get(name, ABSENT)
                theirs[name] = mapped(value, settled, Ghost)
        for name in [name for name in before if name not in mine and name not in _OWN]:
            theirs.pop(name, None)
        self.names = []


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
        self._copies: list[_Copy] = []
        self.model = model
        self.stamp: object = object()
        """Another object whenever a module of the model that has a copy has other attributes."""
        self.ready = False
        """Whether the copies have the attributes of their originals, and no forward has run on them since."""
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
        for name, child in vars(module)["_modules"].items():
            inner[name] = None if child is None else self.stand_in(child)
        self._copies.append(_Copy(module, other, inner))

    def _gate(self, module: nn.Module) -> nn.Module:
        made = gate_class(type(module))
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

    @property
    def originals(self) -> set[int]:
        """The modules of the model that have copies, by ``id``."""
        return {id(copy.original) for copy in self._copies}

    def follow(self) -> bool:
        """Give the copies the attributes of their originals; whether the modules of the model are the same still."""
        # Values by identity, and in C: a module may have an `__eq__`, and each call comes here.
        for copy in self._copies:
            theirs = vars(copy.original)
            children = theirs["_modules"]
            if list(children) != copy.children_names or not all(map(is_, children.values(), copy.children)):
                return False
            if list(theirs) != copy.names or not all(map(is_, theirs.values(), copy.values)):
                copy.take_over(None)
                self.stamp = object()
        self.ready = True
        return True

    def put_in_eval(self) -> None:
        """Give the copies the attributes of their originals, in eval mode."""
        self.ready = False
        for copy in self._copies:
            copy.take_over(False)

    def hand_back(self) -> list[Written]:
        """Give the originals what the forward set on their copies; what no forward before was seen to set."""
        self.ready = False
        news: list[Written] = []
        for copy in self._copies:
            mine = vars(copy.other)
            if list(mine) == copy.mine_names and all(map(is_, mine.values(), copy.mine)):
                continue
            for name, before in copy.hand_back():
                if (id(copy.original), name) not in self.written:
                    news.append(Written(copy.original, name, before))
                self.written.add((id(copy.original), name))
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
