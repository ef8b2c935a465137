"""Locks that a child of a fork finds open, whoever held them in the parent."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from types import TracebackType

__all__ = ["Lock"]


class Lock:
    """A lock that its thread may take again. What it guards must be of use to a child also when cut in two by a fork.

    >>> lock = Lock()
    >>> with lock, lock:
    ...     pass
    """

    __slots__ = ("__weakref__", "_inner")

    def __init__(self) -> None:
        self._inner = threading.RLock()
        _all.add(self)

    def __enter__(self) -> None:
        self._inner.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(RuntimeError):  # this thread forked in between, and this is the child
            self._inner.release()

    def renew(self) -> None:
        """Open it, in a child whose other threads are gone."""
        self._inner = threading.RLock()


_all: weakref.WeakSet[Lock] = weakref.WeakSet()


def _renew_all() -> None:
    for lock in list(_all):
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
