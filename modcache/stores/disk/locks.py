"""Lock files for as long as they are open, where the system has such locks."""

from __future__ import annotations

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["is_locked", "locked"]


def locked(file: int, *, wait: bool) -> bool:
    """Locks a descriptor against all others, until it is closed; whether it is locked now.

    Raises:
        OSError: the file system has no locks, and it was to be waited for one.
    """
    if fcntl is None:
        return wait
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        if wait:
            raise
        return False
    return True


def is_locked(file: int) -> bool:
    """Whether somebody else holds the lock of a file; where there are no locks, somebody might."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return False
