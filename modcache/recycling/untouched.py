"""Run a model and leave no trace on it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from ..chance import preserved_randomness
from .stashes import buffers_of

__all__ = ["seed", "untouched"]


@contextlib.contextmanager
def untouched(model: nn.Module, written: set[tuple[int, str]]) -> Iterator[None]:
    """Run things with the model in eval mode, and leave attributes, buffers, modes and randomness as they were.

    The attributes that were set meanwhile, by ``id`` of the module, are added to ``written``.
    """
    modules = list(model.modules())
    before = [dict(vars(module)) for module in modules]
    buffers = [
        (module, name, value, None if value is None else value.detach().clone())
        for module in modules
        for name, value in buffers_of(module).items()
    ]
    with preserved_randomness():
        try:
            for module in modules:
                vars(module)["training"] = False
            yield
        finally:
            for module, was in zip(modules, before, strict=True):
                written.update((id(module), name) for name in _put_back(module, was))
            with torch.no_grad():
                for module, name, value, content in buffers:
                    buffers_of(module)[name] = value
                    if value is not None and content is not None and not _same(value, content):
                        value.copy_(content)


def _put_back(module: nn.Module, was: dict[str, Any]) -> set[str]:
    """Put attributes back; the names of those that had been set."""
    now = vars(module)
    names = {name for name in {*now, *was} if name not in _INNER and now.get(name, was) is not was.get(name, now)}
    kept = {name for name in names if name.startswith("_output_capturing")}  # transformers' hooks stay installed
    for name in names - was.keys() - kept:
        del now[name]
    now.update({name: value for name, value in was.items() if name not in kept})
    return names


_INNER = frozenset(vars(nn.Module())) | {"_modcache"}


def seed(number: int) -> None:
    """Begin other random numbers; the caller has preserved the user's."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


_SPARSE = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}
"""What says a sparse tensor; torch.equal knows none of these layouts."""


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.layout is not other.layout or one.shape != other.shape:
        return False
    if parts := _SPARSE.get(one.layout):
        return all(_same(getattr(one, part)(), getattr(other, part)()) for part in parts)
    return torch.equal(one, other) or torch.equal(one.nan_to_num(), other.nan_to_num())
