"""The forward of a class as a function, also where it is a static method, a class method or a property."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["forward_of"]


def forward_of(cls: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a class as a function of the module and its arguments, whatever kind of attribute it is."""
    found = inspect.getattr_static(cls, "forward")
    if not isinstance(found, staticmethod | classmethod | property):
        return cls.forward

    def forward(self: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        return found.__get__(self, type(self))(*args, **kwargs)

    if not isinstance(found, property):
        functools.update_wrapper(forward, found.__func__)
        of_its_own = list(inspect.signature(found.__get__(None, cls)).parameters.values())
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        forward.__signature__ = inspect.Signature([own, *of_its_own])  # type: ignore[attr-defined]
    return forward
