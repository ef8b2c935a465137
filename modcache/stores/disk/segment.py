"""One segment as a reader knows it: what its log commits so far, and its rows, read from the file."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from ..index import Places
from .directory import Directory
from .frames import (
    LOG_START_BYTES,
    ROWS_HEAD_BYTES,
    DamageError,
    Frame,
    SegmentHeader,
    log_header_bytes,
    parse_frames,
    parse_log_header,
    parse_rows_head,
)
from .names import SegmentName, folder_of

if TYPE_CHECKING:
    from ...rows import Layout

__all__ = ["NEVER", "Segment", "check_rows", "read_all", "read_header", "read_into"]

_MOST_BYTES: Final = 1 << 30  # of rows in one segment
_MOST_ROWS: Final = 1 << 24  # keys and checksums of so many take 400 MB of a log
_PIECE: Final = 1 << 25  # bytes of a log that are read at once: more than any frame has, and a million rows
NEVER: Final = np.iinfo(np.int64).max
"""The stamp of rows that are not committed yet: nothing that was committed is later."""


class Segment:
    """A segment of one namespace, foreign or of this process.

    Args:
        number: of the segment among those of its namespace, in this process only.
        folder: of the namespace.
        name: of its files.
        segment: the 16 bytes that both files carry.
        layout: of the rows.
    """

    def __init__(self, number: int, folder: str, name: SegmentName, segment: bytes, layout: Layout) -> None:
        self.number = number
        self.folder = folder
        self.name = name
        self.segment = segment
        self.layout = layout
        self.row_bytes = layout.row_bytes
        self.committed = 0
        self.file_bytes = ROWS_HEAD_BYTES  # that the committed rows need
        self.assigned = 0  # rows that have a place, of which the last ones may wait to be written
        self.waiting: list[tuple[int, npt.NDArray[np.uint8]]] = []  # those, with the number of the first row
        self.own = False
        self.closed = False  # of our own, but nothing more is put there
        self.ended = False  # of another writer, who put all there that there will be
        self.doubtful = False  # the last look found more than it could believe
        self.most = max(1, min(_MOST_BYTES // max(1, self.row_bytes), _MOST_ROWS))
        self._firsts: list[int] = []
        self._stamps: list[int] = []
        self._log_end = 0
        self._seen: tuple[int, ...] = ()

    def commit(self, first: int, count: int, stamp: int) -> None:
        """Rows that were committed are to be had from the file."""
        if not self._stamps or stamp != self._stamps[-1]:
            self._firsts.append(first)
            self._stamps.append(stamp)
        self.committed = first + count
        self.file_bytes = ROWS_HEAD_BYTES + self.committed * self.row_bytes
        self.assigned = max(self.assigned, self.committed)

    def stamps_of(self, rows: Places) -> Places:
        """When each of these rows was committed."""
        if not self._stamps:
            return np.full(len(rows), NEVER)
        at = np.searchsorted(np.array(self._firsts), rows, side="right") - 1
        stamps: Places = np.array(self._stamps, np.int64)[at]
        return np.where(rows < self.committed, stamps, NEVER)

    @property
    def log_end(self) -> int:
        """Where the log ends as far as it is believed."""
        return self._log_end

    def begin_log(self, end: int) -> None:
        """The log is read up to here."""
        self._log_end = end

    def news(self, directory: Directory) -> Iterator[list[Frame]]:
        """What was committed since the last look, some frames at a time; the rows of each are to be noted at once.

        Raises:
            OSError: the segment cannot be read, or is gone.
        """
        self.doubtful = False
        found = os.stat(directory.place_of(self.folder) / self.name.log, follow_symlinks=False)
        seen = (found.st_ino, found.st_size, found.st_mtime_ns)
        if seen == self._seen:
            return
        with directory.opened_segment(self.folder, self.name.rows) as file:
            size = os.fstat(file).st_size
        most_rows = (size - ROWS_HEAD_BYTES) // self.row_bytes if self.row_bytes else 1 << 62
        with directory.opened_segment(self.folder, self.name.log) as file:
            while True:
                data = read_all(file, self._log_end, min(_PIECE, os.fstat(file).st_size - self._log_end))
                frames, self._log_end = parse_frames(data, self.segment, self._log_end, self.committed, most_rows)
                if not frames:
                    break
                yield frames
        self.doubtful = bool(data) or size > self.file_bytes
        self._seen = seen

    def open_rows(self, directory: Directory) -> int:
        """A descriptor of the rows file, after a look at its head.

        Raises:
            OSError: it cannot be opened.
            DamageError: it is not the rows file of this segment.
        """
        file = directory.open_segment(self.folder, self.name.rows)
        try:
            check_rows(file, self.segment)
        except BaseException:
            os.close(file)
            raise
        return file

    def waiting_rows(self, rows: Places, into: npt.NDArray[np.uint8], at: Places) -> None:
        """Copies rows that wait to be written into these rows of a matrix."""
        firsts = [first for first, _ in self.waiting]
        for row, place in zip(rows.tolist(), at.tolist(), strict=True):
            first, matrix = self.waiting[bisect_right(firsts, row) - 1]
            into[place] = matrix[row - first]


def read_header(directory: Directory, folder: str, name: SegmentName) -> tuple[SegmentHeader, int] | None:
    """The header of a log and its length; None where it is not all there yet.

    Raises:
        OSError: it cannot be read.
        DamageError: it is not the log of a segment in this folder.
    """
    with directory.opened_segment(folder, name.log) as file:
        size = os.fstat(file).st_size
        if size < LOG_START_BYTES:
            return None
        length = log_header_bytes(os.pread(file, LOG_START_BYTES, 0))
        if size < length:
            return None
        header = parse_log_header(read_all(file, 0, length))
    if folder_of(header.namespace) != folder:
        raise DamageError("the log belongs to another namespace")
    return header, length


def check_rows(file: int, segment: bytes) -> None:
    """Raises `DamageError` unless this is the rows file of this segment."""
    if parse_rows_head(os.pread(file, ROWS_HEAD_BYTES, 0)) != segment:
        raise DamageError("the rows file belongs to another segment")


def read_all(file: int, offset: int, size: int) -> bytes:
    """So many bytes of a file from an offset on, or fewer where it ends."""
    parts = []
    while size > 0 and (part := os.pread(file, min(size, 1 << 30), offset)):
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return b"".join(parts)


def read_into(file: int, offset: int, views: list[memoryview]) -> bool:
    """Fills these views, one after the other, from an offset on; False where the file ends before."""
    wanted = sum(view.nbytes for view in views)
    got = os.preadv(file, views, offset)
    while got < wanted:
        skip, left = got, []
        for view in views:
            if skip < view.nbytes:
                left.append(view[skip:])
            skip = max(0, skip - view.nbytes)
        more = os.preadv(file, left, offset + got)
        if not more:
            return False
        got += more
    return True
