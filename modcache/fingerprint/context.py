"""The part of the process's settings that changes what a forward computes."""

from __future__ import annotations

import torch

_NAMES = (
    "autocast (cpu)",
    "autocast dtype (cpu)",
    "autocast (cuda)",
    "autocast dtype (cuda)",
    "default dtype",
    "float32 products (cuda)",
    "float32 convolutions (cuda)",
    "float32 products (cpu)",
    "float32 convolutions (cpu)",
    "deterministic algorithms",
)

_autocast_on = torch.is_autocast_enabled
_autocast_dtype = torch.get_autocast_dtype
_default_dtype = torch.get_default_dtype
_deterministic = torch.are_deterministic_algorithms_enabled


# How exact float32 products are. Read below the public getters: those warn, or raise once the settings of
# before and after torch 2.9 are mixed.
_fp32 = getattr(torch._C, "_get_fp32_precision_getter", None)
_PRODUCTS = (("cuda", "matmul"), ("cuda", "conv"), ("mkldnn", "matmul"), ("mkldnn", "conv"))
_EXACT = {"none": "ieee"}  # never set, and set back, are the same
_BEFORE_2_9 = ("_get_float32_matmul_precision", "_get_cudnn_allow_tf32")


def _precision() -> tuple[object, ...]:
    if _fp32 is not None:
        return tuple([_EXACT.get(said := _fp32(backend, kind), said) for backend, kind in _PRODUCTS])
    matmul, conv = (getattr(torch._C, name)() for name in _BEFORE_2_9)
    return matmul, conv, None, None


def context() -> tuple[object, ...]:
    """The settings that change results: autocast, default dtype, precision of float32, deterministic mode.

    Not the device and not the number of threads: those change the last bits only, and a cache may be shared
    between machines.
    """
    on_cpu, on_cuda = _autocast_on("cpu"), _autocast_on("cuda")
    return (
        on_cpu,
        _autocast_dtype("cpu") if on_cpu else None,
        on_cuda,
        _autocast_dtype("cuda") if on_cuda else None,
        _default_dtype(),
        *_precision(),
        _deterministic(),
    )


def context_facts(ctx: tuple[object, ...]) -> dict[str, object]:
    """A context with a readable name for each setting.

    >>> context_facts(context())["deterministic algorithms"]
    False
    """
    return dict(zip(_NAMES, ctx, strict=True))
