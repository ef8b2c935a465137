"""Tell an error of the user's own code from one of this package: the first is theirs to see, the second is not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from .errors import ModcacheError

__all__ = ["is_meant", "noting"]

_MEANT = (ModcacheError, Warning, OSError, MemoryError, torch.OutOfMemoryError)
"""What this package raises on purpose, or what says nothing of it: misuse, warnings made errors, files, memory."""


class _Latest(threading.local):
    error: BaseException | None = None


_latest = _Latest()


def noting(function: Callable[..., Any]) -> Callable[..., Any]:
    """The user's function; what it raises passes through as it is, and is known for theirs afterwards."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            _latest.error = error
            raise

    return noted


def is_meant(error: Exception) -> bool:
    """Whether an error is to reach the user: it is theirs, or was raised on purpose."""
    theirs, _latest.error = error is _latest.error, None  # or it would be kept alive, with all that its frames hold
    return theirs or isinstance(error, _MEANT)
