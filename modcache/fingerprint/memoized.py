"""Find the members of classes in which installed code only keeps what it found out about the class."""

from __future__ import annotations

import types
import weakref
from typing import TYPE_CHECKING

from .code import installed_class, names_in, of_library

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["body_without", "memoized"]

_known: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()


def memoized(cls: type) -> frozenset[str]:
    """The names under which class methods of installed bases note an answer on the class, for themselves alone.

    Such a member comes and goes with what else is built in a process (transformers asks each class once whether its
    attention can be switched), and changes no result: nothing but the method that stores it says its name.
    """
    found = _known.get(cls)
    if found is None:
        bases = [base for base in cls.__mro__ if not of_library(base.__module__) and installed_class(base)]
        found = _known[cls] = _noted(bases) if bases else frozenset()
    return found


def _noted(bases: Iterable[type]) -> frozenset[str]:
    stored: set[str] = set()
    said: dict[str, set[types.CodeType]] = {}
    for base in bases:
        for member in vars(base).values():
            function = getattr(member, "__func__", getattr(member, "fget", member))
            if not isinstance(function, types.FunctionType):
                continue
            names = names_in(function.__code__)
            for name in names.used:
                if name.startswith("_"):
                    said.setdefault(name, set()).add(function.__code__)
            if isinstance(member, classmethod):
                stored.update(names.stored)
    return frozenset(name for name in stored if len(said.get(name, ())) == 1)


def body_without(body: Mapping[str, object], names: frozenset[str]) -> list[object]:
    """The members of a class but for these."""
    return [member for name, member in body.items() if name not in names]
