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
from .names import ROWS_FOLDER, Directory
from .records import sums_of

if TYPE_CHECKING:
    from .segment import Segment

__all__ = ["GoneError", "SegmentWriter"]


class GoneError(OSError):
    """Somebody removed or cut the files of a segment that was being written; nothing can be added to it."""


_PART: Final = 1 << 19  # bytes that are written at once


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

    def append(self, matrices: Sequence[tuple[npt.NDArray[np.uint8], bytes]], keys: bytes, stamp: int) -> bytes:
        """Writes rows behind those that are there, and commits them; the checksum of each, joined.

        Args:
            matrices: the rows, and their checksums or nothing.
            keys: of all rows.
            stamp: of the commit.

        Raises:
            OSError: they were not committed; what was written of them is overwritten by the next.
        """
        rows, log = self._open()
        offset, sums = ROWS_HEAD_BYTES + self.rows * self._row_bytes, []
        some = max(1, _PART // max(1, self._row_bytes))
        for matrix, known in matrices:
            sums.append(known)
            for start in range(0, len(matrix), some):
                part = matrix[start : start + some]
                if not known:  # now, because what was just summed up is still in the cache when it is written
                    sums.append(sums_of(part))
                offset = _write(rows, memoryview(part.reshape(-1).data), offset)
        joined = b"".join(sums)
        for start in range(0, len(joined) // SUM_BYTES, MOST_KEYS):
            some_keys = keys[start * KEY_BYTES : (start + MOST_KEYS) * KEY_BYTES]
            some_sums = joined[start * SUM_BYTES : (start + MOST_KEYS) * SUM_BYTES]
            self._commit(log, Frame(ROWS, stamp, self.rows, some_keys, some_sums))
            self.rows += len(some_sums) // SUM_BYTES
        return joined

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
        self._log_end = _write(log, memoryview(pack_frame(frame, self._segment, self._log_end)), self._log_end)

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
            _write(rows, memoryview(pack_rows_head(self._segment)), 0)
            # The log comes second: where there is one, there are rows.
            log = self._directory.open_segment(self._folder, self._name.log, flags)
        except BaseException:
            os.close(rows)
            raise
        try:
            self._log_end = _write(log, memoryview(self._header), 0)
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


def _write(file: int, data: memoryview, offset: int) -> int:
    """Writes all of the data at an offset, however often the system takes only some; the offset behind it."""
    while data.nbytes:
        done = os.pwrite(file, data, offset)
        if not done:
            raise OSError(errno.EIO, "nothing could be written")
        offset, data = offset + done, data[done:]
    return offset
