"""What is still written when a process ends, and what a forked child leaves to its parent."""

from __future__ import annotations

import atexit
import multiprocessing.util
import os
from typing import Protocol

__all__ = ["abandon_all", "close_all", "forget", "note"]


class Work(Protocol):
    """Something that is done behind the loop, and has an end."""

    def close(self) -> None:
        """Does what waits, and ends."""

    def tell(self) -> None:
        """Warns of what went wrong and nobody heard of."""

    def abandon(self) -> None:
        """In a forked child: leaves all of it to the parent."""


_running: set[Work] = set()
_finalized: int | None = None  # the process whose end by way of multiprocessing is seen to


def note(work: Work) -> None:
    """From now on this is ended with the process."""
    global _finalized
    _running.add(work)
    if _finalized != os.getpid():
        # A child of multiprocessing ends without what atexit was told, and forgets what its parent registered.
        multiprocessing.util.Finalize(None, close_all, exitpriority=100)
        _finalized = os.getpid()


def forget(work: Work) -> None:
    """This came to an end by itself."""
    _running.discard(work)


def close_all() -> None:
    """Does what waits, in all stores of the process; nobody else could say any more what went wrong."""
    works = list(_running)
    for work in works:
        work.close()
    for work in works:
        work.tell()


def abandon_all() -> None:  # pragma: no cover - in a forked child, where coverage does not look
    """In a forked child: nothing of what the parent has running is here."""
    for work in list(_running):
        work.abandon()
    _running.clear()


atexit.register(close_all)
