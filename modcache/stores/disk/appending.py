"""Append rows and commit frames to the two files of a segment: rows first, then the frame that commits them."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from ..index import KEY_BYTES
from .directory import Directory
from .frames import (
    DROPPED,
    MOST_KEYS,
    ROWS,
    ROWS_HEAD_BYTES,
    SUM_BYTES,
    Frame,
    SegmentHeader,
    pack_frame,
    pack_log_header,
    pack_rows_head,
)
from .names import ROWS_FOLDER

if TYPE_CHECKING:
    from .segment import Segment

__all__ = ["GoneError", "SegmentWriter"]


class GoneError(OSError):
    """Somebody removed or cut the files of a segment that was being written; nothing can be added to it."""


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

    def append(self, matrices: Sequence[npt.NDArray[np.uint8]], keys: bytes, sums: bytes, stamp: int) -> None:
        """Writes rows behind those that are there, and commits them.

        Args:
            matrices: the rows.
            keys: of all rows.
            sums: the checksums of all rows.
            stamp: of the commit.

        Raises:
            OSError: they were not committed; what was written of them is overwritten by the next.
        """
        rows, log = self._open()
        parts = [memoryview(matrix.reshape(-1).data) for matrix in matrices if matrix.nbytes]
        _write(rows, parts, ROWS_HEAD_BYTES + self.rows * self._row_bytes)
        for start in range(0, len(sums) // SUM_BYTES, MOST_KEYS):
            some_keys = keys[start * KEY_BYTES : (start + MOST_KEYS) * KEY_BYTES]
            some_sums = sums[start * SUM_BYTES : (start + MOST_KEYS) * SUM_BYTES]
            self._commit(log, Frame(ROWS, stamp, self.rows, some_keys, some_sums))
            self.rows += len(some_sums) // SUM_BYTES

    def drop(self, keys: bytes, stamp: int) -> None:
        """Writes down that the rows of these keys do not count any more.

        Raises:
            OSError: that is not written down.
        """
        log = self._open()[1]
        for start in range(0, len(keys), MOST_KEYS * KEY_BYTES):
            some_keys = keys[start : start + MOST_KEYS * KEY_BYTES]
            self._commit(log, Frame(DROPPED, stamp, self.rows, some_keys))

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
        sizes = [found.st_size for file in self._files if (found := os.fstat(file)).st_nlink]
        if len(sizes) < 2 or sizes[0] < ROWS_HEAD_BYTES + self.rows * self._row_bytes or sizes[1] < self._log_end:
            raise GoneError(errno.ENOENT, "somebody removed or cut a segment that was being written", self._name.log)
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
        try:
            rows = self._directory.open_segment(self._folder, self._name.rows, os.O_RDWR)
        except FileNotFoundError as error:
            raise GoneError(*error.args) from None
        try:
            return rows, self._directory.open_segment(self._folder, self._name.log, os.O_RDWR)
        except FileNotFoundError as error:
            os.close(rows)
            raise GoneError(*error.args) from None
        except BaseException:
            os.close(rows)
            raise


def _write(file: int, parts: list[memoryview], offset: int) -> int:
    """Writes all parts, one behind the other, however often the system takes only some; the offset behind them."""
    while parts:
        done = os.pwritev(file, parts[:_MOST_PARTS], offset)
        if not done:
            raise OSError(errno.EIO, "nothing could be written")
        offset, whole = offset + done, 0
        while whole < len(parts) and done >= parts[whole].nbytes:
            done -= parts[whole].nbytes
            whole += 1
        parts = parts[whole:]
        if done:
            parts[0] = parts[0][done:]
    return offset
