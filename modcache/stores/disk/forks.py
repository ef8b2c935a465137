"""Let no fork happen in the middle of what a child could never use again."""

from __future__ import annotations

import os
import threading
from types import TracebackType
from typing import Final

__all__ = ["undisturbed"]

_PATIENCE: Final = 2.0  # seconds that a fork waits; the work takes thousandths, but for the first import


class _Undisturbed:
    """A block in which no other thread forks.

    SQLite and the import system have locks of their own, which a child of a fork finds locked for good if another
    thread held them at that moment.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._held = False

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def before_fork(self) -> None:
        """Waits until no block is entered."""
        self._held = self._lock.acquire(timeout=_PATIENCE)

    def after_fork_in_parent(self) -> None:
        """Blocks may be entered again."""
        if self._held:
            self._lock.release()

    def after_fork_in_child(self) -> None:
        """Nobody is in a block."""
        self._lock = threading.RLock()


undisturbed: Final = _Undisturbed()
"""`with undisturbed:` around what must not be cut in two by a fork."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=undisturbed.before_fork,
        after_in_parent=undisturbed.after_fork_in_parent,
        after_in_child=undisturbed.after_fork_in_child,
    )
