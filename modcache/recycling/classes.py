"""Make the classes of recycled models: the user's own class, with a forward that resumes at the cut."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..classes import ATTACHED, Made, made_once, noticed_apply, reduced_by

__all__ = ["recycled_class"]

_made: Made = weakref.WeakKeyDictionary()


def recycled_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that an instance of ``cls`` takes on when it is recycled."""

    def body() -> dict[str, Any]:
        return {
            "__reduce_ex__": reduced_by(cls, recycled_class, _new_recycled),
            "forward": _forward(cls),
            "train": _train(cls),
            "_apply": noticed_apply(cls),
        }

    return made_once(_made, cls, body)


def _forward(cls: type[nn.Module]) -> Callable[..., Any]:
    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return _outside_the_graph(self, cls, args, kwargs)
        return _eagerly(self, cls, args, kwargs)

    return forward


def _outside_the_graph(module: nn.Module, cls: type[nn.Module], args: Any, kwargs: Any) -> Any:
    """A clean graph break: which modules run is no part of a compiled graph."""
    return torch.compiler.disable(_eagerly)(module, cls, args, kwargs)  # type: ignore[no-untyped-call]


_outside_the_graph._torchdynamo_disable = True  # type: ignore[attr-defined]


def _eagerly(module: nn.Module, cls: type[nn.Module], args: Any, kwargs: Any) -> Any:
    attached = module.__dict__.get(ATTACHED)
    if attached is None:  # of a class derived of the class of a recycled model
        return cls.forward(module, *args, **kwargs)
    return attached.forward(module, cls, args, kwargs)


def _train(cls: type[nn.Module]) -> Callable[..., Any]:
    @functools.wraps(cls.train)
    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        cls.train(self, mode)
        if (found := self.__dict__.get(ATTACHED)) is not None:
            found.after_train(self)
        return self

    return train


def _new_recycled(cls: type[nn.Module], *args: Any) -> nn.Module:
    made = recycled_class(cls)
    return made.__new__(made, *args)
