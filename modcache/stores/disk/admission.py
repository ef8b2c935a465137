"""Ask for leave before bytes are written: the bound of a directory, kept by all who write there, and free space."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from . import room
from .directory import Directory
from .locks import locked
from .names import ADMISSION, WRITERS_FOLDER, folder_of

if TYPE_CHECKING:
    from .catalogue import Catalogue

__all__ = ["Admission"]

_PATIENCE: Final = 2.0  # seconds that we wait for others who make room; who holds the lock counts files, no more
_STUBBORN: Final = 5.0  # seconds
_CAP_BYTES: Final = 20


class Admission:
    """Leave to write, of one writer.

    Each writer writes down how far it may go in all before it asks again. What is reserved in this way counts
    as if it were written, so that the bound holds whoever writes how fast.

    Args:
        directory: that is written to.
        max_bytes: the bound of all its files, or None.
        keep_free: the bytes of the file system that stay free, or None for the usual floor.
        catalogue: knows when namespaces were used.
        dropping: is told the folder of a namespace that is about to be dropped to make room.
    """

    def __init__(
        self,
        directory: Directory,
        max_bytes: int | None,
        keep_free: int | None,
        catalogue: Catalogue,
        dropping: Callable[[str], None],
    ) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._keep_free = keep_free
        self._catalogue = catalogue
        self._dropping = dropping
        self._refused = 0, 0.0  # bytes, and until when no more than that is asked for
        self._written = self._cap = 0  # bytes of this writer: in its files, and how far they may grow

    def refusal(self, size: int, writer: str, sign: int, spared: frozenset[str]) -> str | None:
        """Why so many bytes more may not be written, or None; then they count as written.

        Args:
            size: of what is to be written.
            writer: who writes.
            sign: descriptor of the writer's file, which tells others how far it may go.
            spared: folders of namespaces that are in use in this process.

        Raises:
            OSError: the directory cannot be looked at.
        """
        usage = shutil.disk_usage(self._directory.path)
        floor = room.floor_of(usage.total) if self._keep_free is None else self._keep_free
        if usage.free - size < floor:
            return f"only {usage.free} bytes are free in its file system, and {floor} shall stay free (keep_free)"
        if self._max_bytes is None:
            return None
        if self._written + size > self._cap and (self._lately(size) or not self._ask(size, writer, sign, spared)):
            if not self._lately(size):
                self._refused = size, time.monotonic() + _STUBBORN
            return f"it holds its max_bytes={self._max_bytes}, and everything in it was used within the hour"
        self._written += size
        return None

    def release(self, sign: int) -> None:
        """Gives back what was reserved and not written."""
        if self._cap > self._written:
            self._cap = self._written
            self._tell(sign)

    def ask_again(self) -> None:
        """There may be room where there was none."""
        self._refused = 0, 0.0

    def forget(self) -> None:
        """Begins anew, for another writer."""
        self._written = self._cap = 0
        self.ask_again()

    def _lately(self, size: int) -> bool:
        """Whether so much was refused a moment ago: not every batch needs a census."""
        least, until = self._refused
        return size >= least and time.monotonic() < until

    def _ask(self, size: int, writer: str, sign: int, spared: frozenset[str]) -> bool:
        assert self._max_bytes is not None
        with self._directory.opened((WRITERS_FOLDER,), ADMISSION, os.O_RDWR | os.O_CREAT) as file:
            end = time.monotonic() + _PATIENCE
            while not locked(file, wait=False):
                if time.monotonic() > end:
                    return False
                time.sleep(0.005)
            census, caps = self._count(writer)
            left = self._max_bytes - census.bytes - room.reserved(census.writers, caps)
            if left < size and self._make_room(census, size - left, spared):
                census, caps = self._count(writer)
                left = self._max_bytes - census.bytes - room.reserved(census.writers, caps)
            granted = room.grant(left, size, len(caps) + 1)
            self._written = census.writers.get(writer, 0)
            self._cap = self._written + granted
            self._tell(sign)
            return granted >= size

    def _count(self, writer: str) -> tuple[room.Census, dict[str, int]]:
        """What lies there, and how far each other live writer may go."""
        caps = {
            other: self._cap_of(other)
            for other in self._directory.writers()
            if other != writer and self._directory.is_alive(other)
        }
        return room.take_census(self._directory), caps

    def _make_room(self, census: room.Census, needed: int, spared: frozenset[str]) -> bool:
        known = {folder_of(name): (name, entry) for name, entry in self._catalogue.entries().items()}
        usages = [
            room.Usage(folder, usage.bytes, max(usage.last_used, known[folder][1].last_used))
            if folder in known
            else usage
            for folder, usage in census.folders.items()
        ]
        folders = room.to_drop(usages, needed, time.time(), spared)
        for folder in folders:
            self._dropping(folder)
            for segment in self._directory.segments(folder):
                with contextlib.suppress(OSError):
                    self._directory.remove_segment(folder, segment)
            self._directory.remove_folder(folder)
            if folder in known:
                self._catalogue.forget(known[folder][0])
        return bool(folders)

    def _cap_of(self, writer: str) -> int:
        try:
            with self._directory.opened((WRITERS_FOLDER,), writer) as file:
                text = os.pread(file, _CAP_BYTES, 0)
        except OSError:
            return 0
        return int(text) if text.isdigit() else 0

    def _tell(self, sign: int) -> None:
        with contextlib.suppress(OSError):
            os.pwrite(sign, f"{self._cap:0{_CAP_BYTES}d}".encode(), 0)
