"""Read values, objects, functions and classes into bytes, and note on the way what can change."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import re
import sys
import types
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._contextlib import _DecoratorContextManager

from ..digest import NoContentError, digest, encode, frame
from .code import code_bytes, global_names, installed, of_library
from .seen import Seen

_DEPTH = 16
_ITEMS = 4096  # of one container; above that it counts by class and length
_OBJECTS = 256  # reached from one attribute

# Where a model came from is not what it is: moving a folder must not empty a cache.
ORIGIN_NAMES = frozenset({"_name_or_path", "name_or_path", "transformers_version", "_commit_hash"})

_OPAQUE_BASES = frozenset(
    {"PreTrainedTokenizerBase", "ProcessorMixin", "FeatureExtractionMixin", "ImageProcessingMixin", "Logger"}
)
_NO_CONTENT_IN_CLASS = frozenset(
    """__dict__ __weakref__ __doc__ __module__ __qualname__ __annotations__ __annotate__ __annotate_func__
    __annotations_cache__ __firstlineno__ __static_attributes__ __abstractmethods__ _abc_impl __parameters__ __orig_bases__
    __slotnames__ __dataclass_fields__ __dataclass_params__ __match_args__ _modcache_original""".split()
)
_CALLED_BY_TORCH = ("forward", "__call__", "__getattr__", "__getattribute__", "__torch_function__")
_IMMUTABLE = (int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.layout)
_SAID_BY_TEXT = (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, fractions.Fraction, torch.Size)
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)
_DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType, types.WrapperDescriptorType)


def class_name(cls: type) -> str:
    """The importable name of a class, as written in namespaces."""
    return f"{cls.__module__}.{cls.__qualname__}"


class Reader:
    """Reads values into framed bytes; what it meets that can change is in ``seen``.

    Args:
        modules: the names that modules are already known by; others get the path where they are met.
        tensors: the names of registered tensors.
        bookkeeping: places that a forward changes, with the bytes first read there (None: there was nothing).
    """

    def __init__(
        self,
        modules: dict[int, str] | None = None,
        tensors: dict[int, str] | None = None,
        bookkeeping: Mapping[str, bytes | None] | None = None,
    ) -> None:
        self.seen = Seen()
        self._bookkeeping = bookkeeping or {}
        self._modules = modules if modules is not None else {}
        self._tensors = dict(tensors or {})
        self._memo: dict[int, bytes] = {}
        self._keep: list[object] = []  # an id in the memo must not be used again
        self._open: dict[int, int] = {}
        self._objects = 0
        self._reached: set[int] = set()
        self._queue: list[tuple[str, object]] = []
        self._following = True
        self._met: list[types.FunctionType] = []
        self._called: set[str] = set(_CALLED_BY_TORCH)
        self._waiting: dict[str, list[types.FunctionType]] = {}

    # --- values ---

    def attribute(self, value: object, name: str, path: str) -> bytes:
        """The bytes of one attribute of a module, with a fresh allowance of objects."""
        self._objects = 0
        return self.field(value, name, path)

    def value(self, value: object, path: str) -> bytes:
        """The framed bytes of any value; one without content gives its class name and is listed as opaque."""
        if isinstance(value, _IMMUTABLE) and not isinstance(value, enum.Enum):
            return encode(value)
        known = self._memo.get(id(value))
        if known is not None:
            return known
        if id(value) in self._open:
            return frame(b"again", encode(len(self._open) - self._open[id(value)]))
        if len(self._open) >= _DEPTH:
            return self._opaque(value, path)
        self._open[id(value)] = len(self._open)
        try:
            found = self._read(value, path)
        finally:
            del self._open[id(value)]
        self._memo[id(value)] = found
        self._keep.append(value)
        return found

    def _read(self, value: object, path: str) -> bytes:
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if isinstance(value, nn.Module):
            return self.module(value, path)
        if isinstance(value, np.ndarray):
            return self._array(value, path)
        if isinstance(value, type):
            return self._class_reference(value)
        if isinstance(value, tuple | list | set | frozenset | collections.deque):
            return self._sequence(value, path)
        if isinstance(value, Mapping) and not dataclasses.is_dataclass(value):
            return self._mapping(value, path)
        if (known := self._callable(value, path)) is not None:
            return known
        if isinstance(value, enum.Enum):
            return frame(b"enum", encode(f"{class_name(type(value))}.{value.name}"))
        if isinstance(value, _SAID_BY_TEXT) or type(value).__module__ == "typing":
            return frame(b"said", encode(f"{class_name(type(value))} {value}"))
        if isinstance(value, re.Pattern):
            return frame(b"pattern", encode((value.pattern, value.flags)))
        if isinstance(value, types.ModuleType):
            return frame(b"module", encode(value.__name__))
        if isinstance(value, weakref.ref):
            return frame(b"weak", self.value(value(), path))
        if isinstance(value, _DecoratorContextManager):  # torch.no_grad around a method; "prev" is call state
            return frame(b"context", encode(class_name(type(value))) + self.fields(_without(vars(value), "prev"), path))
        return self._object(value, path)

    def _opaque(self, value: object, path: str) -> bytes:
        name = class_name(type(value))
        self.seen.opaque[f"{path} ({name})"] = None
        return frame(b"opaque", encode(name))

    def _object(self, value: object, path: str) -> bytes:
        cls = type(value)
        if of_library(cls.__module__) and not isinstance(value, _NAMESPACES):
            try:
                return encode(value)
            except NoContentError:
                return self._opaque(value, path)
        self._objects += 1
        if self._objects > _OBJECTS or not _OPAQUE_BASES.isdisjoint(base.__name__ for base in cls.__mro__):
            return self._opaque(value, path)
        fields = getattr(value, "__dict__", None)
        if fields is None:
            slots = _slots(value)
            if slots is None:
                return self._opaque(value, path)
            inner = self.fields(slots, path)
        else:
            self._watch(fields, path)
            inner = self.fields({**fields, **(_slots(value) or {})}, path)
        return frame(b"object", self._class_reference(cls) + inner)

    def fields(self, fields: Mapping[str, object], path: str) -> bytes:
        """Attributes in the order of their names; where they came from does not count."""
        names = sorted(name for name in {*fields, *self._lost(path)} if name not in ORIGIN_NAMES)
        return b"".join(self.field(fields.get(name), name, f"{path}.{name}") for name in names)

    def _watch(self, fields: dict[str, object], path: str) -> None:
        kept = tuple(name for name in fields if f"{path}.{name}" not in self._bookkeeping)
        if len(kept) == len(fields):
            self.seen.mappings[id(fields)] = fields
        elif kept:
            self.seen.partial[id(fields)] = fields, kept

    def _lost(self, path: str) -> Iterable[str]:
        """Names that a forward removed although they were there at first."""
        head = f"{path}."
        return [place[len(head) :] for place in self._bookkeeping if place.startswith(head) and "." not in place[len(head) :]]

    def field(self, value: object, name: str, path: str) -> bytes:
        """The bytes of one named place, or what was first read there if a forward changes it."""
        if path in self._bookkeeping:
            first = self._bookkeeping[path]
            return b"" if first is None else encode(name) + first
        shared = id(value) in self._memo and not isinstance(value, _IMMUTABLE)
        content = self.value(value, path)
        self.seen.fields[path] = b"shared" if shared else content
        return encode(name) + content

    def _sequence(self, value: Any, path: str) -> bytes:
        cls = type(value)
        head = encode(class_name(cls))
        if len(value) > _ITEMS:
            self._opaque(value, path)
            return frame(b"long", head + encode(len(value)))
        if not isinstance(value, tuple | frozenset):
            self.seen.sequences[id(value)] = value
        items: Iterable[bytes] = [self.value(item, f"{path}[{at}]") for at, item in enumerate(value)]
        if isinstance(value, set | frozenset):
            items = sorted(items)
        return frame(b"sequence", head + b"".join(items))

    def _mapping(self, value: Mapping[Any, object], path: str) -> bytes:
        head = encode(class_name(type(value)))
        if len(value) > _ITEMS:
            self._opaque(value, path)
            return frame(b"long", head + encode(len(value)))
        if isinstance(value, dict):
            self.seen.mappings[id(value)] = value
        elif (fields := getattr(value, "__dict__", None)) is not None:  # a UserDict, a wrapper of a dict
            self.seen.mappings[id(fields)] = fields
            self.fields(fields, path)
        pairs = (self.value(key, f"{path} key") + self.value(item, f"{path}[{key!r:.40}]") for key, item in value.items())
        return frame(b"mapping", head + b"".join(pairs))

    def _tensor(self, value: torch.Tensor, path: str) -> bytes:
        name = self._tensors.setdefault(id(value), path)
        if name == path:
            self.seen.tensors[path] = value
        return frame(b"tensor at", encode(name))

    def _array(self, value: np.ndarray[Any, Any], path: str) -> bytes:
        if value.dtype.hasobject:
            return self._sequence(value.ravel().tolist(), path)
        name = self._tensors.setdefault(id(value), path)
        if name == path:
            self.seen.arrays[path] = value
        return frame(b"array at", encode(name))

    def module(self, value: nn.Module, path: str) -> bytes:
        """A reference to a module by name; one that nobody knew is remembered to be walked."""
        name = self._modules.get(id(value))
        if name is None:
            name = self._modules[id(value)] = path
            self.seen.modules[path] = value
        return frame(b"nn.Module at", encode(name))

    # --- code ---

    def _callable(self, value: object, path: str) -> bytes | None:
        if isinstance(value, types.FunctionType):
            return self.function(value, path)
        if isinstance(value, types.MethodType):
            return frame(b"method", self.value(value.__func__, path) + self.value(value.__self__, f"{path}.__self__"))
        if isinstance(value, functools.partial):
            inside = (value.func, value.args, dict(value.keywords))
            return frame(b"partial", b"".join(self.value(item, path) for item in inside))
        if isinstance(value, staticmethod | classmethod):
            return frame(type(value).__name__.encode(), self.value(value.__func__, path))
        if isinstance(value, property):
            return frame(b"property", b"".join(self.value(part, path) for part in (value.fget, value.fset)))
        if isinstance(value, functools.cached_property):
            return frame(b"cached_property", self.value(value.func, path))
        if isinstance(value, types.BuiltinFunctionType | types.MethodDescriptorType):
            return frame(b"builtin", encode(f"{getattr(value, '__module__', None)}.{value.__qualname__}"))
        if isinstance(value, _DESCRIPTORS):
            return frame(b"descriptor", encode(value.__name__))
        wrapped = getattr(value, "__wrapped__", None)  # functools.lru_cache and its like
        if isinstance(wrapped, types.FunctionType) and of_library(type(value).__module__):
            return frame(b"wrapped", encode(class_name(type(value))) + self.value(wrapped, path))
        return None

    def function(self, fn: types.FunctionType, path: str) -> bytes:
        """A function by its code, defaults and closure; the global names it reads are followed."""
        closure = zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
        inside = b"".join(self._cell(cell, f"{path} variable {name}") for name, cell in closure if name != "__class__")
        if of_library(fn.__module__):
            return frame(b"named", encode(f"{fn.__module__}.{fn.__qualname__}") + inside)
        self.seen.functions[id(fn)] = fn
        extra = {name: item for name, item in vars(fn).items() if name != "__wrapped__"}
        if extra:
            self.seen.mappings[id(vars(fn))] = vars(fn)
        given = b"".join(self.value(item, f"{path} default") for item in (fn.__defaults__, fn.__kwdefaults__))
        content = code_bytes(fn.__code__) + given + inside + self.fields(extra, path)
        return frame(b"function", content + self._globals(fn))

    def _cell(self, cell: types.CellType, path: str) -> bytes:
        try:
            content = cell.cell_contents
        except ValueError:  # not filled yet
            return frame(b"empty", b"")
        if path not in self._bookkeeping:
            self.seen.cells[id(cell)] = cell, content
        return self.field(content, "", path)

    def _globals(self, fn: types.FunctionType) -> bytes:
        """Follow the global names of a function; its own bytes only say what they are bound to by name."""
        namespace = fn.__globals__
        if of_library(namespace.get("__name__")):
            return b""
        if not self._following:
            self._met.append(fn)
            return b""
        read, known = global_names(fn.__code__)
        self._call(known)
        return b"".join(self._global(namespace, name, known) for name in read if name in namespace)

    def _global(self, namespace: dict[str, Any], name: str, known: tuple[str, ...]) -> bytes:
        value = namespace[name]
        if isinstance(value, types.ModuleType):
            return self._python_module(namespace, name, known)
        # From installed code only functions and plain constants are followed: its registries and caches are
        # legion, and differ from process to process without a meaning.
        ours = not installed(namespace)
        if isinstance(value, types.FunctionType | type | functools._lru_cache_wrapper):
            target = f"{value.__module__}.{value.__qualname__}"
            self.seen.refer(namespace, name, value)
            if not of_library(value.__module__) and (not isinstance(value, type) or ours):
                self._reach(f"code of {target}", value)
            return encode((name, target))
        place = f"global {namespace.get('__name__')}.{name}"
        if (ours or _plain(value)) and place not in self._bookkeeping:
            self.seen.refer(namespace, name, value)
            self._reach(place, value)
        elif self._bookkeeping.get(place) is not None:
            self.seen.reach(place, digest(self.field(None, "", place)))
        return encode(name)

    def _python_module(self, namespace: dict[str, Any], name: str, known: tuple[str, ...]) -> bytes:
        """A Python module by name; the attributes of it that the code may read are followed."""
        module: types.ModuleType = namespace[name]
        self.seen.refer(namespace, name, module)
        inner = vars(module)
        if of_library(module.__name__) or installed(inner):
            return encode((name, module.__name__))
        read = [attribute for attribute in known if attribute in inner and attribute != name]
        plain = [attribute for attribute in read if not isinstance(inner[attribute], types.ModuleType)]
        return encode((name, module.__name__)) + b"".join(self._global(inner, attribute, ()) for attribute in plain)

    def _reach(self, name: str, value: object) -> None:
        # Read later, from a queue: how deep the way to it was must not count, and recursion has a limit.
        if id(value) not in self._reached or isinstance(value, _IMMUTABLE):
            self._reached.add(id(value))
            self._queue.append((name, value))

    def _class_reference(self, cls: type) -> bytes:
        """A class by name; what it defines, where it is not a library's, is a part of its own."""
        if not installed_class(cls):
            for base in cls.__mro__:
                self._reach_class(base)
        return frame(b"class", encode(class_name(cls)))

    def class_chain(self, cls: type) -> bytes:
        """The names of a class and its bases; the code of each that is not a library's is followed."""
        for base in cls.__mro__:
            self._reach_class(base)
        names = frame(b"classes", encode([class_name(base) for base in cls.__mro__]))
        patched = [base for base in cls.__mro__ if of_library(base.__module__) and _forward_is_foreign(base)]
        return names + b"".join(self.value(vars(base)["forward"], f"{class_name(base)}.forward") for base in patched)

    def _reach_class(self, cls: type) -> None:
        if not of_library(cls.__module__) and id(cls) not in self.seen.classes:
            self.seen.classes[id(cls)] = cls
            self._queue.append((f"code of {class_name(cls)}", _Members(cls)))

    def _members(self, cls: type) -> bytes:
        """Everything that a class body defines, in the order of its names."""
        names = sorted(name for name in vars(cls) if name not in _NO_CONTENT_IN_CLASS)
        kept = tuple(name for name in names if f"{class_name(cls)}.{name}" not in self._bookkeeping)
        if len(kept) < len(names):
            self.seen.busy[cls] = kept
        self._following = not installed_class(cls)
        try:
            return b"".join(self._member(cls, name) for name in names)
        finally:
            self._following = True

    def _member(self, cls: type, name: str) -> bytes:
        """One member of a class.

        Methods of installed classes are many (downloading, saving), and what those read of their environment
        differs from process to process. So their global names are followed only once something calls them.
        """
        self._met = []
        content = self.field(vars(cls)[name], name, f"{class_name(cls)}.{name}")
        self._waiting.setdefault(name, []).extend(self._met)
        if name in self._called:
            self._call_now(name)
        return content

    def _call(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._called:
                self._called.add(name)
                self._call_now(name)

    def _call_now(self, name: str) -> None:
        for fn in self._waiting.pop(name, ()):
            self._queue.append((f"names in {fn.__module__}.{fn.__qualname__}", _NamesIn(fn)))

    def finish(self) -> Seen:
        """Read what was reached by name, until nothing new is reached."""
        while self._queue:
            name, value = self._queue.pop()
            self._objects = 0
            if isinstance(value, _Members):
                read = self._members(value.cls)
            elif isinstance(value, _NamesIn):
                read = self._globals(value.fn)
            else:
                read = self.field(value, "", name)
            self.seen.reach(name, digest(read))
        return self.seen


@dataclasses.dataclass(frozen=True, slots=True)
class _Members:
    """In the queue: a class of which the members are to be read, not only the name."""

    cls: type


@dataclasses.dataclass(frozen=True, slots=True)
class _NamesIn:
    """In the queue: a method of an installed class of which the global names are to be followed."""

    fn: types.FunctionType


def _forward_is_foreign(cls: type) -> bool:
    """Whether somebody put another forward into a class of torch."""
    forward = vars(cls).get("forward")
    if forward is None or isinstance(forward, types.FunctionType) and forward.__module__ == cls.__module__:
        return False
    return not of_library(getattr(forward, "__module__", None))


def _plain(value: object) -> bool:
    if isinstance(value, tuple | frozenset):
        return all(map(_plain, value))
    return isinstance(value, _IMMUTABLE)


def installed_class(cls: type) -> bool:
    """Whether a class comes from installed code."""
    module = sys.modules.get(cls.__module__)
    return of_library(cls.__module__) or (module is not None and installed(vars(module)))


def _without(fields: Mapping[str, object], name: str) -> dict[str, object]:
    return {field: value for field, value in fields.items() if field != name}


def _slots(value: object) -> dict[str, object] | None:
    """The filled slots of an object whose classes declare any."""
    names = [name for base in type(value).__mro__ for name in _listed(vars(base).get("__slots__", ()))]
    if not names:
        return None
    return {name: getattr(value, name) for name in names if name != "__weakref__" and hasattr(value, name)}


def _listed(slots: object) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)  # type: ignore[call-overload,no-any-return]


def callable_digest(fn: object) -> tuple[bytes, tuple[str, ...]]:
    """The digest of a function or callable by what it does, and the names of what in it had no content.

    >>> callable_digest(lambda x: x + 1)[0] == callable_digest(lambda x: x + 2)[0]
    False
    """
    reader = Reader()
    content = reader.value(fn, "callable")
    seen = reader.finish()
    for name, module in seen.modules.items():
        content += encode(class_name(type(module)))
        seen.opaque[f"{name} ({class_name(type(module))})"] = None
    for name, tensor in seen.tensors.items():
        content += encode(name) + _content_or_opaque(tensor, name, seen)
    for name, array in seen.arrays.items():
        content += encode(name) + encode(array)
    reached = [(name, sorted(contents)) for name, contents in sorted(seen.reached.items())]
    return digest(content + encode(reached)), tuple(seen.opaque)


def _content_or_opaque(tensor: torch.Tensor, name: str, seen: Seen) -> bytes:
    try:
        return encode(tensor)
    except NoContentError:
        seen.opaque[f"{name} ({class_name(type(tensor))})"] = None
        return b""
