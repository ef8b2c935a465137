"""Walk a module tree once: the named facts that say what it is, and everything that a re-check looks at."""

from __future__ import annotations

import dataclasses
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy

from ..digest import digest, encode, frame
from ..tensors import is_readable
from .code import installed_class, of_library, place_of
from .follow import Reader
from .origins import ORIGIN_NAMES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np

    from .seen import Seen

ROOT = "the module"
"""What the outermost module is called in names of parts."""

# Attributes that torch or a library keeps for itself: they do not say what a forward computes.
_CACHED = "_modcache"
_KEPT_BY_TORCH = frozenset(vars(nn.Module())) | {
    _CACHED,
    "_compiled_call_impl",
    "_is_hf_initialized",
    "_is_replica",
    "_is_torch_compile",
    "_incremental_state_id",  # fairseq's, random in each process
    "_former_parameters",
    *ORIGIN_NAMES,
}
GLOBAL_HOOKS = ("_global_forward_pre_hooks", "_global_forward_hooks")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


@dataclasses.dataclass(slots=True)
class Walk:
    """What one walk found. It holds the module: keep it no longer than needed."""

    modules: dict[str, nn.Module]
    parts: dict[str, bytes]
    tensors: dict[str, torch.Tensor]
    arrays: dict[str, np.ndarray[Any, Any]]
    tied: list[tuple[str, str]]
    buffers: frozenset[str]
    attributes: dict[str, tuple[str, ...]]
    """Names of the plain attributes of each module."""
    idle: dict[str, tuple[str, ...]]
    """Those that a torch layer has but does not read in its forward."""
    raw: dict[str, object]
    seen: Seen
    unreadable: tuple[str, ...]
    lazy: bool


def original_class(module: nn.Module) -> type:
    """The class that the user wrote, below the dynamic classes of modcache and of parametrizations."""
    cls = type(module)
    while True:
        if "_modcache_original" in vars(cls):
            marked = vars(cls)["_modcache_original"]
            cls = marked if isinstance(marked, type) else cls.__bases__[0]
        elif len(cls.__bases__) == 1 and cls.__name__ == f"Parametrized{cls.__bases__[0].__name__}":
            cls = cls.__bases__[0]
        else:
            return cls


def plain_attributes(module: nn.Module) -> tuple[str, ...]:
    """The names in a module's ``__dict__`` that belong to the user, not to torch."""
    return tuple(name for name in vars(module) if name not in _KEPT_BY_TORCH)


def walk(module: nn.Module, bookkeeping: Mapping[str, bytes | None], also: Mapping[str, object]) -> Walk:
    """Look at everything once, and at other things that its results depend on."""
    return _Walker(bookkeeping, also).walk(module)


class _Walker:
    def __init__(self, bookkeeping: Mapping[str, bytes | None], also: Mapping[str, object]) -> None:
        self._bookkeeping = bookkeeping
        self._also = also
        self._names: dict[int, str] = {}
        self._modules: dict[str, nn.Module] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._tensor_names: dict[int, str] = {}
        self._tied: list[tuple[str, str]] = []
        self._buffers: set[str] = set()
        self._parts: dict[str, bytes] = {}
        self._attributes: dict[str, tuple[str, ...]] = {}
        self._idle: dict[str, tuple[str, ...]] = {}
        self._raw: dict[str, object] = {}
        self._unreadable: dict[str, None] = {}

    def walk(self, module: nn.Module) -> Walk:
        self._register(module, "")
        reader = Reader(self._names, self._tensor_names, self._bookkeeping)
        self._hooks(reader, "globally", vars(torch_module), GLOBAL_HOOKS)
        if replaced := reader.functional():
            self._parts["torch.nn.functional"] = digest(replaced)
        for name, value in self._also.items():
            self._parts[name] = digest(reader.value(value, name))
        done = 0
        while True:
            for name, found in list(self._modules.items())[done:]:
                self._read(reader, name, found)
                done += 1
            seen = reader.finish()
            new = self._register_all(seen.modules)  # a read may meet modules that are not registered
            if not new and not reader.look_aside():
                break
        reader.seen.tensors = dict(seen.tensors.items())
        for name, tensor in seen.tensors.items():
            self._tensor(tensor, name)
        self._unreadable.update(seen.sealed)
        for name, contents in seen.reached.items():
            self._parts[name] = digest(b"".join(sorted(contents)))
        self._tie()
        self._flags()
        return Walk(
            modules=self._modules,
            parts=self._parts,
            tensors=self._tensors,
            arrays=dict(seen.arrays),
            tied=self._tied,
            buffers=frozenset(self._buffers),
            attributes=self._attributes,
            idle=self._idle,
            raw=self._raw,
            seen=seen,
            unreadable=tuple(self._unreadable),
            lazy=any(map(is_lazy, self._tensors.values())),
        )

    # --- registered modules and tensors ---

    def _register_all(self, modules: Mapping[str, nn.Module]) -> int:
        """Modules that something refers to by another way than its children; how many were not known."""
        new = {name: module for name, module in modules.items() if name not in self._modules}
        for name, module in new.items():
            self._register(module, name)
        return len(new)

    def _register(self, module: nn.Module, name: str) -> None:
        self._names[id(module)] = name
        self._modules[name] = module
        if isinstance(module, torch.jit.ScriptModule):
            self._unreadable[f"{name or ROOT} ({place_of(type(module))})"] = None
            return
        for kind in ("_parameters", "_buffers"):
            for key, tensor in vars(module)[kind].items():
                if tensor is not None:
                    self._register_tensor(tensor, f"{name}.{key}" if name else key, kind)
        for key, child in vars(module)["_modules"].items():
            if child is None:
                continue
            path = f"{name}.{key}" if name else key
            if id(child) in self._names:
                self._tied.append((path, self._names[id(child)]))
            else:
                self._register(child, path)

    def _register_tensor(self, tensor: torch.Tensor, name: str, kind: str) -> None:
        if name in self._bookkeeping:
            return
        if kind == "_buffers":
            self._buffers.add(name)
        first = self._tensor_names.setdefault(id(tensor), name)
        if first != name:
            self._tied.append((name, first))
        else:
            self._tensor(tensor, name)

    def _tensor(self, tensor: torch.Tensor, name: str) -> None:
        self._tensors[name] = tensor
        if not is_readable(tensor):
            self._unreadable[name] = None

    def _tie(self) -> None:
        """Different tensors over the same memory are tied, like one tensor of two names."""
        places: dict[object, str] = {}
        for name, tensor in self._tensors.items():
            if name in self._unreadable or tensor.numel() == 0:
                continue
            first = places.setdefault((tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()), name)
            if first != name:
                self._tied.append((name, first))
        self._parts["tied weights"] = digest(encode(sorted(self._tied)))

    def _flags(self) -> None:
        """Code of the user's own may read the training flag of a layer that does the same in both modes."""
        training = sorted(name for name, module in self._modules.items() if module.training)
        if training and not all(of_library(original_class(module).__module__) for module in self._modules.values()):
            self._parts["in training mode"] = digest(encode(training))

    # --- facts ---

    def _read(self, reader: Reader, name: str, module: nn.Module) -> None:
        place = name or ROOT
        cls = original_class(module)
        self._parts[f"class of {place}"] = digest(reader.class_chain(cls))
        if isinstance(module, torch.jit.ScriptModule):
            reader.seen.opaque[f"{place} ({place_of(type(module))})"] = module
            return
        self._hooks(reader, f"of {place}", vars(module), _HOOKS, outermost=not name)
        if place_of(type(module)).startswith("torch._dynamo."):  # torch.compile's wrapper: its child counts
            return
        derived = _derived(module)
        names = [key for key in plain_attributes(module) if key not in derived]
        watched = []
        said = frame(b"repr", _extra_repr(module)) if of_library(cls.__module__) else b""
        said += self._order(name, module) + reader.slots_of_module(module, f"slots of {place}")
        head = f"{name}." if name else ""
        lost = [key[len(head) :] for key, first in self._bookkeeping.items() if first and key.startswith(head)]
        for key in sorted({*names, *(key for key in lost if "." not in key and " " not in key)}):
            path = head + key
            value = vars(module).get(key)
            said += reader.attribute(value, key, path)
            if path not in self._bookkeeping:
                watched.append(key)
                self._raw[path] = value
        if name and (cached := vars(module).get(_CACHED)) is not None:
            watched.append(_CACHED)
            if asked := _asked_of(cached):
                said += reader.attribute(asked, _CACHED, f"{place} (cached)")
        unread = _unread(module) if name else frozenset()
        self._attributes[name] = tuple(key for key in watched if key not in unread)
        if idle := tuple(key for key in watched if key in unread):
            self._idle[name] = idle
        self._parts[f"attributes of {place}"] = digest(said)

    def _order(self, name: str, module: nn.Module) -> bytes:
        """The order of what a forward may go through."""
        if not is_ordered(module):
            return b""
        head = f"{name}." if name else ""
        new = {key for key, first in self._bookkeeping.items() if first is None}  # was not there at first
        orders = [[key for key in held if head + key not in new] for held in ordered(vars(module))]
        return frame(b"order", encode(orders)) if any(len(keys) > 1 for keys in orders) else b""

    def _hooks(
        self,
        reader: Reader,
        place: str,
        namespace: Mapping[str, Any],
        kinds: tuple[str, str],
        outermost: bool = False,
    ) -> None:
        """Hooks by content; those of the outermost module run around its forward on every call, so they change no row.

        All but those of torch's that compute its weights.
        """
        said = b""
        for kind in kinds:
            hooks = namespace[kind]
            with_kwargs = namespace.get(f"{kind}_with_kwargs", {})
            always = namespace.get(f"{kind}_always_called", {})
            for at, (number, hook) in enumerate(hooks.items()):
                if outermost and not _computes_weights(hook):
                    continue
                flags = (kind, bool(with_kwargs.get(number)), bool(always.get(number)))
                said += encode(flags) + reader.value(hook, f"{kind[1:]}[{at}] {place}")
        if said:
            self._parts[f"hooks {place}"] = digest(said)


def _asked_of(cached: object) -> tuple[object, ...]:
    """The functions of the user's that a cached module within the module runs; what else is asked changes no row."""
    asked = getattr(cached, "requested", None)
    functions = getattr(asked, "prepare", None), getattr(asked, "key", None)
    return tuple(function for function in functions if function is not None and not isinstance(function, str))


_UNREAD: dict[type, frozenset[str]] = {
    nn.Linear: frozenset({"in_features", "out_features"}),
    nn.LayerNorm: frozenset({"elementwise_affine"}),
    nn.Embedding: frozenset({"num_embeddings", "embedding_dim"}),
    nn.Dropout: frozenset({"p", "inplace"}),  # in eval mode
}


def _unread(module: nn.Module) -> frozenset[str]:
    """Attributes that the forward of a layer of torch does not read: its weights say the same."""
    if type(module) is nn.Dropout and module.training:
        return frozenset()
    return _UNREAD.get(type(module), frozenset())


def _derived(module: nn.Module) -> set[str]:
    """Attributes that others say.

    Torch's pruning, old weight_norm and spectral_norm compute theirs anew before every forward. A layer of einops
    makes its recipes of its pattern, with names in an order that differs from process to process.
    """
    hooks = filter(_computes_weights, vars(module)["_forward_pre_hooks"].values())
    names = [getattr(hook, "name", None) or getattr(hook, "_tensor_name", None) for hook in hooks]
    if original_class(module).__module__.startswith("einops.layers."):
        names.append("_multirecipe")
    return {name for name in names if name is not None}


def _computes_weights(hook: object) -> bool:
    """Whether a hook is one of torch's that compute a weight of others before every forward, or derived from one."""
    return any(cls.__module__.startswith("torch.nn.utils.") for cls in type(hook).__mro__)


def _extra_repr(module: nn.Module) -> bytes:
    try:
        return encode(module.extra_repr())
    except Exception:  # a half-built module; its attributes are read anyway
        return b""


def is_ordered(module: nn.Module) -> bool:
    """Whether the order of what is in it counts: installed code reads by name, but for containers."""
    cls = original_class(module)
    return issubclass(cls, _CONTAINERS) or not installed_class(cls)


ordered = operator.itemgetter("_modules", "_parameters", "_buffers")
"""The dicts out of the attributes of a module that have an order."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def submodules(found: Walk) -> Iterator[tuple[str, nn.Module]]:
    """All modules but the outermost one."""
    return ((name, module) for name, module in found.modules.items() if name)
