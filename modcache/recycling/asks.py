"""Tell what a function of torch asks of a tensor (facts, its shape, its values, chance), and what goes on around it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

__all__ = ["DEMANDS", "FACTS", "LIKE", "MOVES", "Around", "around_now", "chance_now", "chance_of", "name_of", "under"]

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
