"""Methods that say ``super(Name, self)``, as older code does, where the name means a class derived of theirs."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from typing import Any

__all__ = ["Behind", "own_functions", "says_its_name"]


def says_its_name(cls: type) -> bool:
    """Whether a function in the body of a class says ``super`` and the name of the class."""
    return any(
        {"super", cls.__name__} <= names
        for value in own_functions(cls).values()
        for function in _functions_in(value)
        for names in _names_in(function.__code__)
    )


def own_functions(cls: type) -> dict[str, object]:
    """The methods and properties in the body of a class, but for what is asked of the classes to come."""
    kinds = (types.FunctionType, staticmethod, classmethod, property)
    return {
        name: value for name, value in vars(cls).items() if isinstance(value, kinds) and name != "__init_subclass__"
    }


class Behind:
    """An attribute that is what ``super(cls, self)`` finds under its name, wherever ``self`` asks for it.

    Args:
        cls: the class whose own attribute is passed over.
        name: of the attribute.
    """

    def __init__(self, cls: type, name: str) -> None:
        self._cls = cls
        self._name = name

    def __get__(self, instance: object, owner: type) -> object:
        return getattr(super(self._cls, owner if instance is None else instance), self._name)


def _functions_in(value: Any) -> Iterator[types.FunctionType]:
    accessors = (value.fget, value.fset, value.fdel) if isinstance(value, property) else ()
    for part in accessors or (getattr(value, "__func__", value),):
        function = inspect.unwrap(part) if callable(part) else None
        if isinstance(function, types.FunctionType):
            yield function


def _names_in(code: types.CodeType) -> Iterator[set[str]]:
    """The names that code reads from outside, and for each function within it the same."""
    yield {*code.co_names, *code.co_freevars}
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names_in(inner)
