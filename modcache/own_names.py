"""Tell whether methods say ``super(Name, self)`` with the name of their own class, and what that name means now."""

from __future__ import annotations

import inspect
import types

from .errors import UsageError

__all__ = ["functions_naming", "refuse_naming"]


def functions_naming(cls: type) -> dict[str, types.FunctionType]:
    """The functions in the body of a class that say ``super(Name, ...)`` with its own name."""
    found = {}
    for name, value in vars(cls).items():
        function = inspect.unwrap(getattr(value, "__func__", value))
        code = getattr(function, "__code__", None)
        if code is not None and {"super", cls.__name__} <= {*code.co_names, *code.co_freevars}:
            found[name] = function
    return found


def refuse_naming(cls: type, functions: dict[str, types.FunctionType]) -> None:
    """Refuse ``super(Name, self)`` where the name means the cached class: it would call itself without end.

    It does once it is bound to that: a decorator is called before, so the name means nothing then, or another class.
    """
    for name, function in functions.items():
        if _meant(function, cls.__name__) is not cls:
            raise UsageError(
                f"{cls.__name__}.{name} says super({cls.__name__}, ...), but once decorated that name means the cached "
                "class. Write super(), or wrap instances: cached_module(module)."
            )


def _meant(function: types.FunctionType, name: str) -> object:
    """What a name in a function means now; None if it means nothing yet."""
    if name not in function.__code__.co_freevars:
        return function.__globals__.get(name)
    cell = (function.__closure__ or ())[function.__code__.co_freevars.index(name)]
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None
