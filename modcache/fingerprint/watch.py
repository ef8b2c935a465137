"""Look again, cheaply: is everything still what it was when it was last read?"""

from __future__ import annotations

import copy
import enum
import functools
import itertools
import operator
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from ..tensors import is_readable
from .code import installed, installed_class
from .memoized import body_without, memoized
from .outside import Outside
from .probe import SETS, DeviceProbe, HostProbe
from .turns import MOST_TURNS, Places, Turns, getter, in_pieces
from .walk import GLOBAL_HOOKS, Walk, is_ordered, ordered, submodules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_chain = itertools.chain.from_iterable
_is = operator.is_
_data_ptr = torch.Tensor.data_ptr
_size, _stride, _is_neg = torch.Tensor.size, torch.Tensor.stride, torch.Tensor.is_neg
_version = operator.attrgetter("_version")
_training = operator.itemgetter("training")
_requires_grad = operator.attrgetter("requires_grad")
_any_grad: Callable[..., bool] = torch._C._any_requires_grad
_forward = operator.attrgetter("forward")
_code = operator.attrgetter("__code__", "__defaults__", "__kwdefaults__")
_just_code = operator.attrgetter("__code__")
_INSIDE = ("_modules", "_parameters", "_buffers", "_forward_pre_hooks", "_forward_hooks")
_inside = operator.itemgetter(*_INSIDE)
_FORMS_AT_ONCE = 64  # tensors whose shape and strides are compared in each check; those of more are, in turn
_FUNCTIONS_AT_ONCE = 256  # of the user's own, whose code is compared in each check
LATE_WITHIN = max(MOST_TURNS, SETS)
"""After how many checks a late move is noticed at the latest, if anything that is looked at shows it."""


class Moved(enum.Enum):
    """What a look found different, the dearest first."""

    STRUCTURE = enum.auto()
    FLAGS = enum.auto()
    WEIGHTS = enum.auto()
    LATE = enum.auto()


class Watch:
    """The places to look at, and what was there; nothing in it refers to the outermost module.

    Everything is compared by lists in C: no object is made per tensor or module. Identity is strict for
    attributes (``True`` in the place of ``1`` is a change); tensors compare by identity first and raise or
    differ otherwise, except those of one element, which are therefore compared by ``is``.
    """

    def __init__(self, found: Walk, module: nn.Module) -> None:
        # A scripted module keeps its state elsewhere; the walk says that it cannot be read.
        others = {name: other for name, other in submodules(found) if "training" in vars(other)}
        self._root_type = type(module)
        self._modules = list(others.values())
        self._types = list(map(type, self._modules))
        self._dicts = [vars(other) for other in self._modules]
        self._own_length = len(vars(module))
        self._lengths = list(map(len, self._dicts))
        # The forward of a base too: a class that replaces it may still call it.
        bases = [cls for cls in found.seen.classes.values() if "forward" in vars(cls)]
        classes = dict.fromkeys([self._root_type, *self._types, *bases])
        # The forward of a traced module is no attribute of its class; a class method is another object each time.
        has_forward = [cls for cls in classes if not issubclass(cls, torch.jit.ScriptModule)]
        self._classes = [cls for cls in has_forward if _forward(cls) is _forward(cls)]
        self._binding = [cls for cls in has_forward if cls not in self._classes]
        self._bound = [*map(_forward, self._binding)]
        self._inside(module)
        self._outside = Outside(found.seen)
        self._attributes(found, module)
        self._in_turn(found)
        self._flags(module)
        self._leaves(found)

    # --- structure ---

    def _inside(self, module: nn.Module) -> None:
        """The dicts that torch keeps in every module: a full one is fetched anew and compared with a copy."""
        self._own_copies = tuple([dict(inner) for inner in _inside(vars(module))])
        self._own_order = _names_in([vars(module)]) if _orders(module) else None
        self._full: list[tuple[Callable[[Any], Any], list[dict[str, Any]], list[dict[Any, Any]]]] = []
        self._empty: list[dict[Any, Any]] = []
        singles: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        for name in _INSIDE:
            full = [inner for inner in self._dicts if inner.get(name)]
            self._empty += [inner[name] for inner in self._dicts if not inner.get(name, True)]
            if full:
                self._full.append((operator.itemgetter(name), full, [dict(inner[name]) for inner in full]))
            if name in ("_parameters", "_buffers"):
                for live in (vars(module)[name], *(inner[name] for inner in full)):
                    singles += [(live, key, t) for key, t in live.items() if t is not None and _single(t)]
        self._ordered = [vars(other) for other in self._modules if _orders(other)]
        self._order = _names_in(self._ordered)
        self._single_dicts = [live for live, _, _ in singles]
        self._single_names = [name for _, name, _ in singles]
        self._singles = [tensor for _, _, tensor in singles]
        self._global_hooks = [vars(torch_module)[name] for name in GLOBAL_HOOKS]
        self._global_copies = [dict(hooks) for hooks in self._global_hooks]

    def _attributes(self, found: Walk, module: nn.Module) -> None:
        """All that is compared object by object, grouped: one getter for many places, and one list of values.

        Plain attributes and the globals that code reads, by their names; forwards, the code of the user's own
        functions, and what `Outside` holds.
        """
        groups: dict[tuple[str, ...], list[Any]] = {}
        slots: dict[tuple[str, ...], list[Any]] = {}
        for name, names in found.attributes.items():
            if name and names:
                groups.setdefault(names, []).append(vars(found.modules[name]))
        for namespace, bound in found.seen.globals.values():
            groups.setdefault(tuple(bound), []).append(namespace)
        for cls, kept in found.seen.busy.items():
            groups.setdefault(kept, []).append(vars(cls))
        for fields, kept in found.seen.partial.values():
            groups.setdefault(kept, []).append(fields)
        for value, filled, _ in found.seen.slotted.values():
            if filled:
                slots.setdefault(filled, []).append(value)
        self._groups: Places = [(getter(names), dicts) for names, dicts in groups.items() if len(names) > 1]
        self._groups += [(getter(names, operator.attrgetter), objects) for names, objects in slots.items()]
        self._groups += self._outside.groups
        # Code that is edited while it is used: reloaders of notebooks put what is new into the old functions.
        own = [function for function in found.seen.functions.values() if not installed(function.__globals__)]
        single = [(names, dicts) for names, dicts in groups.items() if len(names) == 1]
        self._ones: Places = [(operator.itemgetter(*names), dicts) for names, dicts in single]
        self._ones += [(_just_code, own[:_FUNCTIONS_AT_ONCE]), (_forward, self._classes), *self._outside.ones]
        self._ones = [(get, places) for get, places in self._ones if places]
        self._own = getter(found.attributes.get("", ()))
        self._values = list(self._all_values(vars(module)))

    def _all_values(self, own: dict[str, Any]) -> Iterable[object]:
        return itertools.chain(
            self._own(own),
            _chain([map(get, places) for get, places in self._ones]),
            _chain(_chain([map(get, places) for get, places in self._groups])),
        )

    def same_structure(self, module: nn.Module) -> bool:
        """Whether modules, classes, hooks, attributes, containers and constants are the very same."""
        own = module.__dict__
        return (
            type(module) is self._root_type
            and len(own) == self._own_length
            and _inside(own) == self._own_copies
            and self._global_hooks == self._global_copies
            # A part that the module does not have is passed over: a single layer is checked in a few steps.
            and (self._own_order is None or _names_in([own]) == self._own_order)
            and (not self._singles or self._same_singles())
            and (not self._modules or self._same_below())
            and (not self._binding or [*map(_forward, self._binding)] == self._bound)
            and (not self._outside.anything or self._outside.same())
            and all(map(_is, self._all_values(own), self._values))  # last: by now they are as many as they were
        )

    def _same_singles(self) -> bool:
        return all(map(_is, map(dict.__getitem__, self._single_dicts, self._single_names), self._singles))

    def _same_below(self) -> bool:
        return (
            [*map(type, self._modules)] == self._types
            and [*map(len, self._dicts)] == self._lengths
            and all([*map(get, full)] == copies for get, full, copies in self._full)
            and not any(self._empty)
            and (not self._ordered or _names_in(self._ordered) == self._order)
        )

    def _in_turn(self, found: Walk) -> None:
        """What hardly ever changes is looked at a part at a time, so a change may be noticed late.

        The code and defaults of functions, the bodies of installed classes besides ``forward``, what a torch
        layer's own ``forward`` does not read, and the functions of libraries that code reads by name.
        """
        places: Places = [(_code, function) for function in found.seen.functions.values()]
        theirs = [cls for cls in found.seen.classes.values() if cls not in found.seen.busy and installed_class(cls)]
        places += [(_body_of(cls), vars(cls)) for cls in theirs]
        places += [(getter(names), vars(found.modules[name])) for name, names in found.idle.items() if name]
        places += [(getter(tuple(names)), namespace) for namespace, names in found.seen.of_libraries.values()]
        places += in_pieces(self._outside.later)
        self._turns = Turns(places)

    def imported(self) -> bool:
        """Whether a Python module that code imports when it runs is there now, and was not before."""
        return self._outside.imported()

    # --- flags ---

    def _flags(self, module: nn.Module) -> None:
        self._were_training = [bool(inner.get("training")) for inner in (vars(module), *self._dicts)]
        self._any_training = any(self._were_training)

    def same_flags(self, module: nn.Module, grad: bool) -> bool:
        """Whether training flags, and with grad mode ``requires_grad``, are what they were."""
        if self._any_training:
            if [
                bool(module.__dict__.get("training")),
                *map(bool, map(_training, self._dicts)),
            ] != self._were_training:
                return False
        elif module.__dict__.get("training") or (self._dicts and any(map(_training, self._dicts))):
            return False
        if self.sealed and any(map(is_readable, self.sealed.values())):
            return False
        if not grad:
            return True
        if not self._any_grad:
            return not _any_grad(*self.tensors)
        return [*map(_requires_grad, self.tensors)] == self._grads

    # --- weights ---

    def _leaves(self, found: Walk) -> None:
        self.tensor_names = list(found.tensors)
        self.tensors = list(found.tensors.values())
        self._grads = list(map(_requires_grad, self.tensors))
        self._any_grad = any(self._grads)
        self.sealed = {name: tensor for name, tensor in found.tensors.items() if name in found.unreadable}
        # Lists of one order: readable tensors first, then arrays.
        readables = {name: tensor for name, tensor in found.tensors.items() if name not in found.unreadable}
        self.names = [*readables, *found.arrays]
        self.leaves: list[Any] = [*readables.values(), *found.arrays.values()]
        self._pointed = list(readables.values())
        self._counted = [tensor for tensor in self._pointed if not tensor.is_inference()]
        self._arrays = list(found.arrays.values())
        self._on_host = {
            at: place for place, at in enumerate(at for at, leaf in enumerate(self.leaves) if _on_host(leaf))
        }
        self._take_counters()
        self._look_closer()

    def _look_closer(self) -> None:
        """Place the windows anew, for the memory where the leaves lie now."""
        self._probe = HostProbe([self.leaves[at] for at in self._on_host])
        by_device: dict[torch.device, list[torch.Tensor]] = {}
        for tensor in self._pointed:
            if tensor.device.type != "cpu":
                by_device.setdefault(tensor.device, []).append(tensor)
        self._device_probes = [DeviceProbe(tensors) for tensors in by_device.values()]

    def still_readable(self) -> bool:
        """Whether the same tensors can be read as before: none was freed, none came back."""
        return all(map(is_readable, self._pointed)) and not any(map(is_readable, self.sealed.values()))

    def renewed(self) -> Watch:
        """A watch over the same places that expects the weights as they are now."""
        other = copy.copy(self)
        other._take_counters()
        if (other._pointers, other._array_pointers) == (self._pointers, self._array_pointers):
            other._probe = self._probe.renewed()
            other._device_probes = [probe.renewed() for probe in self._device_probes]
        else:
            other._look_closer()
        return other

    def trainable(self) -> str | None:
        """The name of the first tensor that requires grad."""
        return next((name for name, needs in zip(self.tensor_names, self._grads, strict=True) if needs), None)

    def _take_counters(self) -> None:
        self._versions = list(map(_version, self._counted))
        self._pointers = list(map(_data_ptr, self._pointed))
        self._array_pointers = list(map(_array_pointer, self._arrays))
        parts = 2 * SETS if len(self._pointed) > _FORMS_AT_ONCE else 1
        tensors = [self._pointed[number::parts] for number in range(parts)]
        self._forms = [(part, _forms_of(part)) for part in tensors]

    def same_weights(self, turn: int) -> Moved | None:
        """Whether the weights look untouched; pointers come first, the probe must not read freed memory."""
        if (
            [*map(_data_ptr, self._pointed)] != self._pointers
            or [*map(_version, self._counted)] != self._versions
            or (self._arrays and [*map(_array_pointer, self._arrays)] != self._array_pointers)
        ):
            return Moved.WEIGHTS
        if not self._same_forms(turn):
            return Moved.WEIGHTS if len(self._forms) == 1 else Moved.LATE
        if not self._probe.same(turn):
            return Moved.WEIGHTS if self._probe.just_moved(turn) else Moved.LATE
        if self._device_probes and any(p.differs() for p in self._device_probes):
            return Moved.LATE
        return None

    def _same_forms(self, turn: int) -> bool:
        """Whether the tensors lie in their memory as they did: another view in ``.data`` moves nothing else."""
        tensors, forms = self._forms[turn % len(self._forms)]
        return _forms_of(tensors) == forms

    def stamp(self, at: int) -> tuple[object, ...]:
        """What would show that a leaf moved: its counter, its address and all that the probe sees of it."""
        leaf = self.leaves[at]
        if not isinstance(leaf, torch.Tensor):
            return (_array_pointer(leaf), *self._seen(at))
        version = None if leaf.is_inference() else leaf._version
        form = tuple(leaf.shape), leaf.stride(), leaf.is_neg(), leaf.is_conj()
        return (version, leaf.data_ptr(), leaf.dtype, *form, *self._seen(at))

    def written(self) -> set[int]:
        """The leaves whose counter or address is another one than when this was made."""
        at = {id(tensor): number for number, tensor in enumerate(self._pointed)}
        counted = zip(self._counted, self._versions, strict=True)
        moved = {at[id(tensor)] for tensor, version in counted if tensor._version != version}
        pointed = enumerate(zip(self._pointed, self._pointers, strict=True))
        return moved | {number for number, (tensor, pointer) in pointed if tensor.data_ptr() != pointer}

    def _seen(self, at: int) -> tuple[bytes, ...]:
        return self._probe.pieces(self._on_host[at]) if at in self._on_host else ()

    # --- all ---

    def moved(self, module: nn.Module, grad: bool, turn: int, weights: bool = True) -> Moved | None:
        """The first thing found different, or None: everything is as it was."""
        try:
            if not self.same_structure(module):
                return Moved.STRUCTURE
            if not self.same_flags(module, grad):
                return Moved.FLAGS
            if not weights:
                return None
            return self.same_weights(turn) or (None if self._turns.same(turn) else Moved.LATE)
        except Exception:  # a name is gone, a tensor met its replacement, a storage was freed
            return Moved.STRUCTURE


def _orders(module: nn.Module) -> bool:
    """Whether there is an order of what is in a module, and it counts."""
    return is_ordered(module) and any(len(inner) > 1 for inner in ordered(vars(module)))


def _names_in(modules: list[dict[str, Any]]) -> list[str]:
    """The children, parameters and buffers of these modules in order; that their dicts are equal does not tell it."""
    return list(_chain(_chain(map(ordered, modules))))


def _forms_of(tensors: list[torch.Tensor]) -> list[object]:
    return [*map(_size, tensors), *map(_stride, tensors), *map(_is_neg, tensors)]


def _body_of(cls: type) -> Callable[[Any], Iterable[object]]:
    """Gets what a class defines out of its body."""
    names = memoized(cls)
    return functools.partial(body_without, names=names) if names else types.MappingProxyType.values


def _single(tensor: torch.Tensor) -> bool:
    try:
        return tensor.numel() == 1
    except Exception:  # an uninitialised parameter has no size
        return True


def _on_host(leaf: object) -> bool:
    return not isinstance(leaf, torch.Tensor) or leaf.device.type == "cpu"


def _array_pointer(array: Any) -> tuple[object, ...]:
    return array.__array_interface__["data"][0], array.shape, array.strides, array.dtype
