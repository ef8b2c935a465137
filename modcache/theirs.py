"""Tell an error of the user's own code from one of this package: the first is theirs to see, the second is not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from .errors import ModcacheError

__all__ = ["is_meant", "note", "noting"]

_MEANT = (ModcacheError, Warning)
"""What this package raises on purpose: misuse, and warnings that are made errors."""


class _Latest(threading.local):
    error: BaseException | None = None


_latest = _Latest()


def noting(function: Callable[..., Any]) -> Callable[..., Any]:
    """The user's function; what it raises passes through as it is, and is known for theirs afterwards."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            note(error)
            raise

    return noted


def note(error: Exception) -> None:
    """This error is the user's: it comes of their code, or of a file of theirs."""
    _latest.error = error


def is_meant(error: Exception) -> bool:
    """Whether an error is to reach the user: it is theirs, or was raised on purpose."""
    theirs, _latest.error = error is _latest.error, None  # or it would be kept alive, with all that its frames hold
    return theirs or isinstance(error, _MEANT)
