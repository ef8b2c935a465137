"""The stores of one process: the same one for all who ask for a directory, and begun anew in a forked child."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .ending import abandon_all

if TYPE_CHECKING:
    from .store import DiskStore

__all__ = ["note", "shared"]

_stores: weakref.WeakSet[DiskStore] = weakref.WeakSet()
_shared: weakref.WeakValueDictionary[Path, DiskStore] = weakref.WeakValueDictionary()
_opening = threading.RLock()


def note(store: DiskStore) -> None:
    """From now on a forked child begins anew with this store."""
    _stores.add(store)


def shared(path: str | os.PathLike[str], make: Callable[[], DiskStore]) -> DiskStore:
    """The open store of a directory that somebody in this process holds, else a new one, which others will get."""
    with _opening:
        place = Path(os.path.realpath(path))
        store = _shared.get(place)
        if store is None or store.closed:
            store = _shared[place] = make()
        return store


def _after_fork_in_child() -> None:  # pragma: no cover - in a forked child, where coverage does not look
    global _opening
    _opening = threading.RLock()
    abandon_all()
    for store in list(_stores):
        store.begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
