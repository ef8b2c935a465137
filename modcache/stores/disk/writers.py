"""The segments that a process writes: few of their files are open at once, and what was committed is made to last."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import OrderedDict
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Final

from .appending import GoneError, SegmentWriter
from .frames import SegmentHeader

if TYPE_CHECKING:
    from .directory import Directory
    from .reading import Reading
    from .segment import Segment

__all__ = ["Writers"]

_OPEN: Final = 32  # segments that are open for writing at once


class Writers:
    """A writer for each segment of this process. Only the thread that writes has them.

    Args:
        directory: that the segments lie in.
    """

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._writers: OrderedDict[Segment, tuple[Reading, SegmentWriter]] = OrderedDict()

    def of(self, reading: Reading, segment: Segment) -> SegmentWriter:
        """The writer of a segment, which is made if there is none yet."""
        if segment not in self._writers:
            for closed in [other for other in self._writers if other.closed]:
                self._writers.pop(closed)[1].close()
            made = datetime.now(timezone.utc).isoformat(timespec="seconds")
            header = SegmentHeader(segment.segment, reading.namespace, segment.layout, segment.name.writer, made)
            self._writers[segment] = reading, SegmentWriter(self._directory, segment, header)
        self._writers.move_to_end(segment)
        for _, other in itertools.islice(self._writers.values(), max(0, len(self._writers) - _OPEN)):
            other.close()
        return self._writers[segment][1]

    def readings(self) -> dict[Segment, Reading]:
        """The segments, and the namespaces that they belong to."""
        return {segment: reading for segment, (reading, _) in self._writers.items()}

    def sync(self) -> None:
        """Waits until all that was committed would survive a power cut.

        Raises:
            OSError: some of it might not.
        """
        folders = set()
        for segment, (_, writer) in self._writers.items():
            if writer.dirty and not segment.closed:
                try:
                    writer.sync()
                except GoneError:  # what somebody dropped need not last
                    if not self._directory.path.is_dir():
                        raise
                folders.add(segment.folder)
        for folder in folders:
            with contextlib.suppress(OSError):
                place = os.open(self._directory.place_of(folder), os.O_RDONLY)
                try:
                    os.fsync(place)
                finally:
                    os.close(place)

    def give_up(self) -> None:
        """Ends all segments where they were committed last; what was written behind that is cut off."""
        for _, writer in self._writers.values():
            with contextlib.suppress(OSError):
                writer.sync()
            writer.cut()
        self.close()

    def close(self) -> None:
        """Closes all files, and forgets the segments."""
        for _, writer in self._writers.values():
            writer.close()
        self._writers.clear()
