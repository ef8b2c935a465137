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


def warn(message: str) -> None:
    """Issue a `CacheWarning` at the innermost line that is neither ours nor torch's; log it on ranks above 0."""
    if _rank() == "0":
        warnings.warn(message, CacheWarning, stacklevel=_user_level())
    else:
        log.warning(message)


def _user_level() -> int:
    """The stack level, as `warn` counts it, of the first frame outside of modcache and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        level += not _is_uncounted(frame.f_code.co_filename)
        frame = frame.f_back
    return level


def _is_uncounted(name: str) -> bool:
    """Whether `warn` passes over frames of this file by itself: those of the import machinery."""
    return "importlib" in name and "_bootstrap" in name


def _rank() -> str:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return str(torch.distributed.get_rank())
    return os.environ.get("RANK", "0")
