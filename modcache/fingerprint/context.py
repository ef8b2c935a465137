"""The part of the process's settings that changes what a forward computes."""

from __future__ import annotations

import torch

_NAMES = (
    "autocast (cpu)",
    "autocast dtype (cpu)",
    "autocast (cuda)",
    "autocast dtype (cuda)",
    "default dtype",
    "float32 matmul precision",
    "TF32 in cuBLAS",
    "TF32 in cuDNN",
    "deterministic algorithms",
)

_autocast_on = torch.is_autocast_enabled
_autocast_dtype = torch.get_autocast_dtype
_default_dtype = torch.get_default_dtype
_deterministic = torch.are_deterministic_algorithms_enabled


def _setting(name: str) -> object:
    getter = getattr(torch._C, name, None)
    return getter() if getter is not None else None


def _precision() -> tuple[object, object, object]:
    """How exact float32 products are.

    Read from torch's own getters below the public ones: those warn, or raise once old and new settings are mixed.
    """
    try:
        return _fp32("generic", "all"), _fp32("cuda", "matmul"), _fp32("cudnn", "conv")
    except RuntimeError:
        return "unknown", None, None


if hasattr(torch._C, "_get_fp32_precision_getter"):
    _fp32 = torch._C._get_fp32_precision_getter
else:  # torch < 2.9

    def _fp32(backend: str, operation: str) -> object:
        names = {"generic": "_get_float32_matmul_precision", "cuda": "_get_cublas_allow_tf32"}
        return _setting(names.get(backend, "_get_cudnn_allow_tf32"))


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
