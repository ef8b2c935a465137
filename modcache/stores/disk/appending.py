"""Append rows and commit frames to the two files of a segment: rows first, then the frame that commits them."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from .frames import DROPPED, ROWS, ROWS_HEAD_BYTES, Frame, SegmentHeader, pack_frame, pack_log_header, pack_rows_head
from .names import ROWS_FOLDER, Directory

if TYPE_CHECKING:
    from .segment import Segment

__all__ = ["SegmentWriter"]

_MOST_PARTS: Final = 512  # of one write


class SegmentWriter:
    """Writes one segment; only the thread that writes has it.

    Args:
        directory: that the segment lies in.
        segment: to be written, whose files are not there yet.
        header: of its log.
    """

    def __init__(self, directory: Directory, segment: Segment, header: SegmentHeader) -> None:
        self.rows = 0  # committed
        self.dirty = False  # since the last sync
        self._directory = directory
        self._folder, self._name, self._segment = segment.folder, segment.name, segment.segment
        self._row_bytes = segment.row_bytes
        self._header = pack_log_header(header)
        self._log_end = 0  # nothing is there yet
        self._files: tuple[int, int] | None = None

    @property
    def head_bytes(self) -> int:
        """What the files take before anything is in them, as far as they are not made yet."""
        return 0 if self._log_end else ROWS_HEAD_BYTES + len(self._header)

    def append(self, parts: Sequence[memoryview], keys: bytes, sums: bytes, stamp: int) -> None:
        """Writes rows behind those that are there, and commits them.

        Raises:
            OSError: they were not committed; what was written of them is overwritten by the next.
        """
        rows, log = self._open()
        offset = ROWS_HEAD_BYTES + self.rows * self._row_bytes
        for start in range(0, len(parts), _MOST_PARTS):
            offset = _write(rows, parts[start : start + _MOST_PARTS], offset)
        self._commit(log, Frame(ROWS, stamp, self.rows, keys, sums))
        self.rows += len(sums) // 8

    def drop(self, keys: bytes, stamp: int) -> None:
        """Writes down that the rows of these keys do not count any more.

        Raises:
            OSError: that is not written down.
        """
        self._commit(self._open()[1], Frame(DROPPED, stamp, self.rows, keys))

    def sync(self) -> None:
        """Waits until all that was committed would survive a power cut.

        Raises:
            OSError: it might not.
        """
        if self.dirty and self._log_end:
            for file in self._open():
                os.fsync(file)
            self.dirty = False

    def close(self) -> None:
        """Closes the files; they are opened again if need be."""
        files, self._files = self._files, None
        for file in files or ():
            with contextlib.suppress(OSError):
                os.close(file)

    def cut(self) -> None:
        """Gives back what was written and not committed: nobody believes it, but it takes room."""
        with contextlib.suppress(OSError):
            if self._log_end:
                rows, log = self._open()
                os.ftruncate(rows, ROWS_HEAD_BYTES + self.rows * self._row_bytes)
                os.ftruncate(log, self._log_end)

    def _commit(self, log: int, frame: Frame) -> None:
        self.dirty = True
        self._log_end = _write(log, [memoryview(pack_frame(frame, self._segment, self._log_end))], self._log_end)

    def _open(self) -> tuple[int, int]:
        """The descriptors of the files, which are made or opened if need be."""
        if self._files is None:
            self._files = self._make() if not self._log_end else self._again()
        for file in self._files:
            if not os.fstat(file).st_nlink:
                raise FileNotFoundError(
                    errno.ENOENT, "somebody removed a segment that was being written", self._name.log
                )
        if os.fstat(self._files[0]).st_size < ROWS_HEAD_BYTES + self.rows * self._row_bytes:
            raise OSError(errno.EIO, "somebody cut a segment that was being written", self._name.rows)
        return self._files

    def _make(self) -> tuple[int, int]:
        self._directory.make_folder((ROWS_FOLDER, self._folder))
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        rows = self._directory.open_segment(self._folder, self._name.rows, flags)
        try:
            _write(rows, [memoryview(pack_rows_head(self._segment))], 0)
            # The log comes second: where there is one, there are rows.
            log = self._directory.open_segment(self._folder, self._name.log, flags)
        except BaseException:
            os.close(rows)
            raise
        try:
            self._log_end = _write(log, [memoryview(self._header)], 0)
        except BaseException:
            os.close(rows)
            os.close(log)
            raise
        self.dirty = True
        return rows, log

    def _again(self) -> tuple[int, int]:
        rows = self._directory.open_segment(self._folder, self._name.rows, os.O_RDWR)
        try:
            return rows, self._directory.open_segment(self._folder, self._name.log, os.O_RDWR)
        except BaseException:
            os.close(rows)
            raise


def _write(file: int, parts: Sequence[memoryview], offset: int) -> int:
    """Writes all parts from an offset on, however often the system takes only some; the offset behind them."""
    left = [part for part in parts if part.nbytes]
    while left:
        done = os.pwritev(file, left, offset)
        if not done:
            raise OSError(errno.EIO, "nothing could be written")
        offset += done
        while left and done >= left[0].nbytes:
            done -= left.pop(0).nbytes
        if done:
            left[0] = left[0][done:]
    return offset
