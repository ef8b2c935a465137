"""Ask for leave before bytes are written: the bound of a directory, kept by all who write there, and free space."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, Literal

from . import room
from .directory import Directory
from .locks import locked
from .names import ADMISSION, WRITERS_FOLDER, folder_of

if TYPE_CHECKING:
    from .catalogue import Catalogue

__all__ = ["Admission", "Kind"]

_PATIENCE: Final = 10.0  # seconds that we wait for others who make room; who holds the lock counts files, no more
_STUBBORN: Final = 5.0  # seconds for which an answer is believed, if nothing is heard of a change
_CAP_BYTES: Final = 20
_BESIDE_SHARE: Final = 8  # of what is left may be written beside the rows before it is counted again
_BESIDE_BYTES: Final = 1 << 20

Kind = Literal["rows", "manifest", "note"]
"""What is to be written."""


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
        self._refused: dict[Kind, tuple[int, float]] = {}  # bytes, and until when so many are not asked for again
        self._allowed: dict[Kind, tuple[int, float]] = {}  # bytes beside the rows, and until when nobody need be asked
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
        reason = self._floor_reached(size)
        if reason is not None or self._max_bytes is None:
            return reason
        if self._written + size > self._cap:
            reason = self._full() if self._lately("rows", size) else self._ask(size, writer, sign, spared)
            if reason is not None:
                self._note_refused("rows", size)
                return reason
        self._written += size
        return None

    def fits(self, size: int, writer: str, kind: Kind) -> bool:
        """Whether so many bytes may be written beside the rows: no rows go for them, and nothing is reserved.

        Without a lock: others who ask at this moment may be given the same few bytes.

        Args:
            size: of what is to be written.
            writer: who writes.
            kind: of what is to be written; rows leave some room to notes.

        Raises:
            OSError: the directory cannot be looked at.
        """
        if self._floor_reached(size) is not None:
            return False
        if self._max_bytes is None:
            return True
        if self._lately(kind, size):
            return False
        allowed, until = self._allowed.get(kind, (0, 0.0))
        if size > allowed or time.monotonic() > until:
            census, caps = self._count(writer)
            left = self._left(self._max_bytes, kind, census, {**caps, writer: self._cap})
            if size > left:
                self._note_refused(kind, size)
                return False
            allowed, until = max(size, min(left // _BESIDE_SHARE, _BESIDE_BYTES)), time.monotonic() + _STUBBORN
        self._allowed[kind] = allowed - size, until
        return True

    def release(self, sign: int) -> None:
        """Gives back what was reserved and not written."""
        if self._cap > self._written:
            self._cap = self._written
            self._tell(sign)

    def ask_again(self) -> None:
        """There may be room where there was none."""
        self._refused.clear()

    def forget(self) -> None:
        """Begins anew, for another writer."""
        self._written = self._cap = 0
        self._allowed.clear()
        self.ask_again()

    def _floor_reached(self, size: int) -> str | None:
        """Why so many bytes more would leave too few of the file system free, or None."""
        usage = shutil.disk_usage(self._directory.path)
        floor = room.floor_of(usage.total) if self._keep_free is None else self._keep_free
        if usage.free - size < floor:
            return f"only {usage.free} bytes are free in its file system, and {floor} shall stay free (keep_free)"
        return None

    def _full(self) -> str:
        return f"it holds its max_bytes={self._max_bytes}, and everything in it was used within the hour"

    def _lately(self, kind: Kind, size: int) -> bool:
        """Whether so much was refused a moment ago: not every batch needs a census."""
        least, until = self._refused.get(kind, (0, 0.0))
        return size >= least and time.monotonic() < until

    def _note_refused(self, kind: Kind, size: int) -> None:
        if not self._lately(kind, size):
            self._refused[kind] = size, time.monotonic() + _STUBBORN

    @staticmethod
    def _left(max_bytes: int, kind: Kind, census: room.Census, caps: Mapping[str, int]) -> int:
        """The bytes that may still be written, by how far some writers may go without asking."""
        kept = 0 if kind == "note" else room.kept_for_notes(max_bytes, census.catalogue)
        return max_bytes - census.bytes - kept - room.reserved(census.writers, caps)

    def _ask(self, size: int, writer: str, sign: int, spared: frozenset[str]) -> str | None:
        """Asks for leave to write some rows, and more if there is room; why there is none, or None."""
        assert self._max_bytes is not None
        with self._directory.opened((WRITERS_FOLDER,), ADMISSION, os.O_RDWR | os.O_CREAT) as file:
            end = time.monotonic() + _PATIENCE
            while not locked(file, wait=False):
                if time.monotonic() > end:
                    return f"for {_PATIENCE:.0f} seconds, others have been counting what it holds"
                time.sleep(0.005)
            census, caps = self._count(writer)
            left = self._left(self._max_bytes, "rows", census, caps)
            if left < size and self._make_room(census, size - left, spared):
                census, caps = self._count(writer)
                left = self._left(self._max_bytes, "rows", census, caps)
            granted = room.grant(left, size, len(caps) + 1)
            self._written = census.writers.get(writer, 0)
            self._cap = self._written + granted
            self._tell(sign)
            return None if granted >= size else self._full()

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
