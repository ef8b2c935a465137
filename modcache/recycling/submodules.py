"""The submodules of a model by name: whether they are called, and which are nearest to a name that is none."""

from __future__ import annotations

import difflib

import torch
from torch import nn

__all__ = ["is_never_called", "nearest_names"]


def is_never_called(module: nn.Module) -> bool:
    """Whether a module only holds others, as a plain list or mapping of modules does: it has no forward."""
    if isinstance(module, torch.jit.ScriptModule):  # of which asking for the class's forward fails
        return False
    return type(module).forward is nn.Module.forward and "forward" not in vars(module)


def nearest_names(model: nn.Module, name: str) -> str:
    """What a message adds to a name that names nothing: the names that may have been meant, or nothing at all.

    >>> bert = nn.ModuleDict({"layer": nn.ModuleList([nn.ReLU(), nn.ReLU()])})
    >>> nearest_names(nn.ModuleDict({"bert": bert, "layers": nn.ReLU()}), "layer.1")
    '; the nearest names are bert.layer.1, layers, bert.layer.0'

    Args:
        model: it has no such submodule.
        name: as it was given. Names that end so come first: they lack only what stands before.
    """
    known = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    ends = [path for path in known if path.endswith(f".{name}")]
    near = list(dict.fromkeys([*ends, *difflib.get_close_matches(name, known, 3, 0.3)]))[:3]
    return f"; the nearest names are {', '.join(near)}" if near else ""
