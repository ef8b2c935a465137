"""Locks that a child of a fork finds open, whoever held them in the parent."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

__all__ = ["lock_of"]

_owners: weakref.WeakSet[Any] = weakref.WeakSet()


def lock_of(owner: object) -> threading.RLock:
    """A lock for the ``_lock`` of an object or a Python module, which gets another one in each child of a fork.

    What it guards must be of use to a child also where the fork cut a change of it in two.

    >>> class Counter:
    ...     def __init__(self):
    ...         self._lock = lock_of(self)
    >>> with Counter()._lock:
    ...     pass
    """
    _owners.add(owner)
    return threading.RLock()


def _renew_all() -> None:
    for owner in list(_owners):
        owner._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
