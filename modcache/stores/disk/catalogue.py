"""When each namespace of a cache directory was last used, and what it held then; losing it loses no row."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .settings import COUNTS, SCHEMA, SETTINGS

if TYPE_CHECKING:
    import sqlite3

    from .texts import TextCache

__all__ = ["FIRST_BYTES", "MORE_BYTES", "Catalogue", "Entry"]

FILE: Final = "cache.db"
BESIDE: Final = ("cache.db-journal", "cache.db-wal", "cache.db-shm")
MARK: Final = "made-by-modcache"  # a folder without it was there before us, and is not touched
_MARK_TEXT: Final = b"modcache made this folder; no row is lost with it.\n"

_WAIT: Final = 0.1  # seconds for another writer, who needs a thousandth
_PATIENCE: Final = 2.0  # seconds for reading all of it; only a planted file takes more
FIRST_BYTES: Final = 25 << 10
"""What a catalogue takes with its first note."""
MORE_BYTES: Final = 8 << 10
"""What it may take more with one more namespace: pages of a table and of its index."""

_EACH_BYTES: Final = 256  # of a namespace, on the average
_MAX_FILE: Final = 256 << 20
_MAX_TEXT: Final = 4096
_MAX_COUNT: Final = 1 << 62


@dataclass(frozen=True, slots=True)
class Entry:
    """What the catalogue knows of a namespace.

    Args:
        last_used: seconds since the epoch.
        rows: rows that it held then.
        bytes: bytes of its files then.
    """

    last_used: float
    rows: int
    bytes: int


@dataclass(frozen=True, slots=True)
class _Reading:
    """What was found: the entries that make sense, and whether there was nothing else."""

    entries: Mapping[str, Entry]
    sane: bool


_NOTHING: Final = _Reading({}, sane=False)


class Catalogue:
    """The last use of each namespace, in a `diskcache.Cache` that is open only for the moment of a write.

    No method raises or waits for long, whatever lies there: what is missing, damaged or planted is unlinked if it
    is ours and written anew; what is locked, read-only or somebody else's is done without. Nothing is held between
    calls, so forks and threads need no care.

    Args:
        directory: the folder where it lies or shall lie.
        writable: whether it may be written; if not it is read without diskcache, which writes when it opens.
    """

    def __init__(self, directory: Path, *, writable: bool) -> None:
        self._directory = Path(os.path.abspath(directory))
        # diskcache expands variables in a path, and would make a folder elsewhere.
        self._writable = writable and os.path.expandvars(self._directory) == str(self._directory)
        self._latest: Mapping[str, Entry] = {}

    def entries(self) -> dict[str, Entry]:
        """What is known of each namespace; while somebody else writes, what was known at the last look."""
        self._look()
        return dict(self._latest)

    def note(self, namespace: str, entry: Entry, may_grow: Callable[[int], bool] = lambda _: True) -> None:
        """Writes what is known of one namespace now; a damaged catalogue is begun anew with it.

        Args:
            namespace: its name.
            entry: what is known.
            may_grow: whether there is room for about so many bytes more; asked where more than a page is written over.
        """
        reading = self._look()
        if reading is None or not self._writable or not self._is_ours():
            return
        there = os.path.lexists(self._directory / FILE)
        if reading.sane or not there:
            growth = FIRST_BYTES if not there else 0 if namespace in reading.entries else MORE_BYTES
            if not growth or may_grow(growth):
                self._write(lambda cache: cache.set(namespace, _text_of(entry)))
        elif may_grow(FIRST_BYTES + _EACH_BYTES * len(reading.entries)):
            self.rebuild({**reading.entries, namespace: entry})

    def forget(self, namespace: str) -> None:
        """Drops what is known of a namespace."""
        reading = self._look()
        if reading is not None and reading.sane and namespace in reading.entries:
            self._write(lambda cache: cache.delete(namespace))

    def rebuild(self, entries: Mapping[str, Entry]) -> None:
        """Puts a catalogue of these entries in the place of what is there."""

        def fill(cache: TextCache) -> None:
            with cache.transact():
                for namespace, entry in entries.items():
                    cache.set(namespace, _text_of(entry))

        if self._writable and self._is_ours():
            for name in (FILE, *BESIDE):
                self._unlink(name)
            self._write(fill)

    @property
    def damaged(self) -> bool:
        """Whether `rebuild` would help: it is missing, cannot be read, or holds what nobody of ours wrote there."""
        reading = self._look()
        return reading is not None and not reading.sane and self._writable and self._is_ours()

    def close(self) -> None:
        """Writes nothing from now on."""
        self._writable = False

    # --- reading

    def _look(self) -> _Reading | None:
        """Reads everything; ``None`` if somebody else is writing just now."""
        reading = self._read()
        if reading is not None:
            self._latest = reading.entries
        return reading

    def _read(self) -> _Reading | None:
        beside = any(os.path.lexists(self._directory / name) for name in BESIDE)
        if not _is_file(self._directory / MARK) or not _is_file(self._directory / FILE, _MAX_FILE):
            return _NOTHING  # a stranger's is not even read: sqlite may make files beside it
        if beside and self._writable:
            return _NOTHING  # a journal would be played back into the file, and we write none
        # Without locks only where they cannot be had: on some read-only mounts, and beside a journal.
        try:
            return self._read_by("immutable=1" if beside else "mode=ro")
        except Exception as error:  # damage has many faces
            if "locked" in str(error):
                return None
        with contextlib.suppress(Exception):
            return self._read_by("immutable=1")
        return _NOTHING

    def _read_by(self, how: str) -> _Reading:
        import sqlite3

        # Never by a descriptor of our own: closing one would give up the locks that this process has on the file.
        path = f"{(self._directory / FILE).as_uri()}?{how}"
        with contextlib.closing(sqlite3.connect(path, uri=True, timeout=_WAIT, isolation_level=None)) as connection:
            end = time.monotonic() + _PATIENCE
            connection.set_progress_handler(lambda: time.monotonic() > end, 10_000)
            for pragma in ("mmap_size = 0", "trusted_schema = 0", "query_only = 1"):
                connection.execute(f"PRAGMA {pragma}")
            connection.execute("BEGIN")
            return _checked(connection)

    # --- writing

    def _write(self, act: Callable[[TextCache], object]) -> None:
        """Does something with the cache, or leaves it when that fails: the catalogue is never worth an error."""
        with contextlib.suppress(Exception):
            if self._writable and self._claim() and self._unlocked():
                from .texts import TextCache

                with contextlib.closing(TextCache(str(self._directory), _WAIT)) as cache:
                    act(cache)

    def _is_ours(self) -> bool:
        """Whether the folder is ours, or can become so because it is empty or not there."""
        try:
            if not os.path.lexists(self._directory):
                return True
            is_folder = stat.S_ISDIR(os.lstat(self._directory).st_mode)
            return is_folder and (_is_file(self._directory / MARK) or not os.listdir(self._directory))
        except OSError:
            return False

    def _claim(self) -> bool:
        """Makes the folder and marks it as ours; whether it is."""
        if not self._is_ours():
            return False
        with contextlib.suppress(FileExistsError):
            os.makedirs(self._directory, 0o700)
        with contextlib.suppress(FileExistsError):
            _write_new(self._directory / MARK, _MARK_TEXT)
        return True

    def _unlocked(self) -> bool:
        """Whether the file can be written at once; diskcache would wait a minute when it opens."""
        import sqlite3

        path = self._directory / FILE
        with contextlib.suppress(FileExistsError):
            _write_new(path, b"")  # sqlite would make it readable for others
        if not _is_file(path, _MAX_FILE):
            return False
        with contextlib.closing(sqlite3.connect(path, timeout=_WAIT, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = memory")
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        return True

    def _unlink(self, name: str) -> None:
        """Unlinks a file of ours; a link or a folder in its place is not."""
        with contextlib.suppress(OSError):
            if _is_file(self._directory / name):
                os.unlink(self._directory / name)


def _is_file(path: Path, most: int | None = None) -> bool:
    """Whether there is a file and no link, of at most so many bytes."""
    try:
        found = os.lstat(path)
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(found.st_mode) and (most is None or found.st_size <= most)


def _write_new(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)


# --- what is in the file --------------------------------------------------------------------------------


def _checked(connection: sqlite3.Connection) -> _Reading:
    """What makes sense in a catalogue that may be anything."""
    if set(connection.execute("SELECT type, name FROM sqlite_master LIMIT 100")) != SCHEMA:
        return _NOTHING
    sane = connection.execute("PRAGMA integrity_check(1)").fetchall() == [("ok",)]
    sane &= _settings_are_ours(dict(connection.execute("SELECT key, value FROM Settings LIMIT 100")))
    ((count,),) = connection.execute("SELECT count(*) FROM Cache").fetchall()
    texts = connection.execute(
        "SELECT key, value FROM Cache WHERE raw = 1 AND mode = 1 AND filename IS NULL AND expire_time IS NULL"
        " AND typeof(key) = 'text' AND typeof(value) = 'text' AND length(key) <= ? AND length(value) <= ?",
        (_MAX_TEXT, _MAX_TEXT),
    )
    entries = {key: entry for key, text in texts if (entry := _entry_of(text)) is not None}
    return _Reading(entries, sane and count == len(entries))


def _settings_are_ours(found: dict[object, object]) -> bool:
    counts = {found.pop(name, None) for name in COUNTS}
    return found == SETTINGS and all(type(count) is int for count in counts)


def _text_of(entry: Entry) -> str:
    return json.dumps(asdict(entry), allow_nan=False)


def _entry_of(text: str) -> Entry | None:
    """The entry that a text stands for, or None if somebody else wrote it."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.keys() != {"last_used", "rows", "bytes"}:
        return None
    last_used, rows, size = found["last_used"], found["rows"], found["bytes"]
    if type(last_used) not in (int, float) or not math.isfinite(last_used):
        return None
    if any(type(number) is not int or not 0 <= number < _MAX_COUNT for number in (rows, size)):
        return None
    return Entry(float(last_used), rows, size)
