"""Read values and objects into bytes, and note on the way what can change."""

from __future__ import annotations

import abc
import argparse
import collections
import contextvars
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import os
import re
import sys
import threading
import types
import weakref
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._contextlib import _DecoratorContextManager

from ..digest import encode, frame
from ..tensors import NoContentError
from .code import module_name, of_library, place_of
from .libraries import said_of, shows_its_fields
from .origins import ORIGIN_NAMES, as_loaded, origins_in
from .seen import Seen

_DEPTH = 64
_ITEMS = 1 << 12  # of one container; one of more is read in bulk if it can be
_OBJECTS = 1 << 12  # reached from one attribute; the others count by class

_OF_TOKENIZERS = ("model_max_length", "padding_side", "truncation_side")
IMMUTABLE = (int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.layout)
_IMMUTABLE_TYPES = frozenset({*IMMUTABLE, bool})
_SAID_BY_TEXT = (
    dt.date,
    dt.time,
    dt.timedelta,
    decimal.Decimal,
    fractions.Fraction,
    torch.Size,
)
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)


class ValueReader(abc.ABC):
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

    def attribute(self, value: object, name: str, path: str) -> bytes:
        """The bytes of one attribute of a module, with a fresh allowance of objects."""
        self._objects = 0
        return self.field(value, name, path)

    def value(self, value: object, path: str) -> bytes:
        """The framed bytes of any value; one without content gives its class name and is listed as opaque."""
        if type(value) in _IMMUTABLE_TYPES:
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
        except Exception:
            if not _may_fail(value):
                raise
            found = self._opaque(value, path)
        finally:
            del self._open[id(value)]
        self._memo[id(value)] = found
        self._keep.append(value)
        return found

    def _read(self, value: object, path: str) -> bytes:
        if type(value).__module__ == "unittest.mock":  # it passes for anything, and changes with each call
            return self._opaque(value, path)
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if isinstance(value, nn.Module):
            return self.module(value, path)
        if isinstance(value, np.ndarray):
            return self._array(value, path)
        if isinstance(value, type):
            return self.class_reference(value)
        if isinstance(value, tuple | list | set | frozenset | collections.deque):
            return self._sequence(value, path)
        if (whole := _of_process(value)) is not None:
            return frame(b"of the process", encode(whole))
        if isinstance(value, Mapping) and not dataclasses.is_dataclass(value):
            return self._mapping(value, path)
        if (known := self.callable(value, path)) is not None:
            return known
        if isinstance(value, contextvars.ContextVar):
            self.seen.variables[id(value)] = value
            return frame(b"variable", encode(value.name) + self.value(value.get(None), path))
        if isinstance(value, enum.Enum):
            inside = encode(value.name) + self.value(value.value, f"{path}.value")
            return frame(b"enum", self._kind(type(value)) + inside)
        if isinstance(value, _SAID_BY_TEXT) or type(value).__module__ == "typing":
            return frame(b"said", encode(f"{place_of(type(value))} {value}"))
        if isinstance(value, bytearray):
            self.seen.sequences[id(value)] = value
            return encode(value)
        if isinstance(value, IMMUTABLE):  # of a class of its own
            return frame(b"immutable", self._kind(type(value)) + encode(value) + (self._set_on(value, path) or b""))
        if isinstance(value, re.Pattern):
            return frame(b"pattern", encode((value.pattern, value.flags)))
        if isinstance(value, types.ModuleType):
            return self.python_module(value)
        if isinstance(value, weakref.ref):
            return frame(b"weak", self.value(value(), path))
        if isinstance(value, _DecoratorContextManager):  # torch.no_grad around a method; "prev" is call state
            return frame(b"context", encode(place_of(type(value))) + self.fields(_without(vars(value), "prev"), path))
        return self._object(value, path)

    def _opaque(self, value: object, path: str) -> bytes:
        name = place_of(type(value))
        self.seen.opaque[f"{path} ({name})"] = value
        return frame(b"opaque", encode(name))

    def _of_library(self, value: object, path: str) -> bytes:
        if isinstance(value, array | memoryview):
            self.seen.memories[id(value)] = value
        said = said_of(value)
        if said is not None:
            return frame(b"told", encode(place_of(type(value))) + self.value(said, path))
        if isinstance(value, torch.ScriptObject):
            self.seen.sealed[f"{path} ({place_of(type(value))})"] = None
        try:
            return encode(value)
        except NoContentError:
            return self._opaque(value, path)

    def _object(self, value: object, path: str) -> bytes:
        cls = type(value)
        if isinstance(value, threading.local):  # it is another one in each thread
            self.seen.locals[id(value)] = value
            return frame(b"local", self.class_reference(cls) + self.fields(dict(vars(value)), path))
        if of_library(cls.__module__) and not (isinstance(value, _NAMESPACES) or shows_its_fields(value)):
            return self._of_library(value, path)
        self._objects += 1
        bases = {base.__name__ for base in cls.__mro__}
        if self._objects > _OBJECTS or "Logger" in bases:
            return self._opaque(value, path)
        if "PreTrainedTokenizerBase" in bases:
            return self._tokenizer(value, path)
        inner = self._set_on(value, path)
        if inner is None:
            return self._opaque(value, path)
        return frame(b"object", self.class_reference(cls) + inner)

    def _tokenizer(self, value: object, path: str) -> bytes:
        """Of a tokenizer: not its vocabulary, which is listed as opaque, but where it cuts and pads."""
        fields: dict[str, object] = getattr(value, "__dict__", {})
        names = [name for name in _OF_TOKENIZERS if name in fields]
        kept = tuple(name for name in names if f"{path}.{name}" not in self._bookkeeping)
        if kept:
            self.seen.partial[id(fields)] = fields, kept
        inside = b"".join(self.field(fields[name], name, f"{path}.{name}") for name in names)
        return frame(b"tokenizer", self._opaque(value, path) + inside)

    def _kind(self, cls: type) -> bytes:
        """The class of a container or a number: by name, and by its code where it is the user's own."""
        return encode(place_of(cls)) if of_library(cls.__module__) else self.class_reference(cls)

    def _set_on(self, value: object, path: str) -> bytes | None:
        """The attributes of an object, in its ``__dict__`` and its slots; None if it can have none."""
        fields, slots = getattr(value, "__dict__", None), _slots(value)
        if fields is None and slots is None:
            return None
        if fields is not None:
            self._watch(fields, path)
        return self.fields(as_loaded(value, {**(fields or {}), **self._in_slots(value, slots or (), path)}), path)

    def _in_slots(self, value: object, slots: tuple[str, ...], path: str) -> dict[str, object]:
        filled = {name: getattr(value, name) for name in slots if hasattr(value, name)}
        if slots:
            kept = tuple(name for name in filled if f"{path}.{name}" not in self._bookkeeping)
            self.seen.slotted[id(value)] = value, kept, tuple(name for name in slots if name not in filled)
        return filled

    def slots_of_module(self, module: nn.Module, path: str) -> bytes:
        """The attributes of a module that are no items of its ``__dict__``; hardly any class has such."""
        slots = _slots(module)
        # Whoever looks at them again does not hold the module.
        return self.fields(self._in_slots(weakref.proxy(module), slots, path), path) if slots else b""

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
        return [
            place[len(head) :]
            for place in self._bookkeeping
            if place.startswith(head) and "." not in place[len(head) :]
        ]

    def field(self, value: object, name: str, path: str) -> bytes:
        """The bytes of one named place, or what was first read there if a forward changes it."""
        if path in self._bookkeeping:
            first = self._bookkeeping[path]
            return b"" if first is None else encode(name) + first
        shared = id(value) in self._memo and not isinstance(value, IMMUTABLE)
        content = self.value(value, path)
        self.seen.fields[path] = b"shared" if shared else content
        if shared:
            self.seen.shared[path] = content
        return encode(name) + content

    def _sequence(self, value: Any, path: str) -> bytes:
        cls = type(value)
        if not isinstance(value, tuple | frozenset):
            self.seen.sequences[id(value)] = value
        inside = self._in_bulk(value) or self._items(value, path)
        return frame(b"sequence", self._kind(cls) + inside + self._beside(value, path))

    def _items(self, value: Iterable[object], path: str) -> bytes:
        items: Iterable[bytes] = [self.value(item, f"{path}[{at}]") for at, item in enumerate(value)]
        return b"".join(sorted(items) if isinstance(value, set | frozenset) else items)

    def _mapping(self, value: Mapping[Any, object], path: str) -> bytes:
        if isinstance(value, dict):
            self.seen.mappings[id(value)] = value
        elif isinstance(value, types.MappingProxyType):
            for view in (value.keys(), value.values()):
                self.seen.sequences[id(view)] = view
        origins = origins_in(value, path)
        inside = self._in_bulk(value) or b"".join(
            self.value(key, f"{path} key") + self.value(item, f"{path}[{key!r:.40}]")
            for key, item in tuple(value.items())  # to read a value may make one, and put it in here
            if not (isinstance(key, str) and key in origins)
        )
        return frame(b"mapping", self._kind(type(value)) + inside + self._beside(value, path))

    def _in_bulk(self, value: Any) -> bytes:
        """The bytes of a container of very many plain values, in a tenth of the time; nothing for any other."""
        if len(value) <= _ITEMS:
            return b""
        mapping = isinstance(value, Mapping)
        if not all(map(_all_plain, (value.keys(), value.values()) if mapping else (value,))):
            return b""
        plain = dict if mapping else frozenset if isinstance(value, set | frozenset) else tuple
        return frame(b"long", encode(plain(value)))

    def _beside(self, value: object, path: str) -> bytes:
        """What a container of a class of its own, or one that makes items, is besides its items; mostly nothing."""
        extra = b""
        if isinstance(value, collections.defaultdict):
            self.seen.slotted[id(value)] = value, ("default_factory",), ()
            extra = self.field(value.default_factory, "default_factory", f"{path}.default_factory")
        return extra + (self._set_on(value, path) or b"")

    def _tensor(self, value: torch.Tensor, path: str) -> bytes:
        name = self._tensors.setdefault(id(value), path)
        if name == path:
            self.seen.tensors[path] = value
        return frame(b"tensor at", encode(name))

    def _array(self, value: np.ndarray[Any, Any], path: str) -> bytes:
        if value.dtype.hasobject:
            flat = value.reshape(-1)
            self.seen.sequences[id(flat)] = flat
            return frame(b"sequence", encode(value.shape) + self._items(flat.tolist(), path))
        self.seen.arrays[path] = value
        return frame(b"array at", encode(path))

    def module(self, value: nn.Module, path: str) -> bytes:
        """A reference to a module by name; one that nobody knew is remembered to be walked."""
        name = self._modules.get(id(value))
        if name is None:
            name = self._modules[id(value)] = path
            self.seen.modules[path] = value
        return frame(b"nn.Module at", encode(name))

    # --- code, which a subclass reads ---

    @abc.abstractmethod
    def callable(self, value: object, path: str) -> bytes | None:
        """The bytes of a function or another callable; None for anything else."""

    @abc.abstractmethod
    def class_reference(self, cls: type) -> bytes:
        """A class by name."""

    def python_module(self, module: types.ModuleType) -> bytes:
        """A Python module by name."""
        return frame(b"module", encode(module_name(module.__name__)))


def _of_process(value: object) -> str | None:
    """The name of what is another thing in each process, and is no part of a module wherever it is named."""
    if value is sys.modules:
        return "sys.modules"
    return "os.environ" if value is os.environ else None


def _may_fail(value: object) -> bool:
    """Whether an object may raise for whoever reads it: it is of a class of somebody's own, or says so (a mock)."""
    cls = type(value)
    try:
        return value.__class__ is not cls or not of_library(cls.__module__)
    except Exception:
        return True


def _without(fields: Mapping[str, object], name: str) -> dict[str, object]:
    return {field: value for field, value in fields.items() if field != name}


def _slots(value: object) -> tuple[str, ...] | None:
    """The names of an object's slots; None where its classes declare none."""
    declared = [
        _mangled(name, base) for base in type(value).__mro__ for name in _listed(vars(base).get("__slots__", ()))
    ]
    return tuple(name for name in dict.fromkeys(declared) if name not in ("__dict__", "__weakref__")) or None


def _listed(slots: Iterable[str]) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _mangled(name: str, cls: type) -> str:
    """The name under which a private slot is found."""
    private = name.startswith("__") and not name.endswith("__")
    return f"_{cls.__name__.lstrip('_')}{name}" if private else name


def _all_plain(values: Iterable[object]) -> bool:
    """Whether all values are immutable, or pairs and the like of such."""
    types_met = set(map(type, values))
    nested = types_met - _IMMUTABLE_TYPES
    return not nested or (nested == {tuple} and all(_all_plain(item) for item in values if type(item) is tuple))
