"""What the hazard tests share: tiny models, and the comparison of a cached module with the plain one."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping

import torch
from torch import nn

from modcache import CacheWarning, cache_of, cached_module


class Encoder(nn.Module):
    """Two layers with a norm between them; rows do not depend on each other."""

    def __init__(self, width: int = 4, out: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(width, 8)
        self.norm = nn.LayerNorm(8)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(8, out)
        self.register_buffer("shift", torch.zeros(out))
        self.scale = 1.0

    def forward(self, x, bias=None):
        out = self.last(self.drop(self.norm(torch.tanh(self.first(x))))) * self.scale + self.shift
        return out if bias is None else out + bias


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False).eval()


def pair(module: nn.Module | None = None, **options):
    """A cached module, and a plain copy of it as the oracle."""
    module = frozen(Encoder() if module is None else module)
    plain = copy.deepcopy(module)
    return cached_module(module, **options), plain


def assert_same(found: object, expected: object, tolerance: float = 1e-4) -> None:
    """The same structure, classes, dtypes, shapes and (up to rounding) values."""
    assert type(found) is type(expected), (type(found), type(expected))
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert found.device == expected.device
        if expected.dtype.itemsize == 1 and expected.is_floating_point():
            found, expected = found.float(), expected.float()
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    elif isinstance(expected, Mapping):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key], tolerance)
    elif isinstance(expected, tuple | list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, tolerance)
    elif dataclasses.is_dataclass(expected):
        assert_same(vars(found), vars(expected), tolerance)
    else:
        assert found == expected


def agree(cached: nn.Module, plain: nn.Module, *args, times: int = 2, tolerance: float = 1e-4, **kwargs) -> None:
    """The cached module answers as the plain one, when it computes and when it serves."""
    for _ in range(times):
        expected = plain(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        assert_same(cached(*args, **kwargs), expected, tolerance)


def computed(module: nn.Module) -> int:
    return cache_of(module).stats.computed


def bypassed(module: nn.Module) -> int:
    return cache_of(module).stats.bypassed


def hits(module: nn.Module) -> int:
    return cache_of(module).stats.hits


class Quiet(warnings.catch_warnings):
    """Lets cache warnings pass unseen where a test is about something else."""

    def __enter__(self):
        seen = super().__enter__()
        warnings.simplefilter("ignore", CacheWarning)
        return seen
