"""The thread that writes behind the loop: what was put goes into segments, whatever comes in its way."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
import time
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from ..index import KEY_BYTES, Places
from . import ending
from .admission import Admission
from .appending import GoneError
from .beside import Beside
from .catalogue import Catalogue
from .counting import count_rows
from .directory import Directory
from .forks import undisturbed
from .names import CATALOGUE, SegmentName, new_writer
from .reading import Reading
from .records import Buffers
from .room import IN_USE
from .tasks import Begin, Drop, Facts, Put, Queue, Settle, Sync, Task, Use, closed_lock
from .troubles import tell
from .writers import Writers

if TYPE_CHECKING:
    from .segment import Segment

__all__ = ["Writing"]

_PAUSE: Final = 60.0  # seconds after which a directory that refused is tried again
_IDLE: Final = 1.0  # seconds after which what is reserved is given back
_FRAME_BYTES: Final = 64
_KEY_AND_SUM: Final = 24


class Writing:
    """The queue of a store and its thread, which starts when there is something to do.

    Args:
        directory: that is written to.
        lock: of the store; held when rows get a place and when they are committed, never while waiting.
        max_bytes: the bound of the directory, or None.
        keep_free: the bytes of its file system that stay free, or None for the usual floor.
        queue_bytes: rows that may wait; one larger batch may wait alone.
        told: kinds of troubles that the user heard of.
    """

    def __init__(
        self,
        directory: Directory,
        lock: threading.RLock,
        *,
        max_bytes: int | None,
        keep_free: int | None,
        queue_bytes: int,
        told: set[str],
    ) -> None:
        self.troubles: list[tuple[str, str]] = []  # kind and text of what a user should hear of
        self.refused = self.evicted = 0
        self._told = told
        self._buffers = Buffers()
        self._directory, self._lock = directory, lock
        self._queue = Queue(queue_bytes)
        catalogue = Catalogue(directory.path / CATALOGUE, writable=True)
        self._admission = Admission(directory, max_bytes, keep_free, catalogue, self._note_dropped)
        self._beside = Beside(directory, catalogue, lambda size, kind: self._admission.fits(size, self._name, kind))
        self._name = new_writer()
        self._numbers = itertools.count()
        self._sign: int | None = None
        self._writers = Writers(directory)
        self._uses: dict[str, float] = {}  # folders, and when this process used them
        self._paused_until = 0.0
        self._thread: threading.Thread | None = None

    # --- asked by the store ---------------------------------------------------------------------------

    @property
    def paused(self) -> bool:
        """Whether the directory refused lately, so that nothing is written for a while."""
        return time.monotonic() < self._paused_until

    @property
    def queued(self) -> int:
        """The bytes that wait to be written."""
        return self._queue.bytes

    def try_again(self) -> None:
        """What kept rows from being written may be over."""
        self._paused_until = 0.0
        self._admission.ask_again()

    def retire(self, folder: str) -> None:
        """This process does not need a namespace any more."""
        self._uses.pop(folder, None)

    def next_name(self) -> SegmentName:
        """A name for a new segment; the lock is held."""
        return SegmentName(self._name, next(self._numbers))

    def memory_for(self, size: int) -> npt.NDArray[np.uint8]:
        """Memory for rows, after a wait until so many bytes may be queued; the lock is not held."""
        with self._lock:
            if not self._is_running():
                self.push(Begin())
        self._queue.wait_for_room(size, self._is_running)
        return self._buffers.take(size)

    def push(self, task: Task) -> None:
        """Queues a task, behind all others; the lock is held."""
        if self._queue.push(task) and not self._is_running():
            self._thread = threading.Thread(target=self._run, name="modcache-disk", daemon=True)
            ending.note(self)
            self._thread.start()

    def flush(self) -> None:
        """Waits until all that was queued is written, and would survive a power cut."""
        if self._thread is None:
            return
        sync = Sync(closed_lock())
        if not self._queue.push(sync):
            return
        while not sync.done.acquire(timeout=0.2) and self._is_running():
            continue

    def stop(self) -> None:
        """Lets the thread end when the queue is empty."""
        self._queue.stop()

    def close(self) -> None:
        """Writes what is queued, and ends."""
        self.flush()
        self.stop()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def tell(self) -> None:
        """Warns of what went wrong since a store asked last."""
        tell(self.troubles, self._told)

    def abandon(self) -> None:  # pragma: no cover - in a forked child, where coverage does not look
        """In a forked child: what the parent queued and opened is the parent's alone."""
        self._writers.close()
        if self._sign is not None:
            with contextlib.suppress(OSError):
                os.close(self._sign)

    # --- the thread -----------------------------------------------------------------------------------

    def _is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _run(self) -> None:
        while tasks := self._queue.take(self._rest, _IDLE):
            try:
                self._do(tasks)
            except Exception as error:
                self._abort("writing fails", f"{type(error).__name__}: {error}", tasks)
            self._queue.done(tasks)
            del tasks
        self._writers.close()
        if self._sign is not None:
            self._directory.sign_out(self._name, self._sign)
            self._sign = None
        ending.forget(self)

    def _rest(self) -> None:
        self._buffers.clear()
        if self._sign is not None:
            self._admission.release(self._sign)

    def _do(self, tasks: list[Task]) -> None:
        match tasks[0]:
            case Put():
                self._write([task for task in tasks if isinstance(task, Put)])
            case Drop() as drop:
                self._drop(drop)
            case Facts() as task:
                self._ready()
                self._beside.describe(task)
            case Begin():
                with contextlib.suppress(OSError):  # it is tried again when there are rows
                    self._ready()
            case Use() as use:
                self._note_use(use)
            case Settle() as settle:
                with self._lock:
                    settle.reading.settle()
            case Sync() as sync:
                try:
                    self._sync()
                finally:
                    sync.done.release()

    def _drop(self, drop: Drop) -> None:
        segment, reading = drop.segment, drop.reading
        if segment.closed:
            return
        self._ready()
        try:
            self._writers.of(reading, segment).drop(drop.keys, drop.stamp)
        except GoneError:
            # Somebody removed the segment, but others may have rows of these keys all the same.
            self._move(reading, segment, [])
            with self._lock:
                self.push(Drop(reading, reading.open_segment(None, 0, self.next_name), drop.keys, drop.stamp))

    def _write(self, puts: list[Put]) -> None:
        segment, reading = puts[0].segment, puts[0].reading
        if segment.closed:
            return
        self._ready()
        writer = self._writers.of(reading, segment)
        count = sum(len(put.matrix) for put in puts)
        if not _follow(puts, writer.rows):  # an interrupt came while rows got their place
            with self._lock:
                reading.give_up(segment)
            return
        size = sum(put.matrix.nbytes for put in puts) + count * _KEY_AND_SUM + _FRAME_BYTES + writer.head_bytes
        reason = self._refusal(size, segment.folder)
        if reason is not None:
            self._refuse(reading, segment, puts, reason)
            return
        first, stamp = puts[0].first, puts[-1].stamp
        keys, sums = b"".join([put.keys for put in puts]), b"".join([put.sums for put in puts])
        try:
            writer.append([put.matrix for put in puts], keys, sums, stamp)
        except GoneError:
            self._move(reading, segment, puts)
            return
        with self._lock:
            committed = not segment.closed
            if committed:
                reading.committed(segment, first, stamp, sums)
                self._queue.push(Settle(reading))
                for put in puts:
                    self._buffers.give(put.buffer)
        if committed:
            self._beside.describe_late(segment.folder)
            return
        # The namespace was deleted meanwhile; its files were unlinked, these perhaps were not there yet.
        self._directory.remove_segment(segment.folder, segment.name)

    def _refuse(self, reading: Reading, segment: Segment, puts: list[Put], reason: str) -> None:
        """There is no room for these rows; smaller ones may still find some."""
        if len(puts) > 1:
            self._queue.put_back(puts, alone=True)
            return
        with self._lock:
            left = self._vacate(reading, segment, puts)
            smaller = [(put, places) for put, places in left if put.size < puts[0].size]
            self.refused += sum(len(places) for put, places in left if put.size >= puts[0].size)
            self._queue.put_back(self._placed_anew(reading, segment, smaller))
            text = f"no more rows are written to the cache directory {str(self._directory.path)!r}: {reason}"
            self.troubles.append(("no room", text))

    def _move(self, reading: Reading, segment: Segment, puts: list[Put]) -> None:
        """Somebody dropped the segment: what waits for it goes into another one."""
        if not self._directory.path.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the directory has vanished")
        with self._lock:
            self._queue.put_back(self._placed_anew(reading, segment, self._vacate(reading, segment, puts)))
            self._sign_again()

    def _vacate(self, reading: Reading, segment: Segment, puts: list[Put]) -> list[tuple[Put, Places]]:
        """Takes all rows from a segment that wait for it; which of them still count."""
        waiting = [*puts, *self._queue.withdraw(segment)]
        left = [(put, reading.left_of(segment, put.first, put.keys)) for put in waiting]
        reading.give_up(segment, b"".join([put.keys for put in waiting]))
        return left

    def _placed_anew(self, reading: Reading, segment: Segment, left: list[tuple[Put, Places]]) -> list[Put]:
        """The same rows, as far as they still count, on their way to another segment."""
        moved = []
        for put, places in left:
            if len(places):
                matrix = put.matrix if len(places) == len(put.matrix) else put.matrix[places]
                sums = np.frombuffer(put.sums, np.uint64)[places].tobytes()
                joined = np.frombuffer(put.keys, np.uint8).reshape(-1, KEY_BYTES)[places].tobytes()
                other = reading.open_segment(segment.layout, len(places), self.next_name)
                first = reading.expect(other, joined, matrix)
                moved.append(Put(reading, other, first, joined, matrix, sums, put.stamp, put.buffer))
        return moved

    def _sign_again(self) -> None:
        """The file by which others see that this process writes may be gone, too."""
        if self._sign is not None and not os.fstat(self._sign).st_nlink:
            os.close(self._sign)
            self._sign = None

    def _ready(self) -> None:
        """Makes the directory, and shows that this process writes."""
        if self._sign is None:
            self._directory.prepare()
            self._sign = self._directory.sign_in(self._name)

    def _note_use(self, use: Use) -> None:
        with self._lock:
            self._uses[use.folder] = use.entry.last_used
        if self._directory.place_of(use.folder).is_dir() and os.access(self._directory.path, os.W_OK):
            self._beside.note_use(use)

    def _refusal(self, size: int, folder: str) -> str | None:
        """Why so many bytes more may not be written for a namespace, or None; what this process uses is spared."""
        assert self._sign is not None
        now = time.time()
        with self._lock:
            self._uses = {used: at for used, at in self._uses.items() if now - at <= IN_USE}
            spared = frozenset({folder, *self._uses})
        with undisturbed:
            return self._admission.refusal(size, self._name, self._sign, spared)

    def _note_dropped(self, folder: str) -> None:
        counted = count_rows(self._directory, folder)
        self.evicted += 0 if counted is None else counted.rows

    def _sync(self) -> None:
        self._writers.sync()
        if self._sign is not None:
            self._admission.release(self._sign)

    def _abort(self, kind: str, reason: str, tasks: list[Task]) -> None:
        """Gives up all rows that wait, and writes nothing for a while; what was committed stays readable."""
        with self._lock:
            waiting = [*self._queue.withdraw(), *(task for task in tasks if isinstance(task, Put))]
            concerned = self._writers.readings()
            concerned |= {put.segment: put.reading for put in waiting}
            for segment, reading in concerned.items():
                self.refused += reading.give_up(segment)
            self._paused_until = time.monotonic() + _PAUSE
            text = (
                f"no rows are written to the cache directory {str(self._directory.path)!r} for now: {reason}. "
                "What was stored can still be read; the next try is in a minute"
            )
            self.troubles.append((kind, text))
            old, self._name = self._name, new_writer()
        self._writers.give_up()
        if self._sign is not None:
            self._directory.sign_out(old, self._sign)
            self._sign = None
        self._admission.forget()


def _follow(puts: list[Put], rows: int) -> bool:
    """Whether these rows come one behind the other, the first behind so many."""
    for put in puts:
        if put.first != rows:
            return False
        rows += len(put.matrix)
    return True
