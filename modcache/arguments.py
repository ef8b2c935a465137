"""Name the arguments of a call by a signature, so that `m(x)` and `m(x=x)` are one call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .batch import Batch, Bound, take

__all__ = ["Arguments", "Binder"]

_Place = int | str
"""Where an argument was given: its position, or its keyword."""


class Arguments(NamedTuple):
    """The arguments of a call as they were given, and by name.

    Args:
        args: the positional ones.
        kwargs: the ones given by keyword.
        names: name and place of each, in the order of the signature.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    names: tuple[tuple[str, _Place], ...]

    def bound(self) -> Bound:
        """Names and values, in the order of the signature."""
        args, kwargs = self.args, self.kwargs
        return [(name, args[place] if type(place) is int else kwargs[place]) for name, place in self.names]  # type: ignore[index]

    def taken(self, batch: Batch, places: Sequence[int]) -> Arguments:
        """The same call on some of its rows."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for name, place in self.names:
            if isinstance(place, int):
                args[place] = take(args[place], batch, places, name)
            else:
                kwargs[place] = take(kwargs[place], batch, places, name)
        return Arguments(tuple(args), kwargs, self.names)


class Binder:
    """Names arguments by the signature of a function; what it worked out for one form of call it remembers."""

    def __init__(self, function: Callable[..., Any]) -> None:
        try:
            self._signature: inspect.Signature | None = inspect.signature(function)
        except (TypeError, ValueError):  # a builtin without one
            self._signature = None
        self._known: dict[tuple[int, tuple[str, ...]], tuple[tuple[str, _Place], ...]] = {}

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """The arguments with their names.

        Raises:
            TypeError: the function does not take these arguments.
        """
        form = len(args), tuple(kwargs)
        names = self._known.get(form)
        if names is None:
            names = self._known[form] = _names(self._signature, *form)
        return Arguments(args, kwargs, names)


def _names(
    signature: inspect.Signature | None, count: int, keywords: tuple[str, ...]
) -> tuple[tuple[str, _Place], ...]:
    places: Sequence[_Place] = range(count)
    if signature is None:
        return (
            *((f"args[{place}]", place) for place in places),
            *((name, name) for name in sorted(keywords)),
        )
    bound = signature.bind(*places, **dict(zip(keywords, keywords, strict=True)))
    found: list[tuple[str, _Place]] = []
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            found += [(f"{name}[{number}]", place) for number, place in enumerate(value)]
        elif kind is inspect.Parameter.VAR_KEYWORD:
            found += [(keyword, keyword) for keyword in sorted(value)]
        else:
            found.append((name, value))
    return tuple(found)
