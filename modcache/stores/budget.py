"""How many bytes memory stores may hold, and the lock that guards them together."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final, Protocol

import torch

__all__ = ["Budget", "Holder", "cgroup_limit", "memory_here", "processes_here", "shared_budget"]

SHARE: Final = 4  # the default stores may hold a quarter of the memory that the process may use
_NO_ANSWER: Final = 4 << 30  # assumed where the system does not say how much memory it has

ReadText = Callable[[str], "str | None"]


class Holder(Protocol):
    """What a budget asks of the stores in it; called with the budget's lock held."""

    def held_bytes(self) -> int:
        """The bytes that count against the bound."""

    def retired_since(self) -> int | None:
        """When the oldest of its retired namespaces was retired, or None without any."""

    def drop_retired(self, wanted: int) -> None:
        """Drops rows of the oldest retired namespace until so many bytes are free or it is empty."""


class Budget:
    """A bound in bytes, the stores that keep it together, and their one lock.

    A store that was garbage-collected counts no more; nobody has to say so.

    Args:
        max_bytes: the bound.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        # Re-entrant, because a signal handler or a finaliser may use a store in the middle of a call.
        self.lock = threading.RLock()
        self.busy = False  # in the middle of a change
        self._holders: weakref.WeakSet[Holder] = weakref.WeakSet()
        with _forking:
            _budgets.append(weakref.ref(self, _forget))

    def join(self, holder: Holder) -> None:
        """Counts a store from now on."""
        with self.lock:
            self._holders.add(holder)

    def free_bytes(self) -> int:
        """What is left of the bound; less than nothing when it was overdrawn."""
        return self.max_bytes - sum(holder.held_bytes() for holder in self._holders)

    def make_room(self, wanted: int) -> int:
        """Drops retired rows, the longest retired first, until so many bytes are free; what is free then."""
        free = self.free_bytes()
        while free < wanted:
            retired = [(since, holder) for holder in self._holders if (since := holder.retired_since()) is not None]
            if not retired:
                break
            min(retired, key=lambda pair: pair[0])[1].drop_retired(wanted - free)
            free = self.free_bytes()
        return free


def cgroup_limit(read: ReadText) -> int | None:
    """The tightest memory limit among the control groups of this process, or None without one.

    Every group up to the root counts. Inside a container the named path is often not there, and the limit
    stands at the root of what is mounted; so missing files are passed over.

    Args:
        read: gives the text of a file, None where there is none.

    >>> files = {"/proc/self/cgroup": "0::/a/b", "/sys/fs/cgroup/a/memory.max": "1024"}
    >>> cgroup_limit(files.get)
    1024
    """
    limits = []
    for line in (read("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        mounts: tuple[str, ...]
        if controllers == "":
            mounts, name = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"), "memory.max"
        elif "memory" in controllers.split(","):
            mounts, name = ("/sys/fs/cgroup/memory",), "memory.limit_in_bytes"
        else:
            continue
        texts = (read(f"{mount}{group}/{name}") for mount in mounts for group in _upwards(path))
        limits += [int(text) for text in texts if text is not None and text.strip().isdigit()]
    return min(limits, default=None)


def processes_here(environ: Mapping[str, str]) -> int:
    """How many processes of this job share the machine, as torchrun tells them.

    >>> processes_here({"LOCAL_WORLD_SIZE": "8"})
    8
    """
    text = environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(text)) if text.isdigit() else 1


def usable_memory(read: ReadText, physical: int | None) -> int:
    """The bytes of memory that this process may use: its control groups' limit, else all there is."""
    known = [limit for limit in (cgroup_limit(read), physical) if limit is not None]
    return min(known, default=_NO_ANSWER)


def memory_here() -> int:
    """The bytes of memory that this process may use."""
    return usable_memory(_read_text, _physical_memory())


def shared_budget(device: torch.device) -> Budget:
    """The one budget of all stores on a device that were given no bound of their own."""
    kind = device if device.type == "cuda" else torch.device("cpu")
    with _forking:
        if kind not in _shared:
            _shared[kind] = Budget(_memory_of(kind) // SHARE // processes_here(os.environ))
        return _shared[kind]


def _memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return memory_here()


def _physical_memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _read_text(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError):
        return None


def _upwards(path: str) -> Iterable[str]:
    while path.strip("/"):
        yield path.rstrip("/")
        path = path.rpartition("/")[0]
    yield ""


# A fork copies a lock that another thread holds, and nobody would ever release the copy. So a fork waits
# until no store is in the middle of something, in one order for all threads, and the child starts afresh.
_forking = threading.RLock()
_budgets: list[weakref.ref[Budget]] = []
_shared: dict[torch.device, Budget] = {}
_stopped: list[Budget] = []


def _forget(dead: weakref.ref[Budget]) -> None:
    _budgets.remove(dead)


def _before_fork() -> None:
    _forking.acquire()
    for budget in [budget for ref in list(_budgets) if (budget := ref()) is not None]:
        budget.lock.acquire()
        _stopped.append(budget)


def _after_fork_in_parent() -> None:
    while _stopped:
        _stopped.pop().lock.release()
    _forking.release()


def _after_fork_in_child() -> None:
    global _forking
    while _stopped:
        _stopped.pop().lock = threading.RLock()
    _forking = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
