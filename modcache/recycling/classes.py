"""Make the classes of recycled models: the user's own class, with a forward that resumes at the cut."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..classes import ATTACHED, noticed_apply, reduced_by, subclass

__all__ = ["is_never_called", "recycled_class"]

_made: weakref.WeakKeyDictionary[type, weakref.ref[type]] = weakref.WeakKeyDictionary()


def recycled_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that an instance of ``cls`` takes on when it is recycled."""
    known = _made.get(cls)
    made = known() if known is not None else None
    if made is None:

        @functools.wraps(cls.__init__)
        def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - it is the class's own
            if type(self) is made:
                self.__class__ = cls  # `type(model)(...)` asks for a new model, which nobody has recycled
            cls.__init__(self, *args, **kwargs)

        body = {
            "__init__": __init__,
            "__reduce_ex__": reduced_by(cls, recycled_class, _new_recycled),
            "forward": _forward(cls),
            "train": _train(cls),
            "_apply": noticed_apply(cls),
        }
        made = subclass(cls, body)
        _made[cls] = weakref.ref(made)
    return made


def is_never_called(module: nn.Module) -> bool:
    """Whether a module only holds others, as a plain list or mapping of modules does: it has no forward."""
    if isinstance(module, torch.jit.ScriptModule):  # of which asking for the class's forward fails
        return False
    return type(module).forward is nn.Module.forward and "forward" not in vars(module)


def _forward(cls: type[nn.Module]) -> Callable[..., Any]:
    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return _outside_the_graph(self, cls, args, kwargs)
        return self.__dict__[ATTACHED].forward(self, cls, args, kwargs)

    return forward


def _outside_the_graph(module: nn.Module, cls: type[nn.Module], args: Any, kwargs: Any) -> Any:
    """A clean graph break: which modules run is no part of a compiled graph."""
    return torch.compiler.disable(_eagerly)(module, cls, args, kwargs)  # type: ignore[no-untyped-call]


_outside_the_graph._torchdynamo_disable = True  # type: ignore[attr-defined]


def _eagerly(module: nn.Module, cls: type[nn.Module], args: Any, kwargs: Any) -> Any:
    return module.__dict__[ATTACHED].forward(module, cls, args, kwargs)


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
