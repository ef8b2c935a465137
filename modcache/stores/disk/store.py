"""The store of a cache directory: finds rows of all processes, and hands new ones to the thread that writes."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from ...errors import UsageError, UsageTypeError
from ..budget import memory_here
from ..incoming import check_batch, last_of_each
from ..protocol import Found, StoreStats
from . import room
from .catalogue import Entry
from .counting import Count, Counts
from .describing import Descriptions
from .descriptors import Descriptors
from .directory import Directory
from .names import folder_of
from .options import Options
from .readings import Readings
from .records import records_of
from .sharing import note, shared
from .tasks import Drop, Facts, Put, Use
from .troubles import tell
from .writing import Writing

if TYPE_CHECKING:
    from typing_extensions import Self

    from ...rows import Rows
    from .reading import Reading

__all__ = ["DiskStore", "open_directory"]

_QUEUE_BYTES: Final = 20 << 20  # fresh memory costs more than what is written out of it
_QUEUE_SHARE: Final = 8  # of the memory that there is
_USE_NOTED: Final = 60.0  # seconds within which a namespace is not noted as used again
_CHUNK: Final = 1024  # rows that are moved at a time when a namespace gets another name


class DiskStore:
    """Keeps rows in a directory, which any number of processes may read and write at once.

    Rows are found as soon as they are put, and written behind the loop by a thread; `flush` waits for it, and so
    does the end of the process. What other processes wrote is found at the latest at the next miss. Nothing in
    the directory is ever executed, and whatever is damaged there counts as missing. A copy of a store is the
    same store; a pickle opens the same directory.

    Example:
        >>> import tempfile, torch
        >>> from modcache.rows import SINGLE, Layout, Rows
        >>> layout = Layout(SINGLE, ((torch.float32, (2,)),))
        >>> with tempfile.TemporaryDirectory() as place:
        ...     with DiskStore(place) as store:
        ...         store.put("names", [b"k" * 16], Rows(layout, (torch.ones(1, 2),)))
        ...     with DiskStore(place) as again:
        ...         found, = again.get("names", [b"k" * 16])
        1
        >>> found.rows.tensors[0].tolist()
        [[1.0, 1.0]]

    Args:
        directory: where the rows lie; it is made when the first row is written.
        max_bytes: bound of all files in the directory, over all processes that give one. When it is reached,
            namespaces that nobody used within the hour go, the longest unused first; then no more rows are written.
        mmap: whether rows below 64 KiB are read through memory maps, which is several times quicker. A file that
            somebody cuts short at the moment of reading then ends the process; False avoids that.
        keep_free: bytes of the file system that stay free; None for the smaller of 1 GiB and 5 % of it.

    Raises:
        UsageError: the directory is a file, or a number cannot be right.
        FormatVersionError: the directory was written by a newer modcache.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        max_bytes: int | None = None,
        mmap: bool = True,
        keep_free: int | None = None,
    ) -> None:
        if not hasattr(os, "preadv"):
            raise UsageError("A DiskStore needs a POSIX system, such as Linux or macOS. Use a MemoryStore here.")
        if not isinstance(directory, str | os.PathLike) or not os.fspath(directory):
            raise UsageTypeError(f"directory is the path of a cache directory, but {directory!r} was given.")
        if "\0" in os.fsdecode(directory):
            raise UsageError(f"directory is the path of a cache directory; found a null character in {directory!r}.")
        self._options = Options(max_bytes, mmap, keep_free)
        self._directory = Directory(directory)
        self._directory.check()
        self._refused = 0
        self._told: set[str] = set()
        self._closed = False
        self._begin()
        note(self)

    def _begin(self) -> None:
        """Everything that belongs to one process; a forked child begins anew."""
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._descriptors = Descriptors()
        self._readings = Readings(self._directory, self._descriptors, mapped=self._options.mmap)
        self._counts = Counts(self._directory)
        self._descriptions = Descriptions(self._directory)
        self._used: dict[str, float] = {}
        self._stamp = 0
        self._writable: bool | None = None
        self._troubles: list[tuple[str, str]] = []
        self._writing = Writing(
            self._directory,
            self._lock,
            max_bytes=self._options.max_bytes,
            keep_free=self._options.keep_free,
            queue_bytes=_queue_bytes(),
            told=self._told,
        )
        self._end = weakref.finalize(self, self._writing.stop)
        self._end.atexit = False

    def begin_anew(self) -> None:  # pragma: no cover - in a forked child, where coverage does not look
        """In a forked child: forgets what the parent has open and what it is about to write."""
        self._end.detach()
        self._descriptors.close()
        if not self._closed:
            self._begin()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def options(self) -> dict[str, Any]:
        """What the store was made with, beside its directory."""
        return self._options.as_keywords()

    @property
    def directory(self) -> Path:
        """Where the rows lie."""
        return self._directory.path

    def __repr__(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        return f"{type(self).__name__}({str(self.directory)!r}{options})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (type(self), str(self.directory), *self.options.values())

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the protocol ---------------------------------------------------------------------------------

    def get(self, namespace: str, row_keys: Sequence[bytes]) -> tuple[Found, ...]:
        """The rows that are there, in fresh memory: one `Found` per layout."""
        # The lock is held over the copy, too: rows might move in the address space meanwhile.
        with self._lock:
            if self._closed:
                return ()
            reading = self._readings.of(namespace)
            try:
                found = reading.get(row_keys)
            except BaseException:
                self._readings.leave(reading)
                raise
            self._note_use(reading)
        if reading.troubles:
            self._tell(reading)
        return found

    def put(self, namespace: str, row_keys: Sequence[bytes], rows: Rows) -> int:
        """Takes the rows in to be written; how many, which is all or none."""
        check_batch(row_keys, rows)
        if not row_keys or self._closed:
            return 0
        chosen = last_of_each(row_keys)
        if not self._may_write():
            self._refused += len(chosen)
            self._tell()
            return 0
        # Summed up right here, where the rows are in the cache; the other thread is left with what needs no GIL.
        for records in records_of(rows, chosen, self._writing.memory_for):
            keys = [row_keys[i] for i in records.places.tolist()] if len(records.places) < len(row_keys) else row_keys
            with self._lock, self._using(namespace) as reading:
                if reading is None:
                    return 0
                segment = reading.open_segment(rows.layout, len(keys), self._writing.next_name)
                joined = b"".join(keys)
                first, stamp = reading.expect(segment, joined, records.matrix), self._next_stamp(reading)
                self._writing.push(
                    Put(reading, segment, first, joined, records.matrix, records.sums, stamp, records.buffer)
                )
                self._note_use(reading)
        self._tell()
        return len(chosen)

    def delete(self, namespace: str, row_keys: Sequence[bytes] | None = None) -> int:
        """Drops these rows, or with None the whole namespace with its files; the number of rows dropped."""
        with self._lock, self._using(namespace) as reading:
            if reading is None:
                return 0
            if row_keys is None:
                reading.refresh()
                count = self._readings.hide(reading, self._next_stamp(reading))
                self._unlink(reading.folder)
                self._writing.try_again()
                return count
            keys = list(dict.fromkeys(row_keys))
            count = reading.delete(keys, self._next_stamp(reading)) if keys else 0
            if count and self._may_write():
                segment = reading.open_segment(None, 0, self._writing.next_name)
                self._writing.push(Drop(reading, segment, b"".join(keys), self._next_stamp(reading)))
            return count

    def row_keys(self, namespace: str) -> list[bytes]:
        """The keys of all rows of a namespace, in no particular order."""
        with self._lock, self._using(namespace) as reading:
            if reading is None:
                return []
            reading.refresh()
            return reading.keys()

    def namespaces(self) -> list[str]:
        """The namespaces that have at least one row."""
        return [count.namespace for count in self._count_all() if count.rows]

    def stats(self) -> StoreStats:
        """What the directory holds, by all who wrote there; ``evicted`` counts rows dropped for room."""
        counts = self._count_all()
        return StoreStats(
            rows=sum(count.rows for count in counts),
            bytes=room.take_census(self._directory).bytes + self._writing.queued,
            max_bytes=self._options.max_bytes,
            namespaces=sum(count.rows > 0 for count in counts),
            refused=self._refused + self._writing.refused,
            evicted=self._writing.evicted,
        )

    def flush(self) -> None:
        """Waits until everything that was put is written and would survive a power cut."""
        self._writing.flush()
        self._tell()

    def close(self) -> None:
        """Writes what was put, and gives back all files and memory; afterwards nothing is found or admitted."""
        self._writing.close()
        self._tell()
        with self._lock:
            self._closed = True
            self._readings.close()

    # --- abilities ------------------------------------------------------------------------------------

    def contains(self, namespace: str, row_keys: Sequence[bytes]) -> npt.NDArray[np.bool_]:
        """Which rows are there, without reading or using them."""
        with self._lock, self._using(namespace) as reading:
            if reading is None:
                return np.zeros(len(row_keys), np.bool_)
            return reading.contains(row_keys) >= 0

    def held_bytes(self) -> int:
        """The bytes of all files there, as they were at most a second ago: quicker than `stats`, which counts rows."""
        return self._counts.bytes_lately() + self._writing.queued

    def retire(self, namespace: str) -> None:
        """Does not spare a namespace any more that this process used, once nobody else used it within the hour."""
        with self._lock:
            self._used.pop(namespace, None)
            self._writing.retire(folder_of(namespace))

    def rename(self, old: str, new: str) -> None:
        """Gives the rows of a namespace to another name, over rows that have it already: they are written again."""
        if old == new:
            return
        keys = self.row_keys(old)
        for start in range(0, len(keys), _CHUNK):
            chunk = keys[start : start + _CHUNK]
            for found in self.get(old, chunk):
                self.put(new, [chunk[i] for i in found.positions.tolist()], found.rows)
        self.delete(old)

    def namespace_bytes(self, namespace: str) -> int:
        """The bytes of the rows of a namespace, those included that were overwritten or dropped since."""
        with self._lock, self._using(namespace) as reading:
            if reading is None:
                return 0
            reading.refresh()
            return reading.row_bytes

    def describe(self, namespace: str, facts: Mapping[str, Any]) -> None:
        """Keeps facts in the manifest of a namespace; those of an earlier call stay unless they are named again."""
        with self._lock:
            if self._closed or not self._may_write():
                return
            self._writing.push(Facts(folder_of(namespace), self._descriptions.add(namespace, facts)))

    def manifest(self, namespace: str) -> dict[str, Any] | None:
        """What was described of a namespace, by any process."""
        return self._descriptions.of(namespace)

    def manifests(self) -> dict[str, dict[str, Any]]:
        """All manifests, by namespace."""
        return self._descriptions.all()

    # --- within ---------------------------------------------------------------------------------------

    def _using(self, namespace: str) -> contextlib.AbstractContextManager[Reading | None]:
        """The reading of a namespace for the time of a block; none in a closed store. The lock is held."""
        return contextlib.nullcontext() if self._closed else self._readings.using(namespace)

    def _next_stamp(self, reading: Reading) -> int:
        """Later than all that was said before, whatever the clock does."""
        self._stamp = max(time.time_ns(), self._stamp + 1, reading.latest + 1)
        return self._stamp

    def _note_use(self, reading: Reading) -> None:
        now, last = time.monotonic(), self._used.get(reading.namespace)
        if (last is None or now - last > _USE_NOTED) and len(reading):  # a look at nothing is no use
            self._used[reading.namespace] = now
            if self._is_writable():
                entry = Entry(time.time(), len(reading), reading.row_bytes)
                self._writing.push(Use(reading.namespace, reading.folder, entry))

    def _is_writable(self) -> bool:
        if self._writable is None:
            self._writable = self._directory.is_writable()
        return self._writable

    def _may_write(self) -> bool:
        if not self._is_writable():
            text = f"the cache directory {str(self.directory)!r} cannot be written: what is there is served, no more"
            self._troubles.append(("read-only", text))
            return False
        return not self._writing.paused

    def _unlink(self, folder: str) -> None:
        try:
            self._directory.remove_segments(folder)
        except OSError as error:
            self._troubles.append(("unlink", f"the files of a namespace cannot be removed: {error}"))

    def _tell(self, reading: Reading | None = None) -> None:
        """Warns of what went wrong since, each kind of thing once."""
        for troubles in (self._troubles, self._writing.troubles, [] if reading is None else reading.troubles):
            tell(troubles, self._told)

    def _count_all(self) -> list[Count]:
        with self._lock:
            if self._closed:
                return []
            return self._counts.all(self._readings.refreshed())


def _queue_bytes() -> int:
    return min(_QUEUE_BYTES, memory_here() // _QUEUE_SHARE)


def open_directory(path: str | os.PathLike[str]) -> DiskStore:
    """The store of a directory, the same for all who ask in one process as long as somebody holds it.

    Raises:
        UsageError: the path is that of a file.
        FormatVersionError: the directory was written by a newer modcache.
    """
    return shared(path, lambda: DiskStore(path))


def _reopened(cls: type[DiskStore], path: str, max_bytes: int | None, mmap: bool, keep_free: int | None) -> DiskStore:
    """The store that a pickle was of: the one that is open here, if it has the same options."""

    def make() -> DiskStore:
        return cls(path, max_bytes=max_bytes, mmap=mmap, keep_free=keep_free)

    store = shared(path, make)
    options = {"max_bytes": max_bytes, "mmap": mmap, "keep_free": keep_free}
    return store if type(store) is cls and store.options == options else make()
