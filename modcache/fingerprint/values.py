"""Read values and objects into bytes, and note on the way what can change."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import re
import types
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._contextlib import _DecoratorContextManager

from ..digest import encode, frame
from ..tensors import NoContentError
from .code import of_library
from .seen import Seen

_DEPTH = 16
_ITEMS = 4096  # of one container; above that it counts by class and length
_OBJECTS = 256  # reached from one attribute

# Where a model came from is not what it is: moving a folder must not empty a cache.
ORIGIN_NAMES = frozenset({"_name_or_path", "name_or_path", "transformers_version", "_commit_hash"})

_OPAQUE_BASES = frozenset(
    {"PreTrainedTokenizerBase", "ProcessorMixin", "FeatureExtractionMixin", "ImageProcessingMixin", "Logger"}
)
IMMUTABLE = (int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.layout)
_SAID_BY_TEXT = (
    dt.date,
    dt.time,
    dt.timedelta,
    decimal.Decimal,
    fractions.Fraction,
    torch.Size,
)
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)


def class_name(cls: type) -> str:
    """The importable name of a class, as written in namespaces."""
    return f"{cls.__module__}.{cls.__qualname__}"


class ValueReader:
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
        if isinstance(value, IMMUTABLE) and not isinstance(value, enum.Enum):
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
            return self.class_reference(value)
        if isinstance(value, tuple | list | set | frozenset | collections.deque):
            return self._sequence(value, path)
        if isinstance(value, Mapping) and not dataclasses.is_dataclass(value):
            return self._mapping(value, path)
        if (known := self.callable(value, path)) is not None:
            return known
        if isinstance(value, enum.Enum):
            return frame(b"enum", encode(f"{class_name(type(value))}.{value.name}"))
        if isinstance(value, _SAID_BY_TEXT) or type(value).__module__ == "typing":
            return frame(b"said", encode(f"{class_name(type(value))} {value}"))
        if isinstance(value, bytearray):
            self.seen.sequences[id(value)] = value
            return encode(value)
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
        return frame(b"object", self.class_reference(cls) + inner)

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
        pairs = (
            self.value(key, f"{path} key") + self.value(item, f"{path}[{key!r:.40}]") for key, item in value.items()
        )
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

    # --- code, which a subclass reads ---

    def callable(self, value: object, path: str) -> bytes | None:
        """The bytes of a function or another callable; None for anything else."""
        return None

    def class_reference(self, cls: type) -> bytes:
        """A class by name."""
        return frame(b"class", encode(class_name(cls)))


def _without(fields: Mapping[str, object], name: str) -> dict[str, object]:
    return {field: value for field, value in fields.items() if field != name}


def _slots(value: object) -> dict[str, object] | None:
    """The filled slots of an object whose classes declare any."""
    names = [name for base in type(value).__mro__ for name in _listed(vars(base).get("__slots__", ()))]
    if not names:
        return None
    return {name: getattr(value, name) for name in names if name != "__weakref__" and hasattr(value, name)}


def _listed(slots: Iterable[str]) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)
