"""Tell what a function of torch asks of a tensor (facts, its shape, its values, chance), and what goes on around it."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from .trees import located

__all__ = [
    "DEMANDS",
    "ESCAPES",
    "FACTS",
    "LIKE",
    "MOVES",
    "Around",
    "answer_of",
    "around_now",
    "chance_now",
    "chance_of",
    "name_of",
    "shows_values",
    "sizes_of_answer",
    "under",
]

FACTS: frozenset[Any] = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in (
        "shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_nested",
        "is_mkldnn", "is_xpu", "is_meta", "itemsize", "nbytes", "names", "is_leaf", "is_sparse_csr", "grad_fn",
        "requires_grad", "grad", "retains_grad",
    ) if hasattr(getattr(torch.Tensor, name, None), "__get__")]
    + [getattr(torch.Tensor, name) for name in (
        "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "element_size",
        "is_floating_point", "is_complex", "is_signed", "__len__", "storage_offset", "get_device", "is_inference",
        "is_conj", "is_neg", "is_same_size", "is_set_to", "is_shared", "is_pinned", "dim_order", "__hash__",
    ) if hasattr(torch.Tensor, name)]
    + [torch.is_floating_point, torch.is_complex, torch.numel, torch.is_conj, torch.is_neg, torch.is_inference,
       torch.is_signed]
)  # fmt: skip
"""What a ghost knows of itself."""

LIKE = frozenset(
    "zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty new_tensor "
    "new_empty_strided".split()
)
"""What asks a tensor for its shape and dtype only."""

DEMANDS = frozenset(
    "item tolist numpy __array__ __bool__ __float__ __int__ __index__ __complex__ nonzero data_ptr equal allclose "
    "is_nonzero unique unique_consecutive masked_select argwhere storage untyped_storage _typed_storage __contains__ "
    "__dlpack__ __reduce_ex__ __array_wrap__ __cuda_array_interface__".split()
)
"""What asks for values, in Python."""

_ANSWERS = frozenset(
    "__bool__ __int__ __float__ __complex__ __index__ item tolist is_nonzero equal allclose __contains__ __repr__ "
    "__format__".split()
)
"""What tells Python values."""

_CARRIES_AWAY = frozenset("numpy __array__ __dlpack__".split())
"""What carries values out of torch, where nobody sees what happens to them."""

ESCAPES = _CARRIES_AWAY.union("tolist data_ptr untyped_storage storage _typed_storage __repr__ __format__".split())
"""What carries values out of torch without an operation that shows it."""

_SIZES = frozenset(
    "nonzero argwhere masked_select unique unique_consecutive unique_dim _unique _unique2 bincount combinations "
    "to_sparse to_sparse_coo to_sparse_csr".split()
)
"""What gives a tensor whose shape tells values."""

_MASKS = frozenset([torch.bool, torch.uint8])
_numbers = itertools.count()

MOVES = frozenset(["to", "cpu", "cuda", "xpu", "type"])

_DRAWS = frozenset(
    "rand_like randn_like randint_like bernoulli bernoulli_ multinomial normal normal_ poisson uniform_ random_ "
    "exponential_ geometric_ log_normal_ cauchy_ gumbel_softmax rrelu rrelu_ fractional_max_pool2d "
    "fractional_max_pool3d".split()
)
"""What draws random numbers."""

_DROPS = frozenset(
    "dropout dropout_ dropout1d dropout2d dropout3d alpha_dropout alpha_dropout_ feature_dropout feature_dropout_ "
    "feature_alpha_dropout feature_alpha_dropout_ scaled_dot_product_attention multi_head_attention_forward".split()
)
"""What draws some unless it is told not to."""


def name_of(func: Callable[..., Any]) -> str:
    """A readable name of a function of torch."""
    name = getattr(func, "__name__", repr(func))
    if name in ("__get__", "__set__"):
        return str(getattr(getattr(func, "__self__", None), "__name__", name))
    return str(name)


def answer_of(name: str, result: Any) -> Any:
    """What Python gets to know of values by a call of torch; ``None`` if that is nothing."""
    if name in _ANSWERS:
        return result
    if name in _CARRIES_AWAY:
        return "time", next(_numbers)  # what happens to it there, nobody sees: every time is a new one
    return None


def sizes_of_answer(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Any:
    """The shapes of what a call of torch gives, if they tell values; else ``None``."""
    if name in _SIZES or (name in _BY_ARGUMENTS and _sizes_by_values(name, args, kwargs)):
        return [tuple(leaf.shape) for _, leaf in located(result)]
    if name in _BY_ARGUMENTS:
        return None
    given = (*args, *kwargs.values())
    if any(map(_is_count, given)) and _has_other_shape(given, result):
        return [tuple(result.shape)]
    return None


_BY_ARGUMENTS = frozenset(["__getitem__", "where", "one_hot", "repeat_interleave", "tensor_split"])


def _sizes_by_values(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    given = (*args, *kwargs.values())
    if name == "__getitem__":
        return any(map(_cuts, args[1] if isinstance(args[1], tuple | list) else args[1:]))
    if name == "where":
        return len(given) == 1
    if name == "one_hot":
        return bool(kwargs.get("num_classes", args[1] if len(args) > 1 else -1) == -1)
    return len(given) == 1 or any(isinstance(value, torch.Tensor) for value in given[1:])


def _cuts(step: Any) -> bool:
    """Whether a part of an index takes as many entries as values say."""
    if isinstance(step, slice):
        return any(isinstance(end, torch.Tensor) for end in (step.start, step.stop, step.step))
    return type(step) is torch.Tensor and step.dtype in _MASKS


def _is_count(value: Any) -> bool:
    """Whether it is a whole number in a tensor, or holds one, which may be taken for a size."""
    if type(value) is torch.Tensor:
        return value.dim() == 0 and not value.dtype.is_floating_point
    return type(value) in (tuple, list) and any(type(item) is torch.Tensor and _is_count(item) for item in value)


def _has_other_shape(given: tuple[Any, ...], result: Any) -> bool:
    if not isinstance(result, torch.Tensor):
        return False
    return all(result.shape != value.shape for value in given if isinstance(value, torch.Tensor))


@functools.cache
def _tags(func: Any) -> frozenset[torch.Tag]:
    return frozenset(func.tags)


def shows_values(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation tells Python values: by what it gives, or by the shape of that."""
    tags = _tags(func)
    if torch.Tag.data_dependent_output in tags or func._schema.name == "aten::is_nonzero":
        return True
    if torch.Tag.dynamic_output_shape not in tags:
        return False
    return func._schema.name != "aten::index" or any(index is not None and index.dtype in _MASKS for index in args[1])


class Around(NamedTuple):
    """What decides on the result of a function beside its arguments."""

    grad: bool
    device: str
    autocast: bool
    dtype: torch.dtype


def around_now(device: torch.device) -> Around:
    """Grad mode and autocast as they are."""
    kind = device.type
    return Around(torch.is_grad_enabled(), kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))


@contextlib.contextmanager
def under(around: Around) -> Iterator[None]:
    """Grad mode and autocast as they were."""
    if around == around_now(torch.device(around.device)):
        yield
        return
    with torch.set_grad_enabled(around.grad), torch.autocast(around.device, around.dtype, around.autocast):
        yield


def chance_now(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device
) -> torch.Tensor | None:
    """The state of the random numbers, if the function of this name draws any."""
    draws = name in _DRAWS or (name in _DROPS and not _told_not_to(name, args, kwargs))
    return chance_of(device) if draws else None


def chance_of(device: torch.device) -> torch.Tensor:
    """The state of the random numbers of a device."""
    if device.type == "cpu":
        return torch.get_rng_state()
    state: torch.Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


def _told_not_to(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    if name == "scaled_dot_product_attention":
        return not kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
    if name == "multi_head_attention_forward":
        return kwargs.get("training") is False
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else None))
    return training is False or kwargs.get("p", args[1] if len(args) > 1 else None) == 0
