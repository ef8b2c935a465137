"""Find what synchronises the gradients of a model between processes."""

from __future__ import annotations

import gc

import torch
from torch import nn

__all__ = ["reducer_around"]


def reducer_around(model: nn.Module) -> str | None:
    """The class name of a wrapper (DistributedDataParallel) around a model or around what it is part of, if any."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    from torch.nn.parallel import DistributedDataParallel

    for found in gc.get_objects():
        if issubclass(type(found), DistributedDataParallel) and any(child is model for child in found.modules()):
            return type(found).__name__
    return None
