"""Where the random numbers of a process stand, and putting them back there."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .tensors import memory_of

__all__ = ["preserved_randomness", "random_state"]


def _numpy_random() -> Any:
    """`numpy.random`, if it was imported: else nothing was drawn from it, and its import takes a lock.

    A child of a fork would wait for ever for that lock, if another thread held it in the parent.
    """
    return sys.modules.get("numpy.random")


def random_state() -> tuple[object, ...]:
    """Where the random numbers of torch, its accelerators in use, numpy and Python stand; equal until one is drawn."""
    numpy_random = _numpy_random()
    _, words, *rest = ("", ()) if numpy_random is None else numpy_random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    states = (torch.get_rng_state(), *cuda)
    return random.getstate(), np.asarray(words).tobytes(), *rest, *(bytes(memory_of(state)) for state in states)


@contextlib.contextmanager
def preserved_randomness() -> Iterator[None]:
    """Leave the random state of torch, its accelerators in use, numpy and Python as it was."""
    numpy_random = _numpy_random()
    python, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = None if numpy_random is None else numpy_random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        random.setstate(python)
        if numpy_random is not None and numpy_state is not None:
            numpy_random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
