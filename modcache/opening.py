"""From the option ``store=`` to a store: one of its own in memory, memory in front of a directory, or the user's."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import FormatVersionError, UsageError, UsageTypeError
from .stores import MemoryStore, Store, TieredStore

__all__ = ["asked_store", "open_store"]


def asked_store(store: object) -> Store | str | None:
    """The option, checked; a path is made absolute at once, so that a later ``chdir`` moves nothing; ``~`` is the home.

    Raises:
        UsageError, UsageTypeError: it cannot be a store, or is the path of a file.
    """
    if store is None:
        return None
    if isinstance(store, str | bytes | os.PathLike):
        path = os.path.abspath(os.path.expanduser(os.fsdecode(store))) if store else ""
        if not path:
            raise UsageError("store is the path of a cache directory; found an empty one")
        if "\0" in path:
            raise UsageError(f"store is the path of a cache directory; found a null character in {path!r}")
        if os.path.lexists(path) and not os.path.isdir(path):
            raise UsageError(f"store is the path of a cache directory; found a file at {path}")
        return path
    if isinstance(store, type) or not isinstance(store, Store):
        raise UsageTypeError(
            f"store must be None, the path of a directory, or a store such as MemoryStore(...); found {store!r}"
        )
    return store


def open_store(asked: Store | str | None) -> tuple[Store, str | None]:
    """The store that was asked for, and what to warn about where only its memory could be had."""
    if asked is None:
        return MemoryStore(), None
    if not isinstance(asked, str):
        return asked, None
    from .stores.disk import open_directory

    try:
        return TieredStore(MemoryStore(), open_directory(Path(asked))), None
    except (OSError, FormatVersionError) as error:
        return MemoryStore(), f"its rows are kept in memory alone, because the cache directory cannot be used: {error}"
