"""The part of the process's settings that changes what a forward computes."""

from __future__ import annotations

import functools

import torch

_NAMES = (
    "autocast (cpu)",
    "autocast dtype (cpu)",
    "autocast (cuda)",
    "autocast dtype (cuda)",
    "autocast (others)",
    "default dtype",
    "float32 products (cuda)",
    "float32 convolutions (cuda)",
    "float32 products (cpu)",
    "float32 convolutions (cpu)",
    "deterministic algorithms",
    "fast path of attention",
)

_autocast_on = torch.is_autocast_enabled
_autocast_dtype = torch.get_autocast_dtype
_default_dtype = torch.get_default_dtype
_deterministic = torch._C._get_deterministic_algorithms
_mha, _FLAG = vars(torch.backends.mha), "_is_fastpath_enabled"
# The flag behind `get_fastpath_enabled`, which asks first whether TorchScript is at work: that costs a hit 1 µs.
_fast_path = functools.partial(_mha.__getitem__, _FLAG) if _FLAG in _mha else torch.backends.mha.get_fastpath_enabled
_any_autocast = torch._C._is_any_autocast_enabled


# How exact float32 products are. Read below the public getters: those warn, or raise once the settings of
# before and after torch 2.9 are mixed.
_fp32 = getattr(torch._C, "_get_fp32_precision_getter", None)
_EXACT = {"none": "ieee"}  # never set, and set back, are the same
_BEFORE_2_9 = ("_get_float32_matmul_precision", "_get_cudnn_allow_tf32")


def _precision() -> tuple[object, ...]:
    if _fp32 is not None:
        cuda, cuda_conv = _fp32("cuda", "matmul"), _fp32("cuda", "conv")
        cpu, cpu_conv = _fp32("mkldnn", "matmul"), _fp32("mkldnn", "conv")
        exact = _EXACT.get
        return exact(cuda, cuda), exact(cuda_conv, cuda_conv), exact(cpu, cpu), exact(cpu_conv, cpu_conv)
    matmul, conv = (getattr(torch._C, name)() for name in _BEFORE_2_9)
    return matmul, conv, None, None


def context() -> tuple[object, ...]:
    """The settings that change results: autocast, default dtype, precision of float32, deterministic mode.

    Not the device and not the number of threads: those change the last bits only, and a cache may be shared
    between machines.
    """
    autocast = _autocast() if _any_autocast() else _NO_AUTOCAST
    facts = (*autocast, _default_dtype(), *_precision(), _deterministic())
    return facts if _fast_path() else (*facts, False)  # on unless somebody said otherwise; it fills padding with zeros


_OTHERS = ("mps", "xpu", "hpu", "mtia", "xla", "privateuseone")
_NO_AUTOCAST = (False, None, False, None, ())


def _autocast() -> tuple[object, ...]:
    on_cpu, on_cuda = _autocast_on("cpu"), _autocast_on("cuda")
    return (
        on_cpu,
        _autocast_dtype("cpu") if on_cpu else None,
        on_cuda,
        _autocast_dtype("cuda") if on_cuda else None,
        tuple((kind, _autocast_dtype(kind)) for kind in _OTHERS if _autocast_on(kind)),
    )


def context_facts(ctx: tuple[object, ...]) -> dict[str, object]:
    """A context with a readable name for each setting.

    >>> context_facts(context())["deterministic algorithms"]
    False
    """
    return dict(zip(_NAMES, ctx, strict=False))
