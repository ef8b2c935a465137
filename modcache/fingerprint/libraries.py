"""What objects of the standard library, numpy and torch are, where their class alone does not say it."""

from __future__ import annotations

import array
import collections
import functools
import operator
import re
import types
from typing import Any

import numpy as np
import torch

from ..digest import encode

__all__ = ["said_of", "shows_its_fields"]

_GETTERS = (operator.itemgetter, operator.attrgetter, operator.methodcaller)
_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
_OF_FIELDS = (
    collections.UserList,
    collections.UserString,
    np.poly1d,
    np.vectorize,
    torch.distributions.Distribution,
    torch.distributions.Transform,
)
_COMMENT = re.compile(r"\s*#.*")


def shows_its_fields(value: object) -> bool:
    """Whether an object of a library is what its attributes say, like one of the user's own classes."""
    return isinstance(value, _OF_FIELDS)


def said_of(value: object) -> object | None:
    """What says all of an object of a library, as values that can be read; ``None`` where nothing is known to."""
    if isinstance(value, _GETTERS):
        reduced: Any = value.__reduce__()
        made_by, given = reduced[:2]
        return (given, made_by.args, made_by.keywords) if isinstance(made_by, functools.partial) else given
    if isinstance(value, types.MethodWrapperType):
        return value.__name__, value.__self__
    if isinstance(value, np.ufunc):
        name: str = value.__name__
        return name if getattr(np, name, None) is value else None
    if isinstance(value, np.dtype):
        return str(value.descr)
    if isinstance(value, _OPERATORS):
        return str(value)
    if isinstance(value, torch.jit.ScriptFunction):
        return value.code, _COMMENT.sub("", str(value.inlined_graph))  # its comments are places in files
    if isinstance(value, array.array):
        return value.typecode, value.tobytes()
    if isinstance(value, memoryview):
        return value.format, value.shape, value.tobytes()
    if isinstance(value, torch.ScriptObject):
        return _state_of(value)
    return None


def _state_of(value: torch.ScriptObject) -> object | None:
    """The content of an object of compiled code, like the packed weights of a quantized layer."""
    try:
        return encode(_unpacked(value))
    except Exception:  # its class gives no state, or one without content
        return None


def _unpacked(state: object) -> object:
    if isinstance(state, torch.ScriptObject):
        return _unpacked(state.__getstate__())  # type: ignore[attr-defined]
    if isinstance(state, tuple | list):
        return tuple(map(_unpacked, state))
    if isinstance(state, torch.Tensor) and state.is_quantized:
        return _quantized(state)
    return state


def _quantized(tensor: torch.Tensor) -> object:
    scheme = tensor.qscheme()
    values = tensor.dtype, str(scheme), tensor.int_repr()
    if scheme in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return *values, tensor.q_scale(), tensor.q_zero_point()
    return *values, tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points(), tensor.q_per_channel_axis()
