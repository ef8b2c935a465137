"""Tell the user something once, at the line of theirs that caused it; other ranks write to the log."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

import torch

from .errors import CacheWarning

__all__ = ["log", "warn"]

log = logging.getLogger("modcache")
log.addHandler(logging.NullHandler())

_OURS = str(Path(__file__).parent) + os.sep
_TORCHS = str(Path(torch.__file__).parent) + os.sep
_NOT_THE_USERS = (_OURS, _TORCHS, "<frozen ", "<eval_with_key>")  # but <stdin> and <ipython-input-...> are
_PYTHONS = tuple(str(Path(found).parent) + os.sep for found in (os.__file__, sys.executable))
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")


def warn(message: str) -> None:
    """Issue a `CacheWarning` at the innermost line that is the user's; log it on ranks above 0."""
    if _rank() == "0":
        warnings.warn(message, CacheWarning, stacklevel=_user_level())
    else:
        log.warning(message)


def _user_level() -> int:
    """The stack level, as `warn` counts it, of the innermost frame of code that nobody installed.

    Where all code is installed (a program, a thread), it is that of the first frame outside of modcache and torch.
    """
    level, frame, outside = 1, sys._getframe(1), 0
    while True:
        name = frame.f_code.co_filename
        if not name.startswith(_NOT_THE_USERS):
            if not _is_installed(name):
                return level
            outside = outside or level
        if frame.f_back is None:
            return outside or level
        level += not _is_uncounted(name)
        frame = frame.f_back


def _is_installed(name: str) -> bool:
    """Whether a file is of an installed package or program, or of Python itself."""
    return any(part in name for part in _INSTALLED) or name.startswith(_PYTHONS)


def _is_uncounted(name: str) -> bool:
    """Whether `warn` passes over frames of this file by itself: those of the import machinery."""
    return "importlib" in name and "_bootstrap" in name


def _rank() -> str:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return str(torch.distributed.get_rank())
    return os.environ.get("RANK", "0")
