"""What waits to be done by the thread that writes: in order, and bounded in bytes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .catalogue import Entry
    from .reading import Reading
    from .segment import Segment

__all__ = ["Begin", "Drop", "Facts", "Put", "Queue", "Settle", "Sync", "Task", "Use", "closed_lock"]

_JOINED: Final = 8 << 20  # bytes of puts to one segment that are taken together
_ENOUGH: Final = 4 << 20  # bytes that are worth a turn: each takes the interpreter from whoever puts more
_LARGE: Final = 1 << 20  # bytes of a put that is worth a turn by itself: few of these come one after the other
_A_WHILE: Final = 0.005  # seconds that fewer bytes wait for more
_LATEST: Final = 30.0  # seconds that the note of a use waits


@dataclass(frozen=True, slots=True)
class Put:
    """Rows that have a place in a segment and wait to be written there.

    Args:
        reading: of their namespace.
        segment: that they have a place in.
        first: number of the first row.
        keys: of the rows, joined.
        matrix: their bytes.
        sums: their checksums, joined.
        stamp: when they were put.
        buffer: the memory that the matrix is in.
    """

    reading: Reading
    segment: Segment
    first: int
    keys: bytes
    matrix: npt.NDArray[np.uint8]
    sums: bytes
    stamp: int
    buffer: npt.NDArray[np.uint8]

    @property
    def size(self) -> int:
        """The bytes that count against the bound of the queue."""
        return self.matrix.nbytes + len(self.keys)


@dataclass(frozen=True, slots=True)
class Drop:
    """Keys whose rows shall not count any more, for anybody."""

    reading: Reading
    segment: Segment
    keys: bytes
    stamp: int


@dataclass(frozen=True, slots=True)
class Begin:
    """Rows are about to be put: what is needed for them can be made while they are copied."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is to be written into the manifest of a namespace."""

    folder: str
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Use:
    """A namespace was used.

    Args:
        namespace: its name.
        folder: that it lies in.
        entry: what the catalogue is to say of it.
    """

    namespace: str
    folder: str
    entry: Entry


@dataclass(frozen=True, slots=True)
class Settle:
    """Rows of a namespace that nobody asked for yet can go into its index."""

    reading: Reading


@dataclass(frozen=True, slots=True)
class Sync:
    """All that came before is to survive a power cut.

    Args:
        done: held until then, and given free by the thread that writes.
    """

    done: threading.Lock


Task = Begin | Put | Drop | Facts | Use | Settle | Sync


class Queue:
    """Tasks of any number of threads for one.

    Args:
        most: bytes of rows that may wait; one larger batch may wait alone.
    """

    def __init__(self, most: int) -> None:
        self.bytes = 0
        self.stopping = False
        self._most = most
        self._enough = min(_ENOUGH, most // 4)
        self._gathering = False
        # Re-entrant, because a finaliser may stop the thread in the middle of anything. Whoever puts rows takes the
        # bare lock: an interrupt within `Condition.__enter__` would leave it locked for good.
        self._lock = threading.RLock()
        self._state = threading.Condition(self._lock)
        self._gates: list[threading.Lock] = []  # of those who wait for room
        self._tasks: deque[Task] = deque()
        self._uses: deque[Use] = deque()  # nobody waits for these two, so they wait until there is nothing else to do
        self._settles: deque[Settle] = deque()
        self._alone = 0  # tasks that are taken one by one

    def wait_for_room(self, size: int, is_taken: Callable[[], bool]) -> None:
        """Waits until so many bytes may be queued, as long as somebody takes any."""
        while True:
            with self._lock:
                if not self.bytes or self.bytes + size <= self._most or not is_taken():
                    return
                gate = closed_lock()
                self._gates.append(gate)
            gate.acquire(timeout=1.0)

    def push(self, task: Task) -> bool:
        """Adds a task behind all others of its kind; False where nobody will do it any more."""
        with self._lock:
            if not self.stopping:
                if isinstance(task, Use):
                    self._uses.append(task)
                elif not isinstance(task, Settle):
                    self._tasks.append(task)
                    self.bytes += _size_of(task)
                elif task not in self._settles:
                    self._settles.append(task)
                if not self._gathering or not self._is_little():
                    self._state.notify_all()
            return not self.stopping

    def take(self, idle: Callable[[], None], patience: float) -> list[Task]:
        """The next task, or several puts to one segment; nothing when it was stopped and is empty.

        Args:
            idle: called when nothing came for a while.
            patience: how long that is, in seconds.
        """
        with self._lock:
            while not self._wait_for_some(patience):
                if self._uses:
                    return [self._uses.popleft()]
                if self.stopping:  # then nobody will ask for rows, either
                    return []
                if self._settles:
                    return [self._settles.popleft()]
                idle()
            if self._uses and time.time() - self._uses[0].entry.last_used > _LATEST:
                return [self._uses.popleft()]
            first = self._tasks.popleft()
            taken, size = [first], _size_of(first)
            if self._alone:
                self._alone -= 1
                return taken
            while isinstance(first, Put) and self._tasks and size < _JOINED:
                after = self._tasks[0]
                if not isinstance(after, Put) or after.segment is not first.segment:
                    break
                size += after.size
                taken.append(self._tasks.popleft())
            return taken

    def _wait_for_some(self, patience: float) -> bool:
        """Waits for a task, and a while longer where it is little; whether there is one. The lock is held."""
        if not self._tasks and not self.stopping:
            self._state.wait(_A_WHILE if self._uses or self._settles else patience)
        if self._tasks and self._is_little():
            self._gathering = True
            self._state.wait(_A_WHILE)
            self._gathering = False
        return bool(self._tasks)

    def _is_little(self) -> bool:
        """Whether nothing waits but a few rows, which nobody waits for."""
        if self.bytes >= self._enough or self.stopping or self._alone:
            return False
        return all(isinstance(task, Put) and task.size < _LARGE for task in self._tasks)

    def done(self, tasks: Sequence[Task]) -> None:
        """What was taken does not wait any more."""
        with self._lock:
            self.bytes -= sum(map(_size_of, tasks))
            gates, self._gates = self._gates, []
            for gate in gates:
                gate.release()

    def withdraw(self, segment: Segment | None = None) -> list[Put]:
        """Takes out all rows that wait for a segment, or with None all rows."""
        with self._lock:
            puts = [task for task in self._tasks if isinstance(task, Put)]
            puts = [put for put in puts if segment is None or put.segment is segment]
            gone = set(map(id, puts))
            self._tasks = deque([task for task in self._tasks if id(task) not in gone])
            self.done(puts)
            return puts

    def put_back(self, puts: Sequence[Put], *, alone: bool = False) -> None:
        """Puts rows in front of all others, where they are taken one by one if so asked."""
        with self._lock:
            self._tasks.extendleft(reversed(puts))
            self.bytes += sum(put.size for put in puts)
            self._alone = len(puts) if alone else self._alone

    def stop(self) -> None:
        """Takes in nothing more."""
        with self._lock:
            self.stopping = True
            self._state.notify_all()


def closed_lock() -> threading.Lock:
    """A lock that is held: who takes it waits until another thread gives it free, and an interrupt leaves no trace."""
    lock = threading.Lock()
    lock.acquire()
    return lock


def _size_of(task: Task) -> int:
    return task.size if isinstance(task, Put) else 0
