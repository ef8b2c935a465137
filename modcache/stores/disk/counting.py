"""How many rows and bytes a directory has, also of namespaces that nobody asked for yet."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from .descriptors import Descriptors
from .directory import Directory
from .frames import DamageError
from .names import SegmentName
from .reading import Reading
from .room import looks_of, take_census
from .segment import read_header

__all__ = ["Count", "Counts", "count_rows"]

_A_MOMENT: Final = 1.0  # seconds for which the sizes of files are remembered


@dataclass(frozen=True, slots=True)
class Count:
    """A namespace and its rows."""

    namespace: str
    rows: int


class Counts:
    """Counts rows by reading logs, again only where a file has changed.

    Args:
        directory: that is counted.
    """

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._known: dict[str, tuple[tuple[object, ...], Count | None]] = {}
        self._weighed = -_A_MOMENT, 0

    def all(self, readings: Iterable[Reading]) -> list[Count]:
        """The rows of all namespaces, of which these readings are at hand."""
        loaded = {reading.folder: Count(reading.namespace, len(reading)) for reading in readings}
        others = [self.of(folder) for folder in self._directory.folders() if folder not in loaded]
        return [*loaded.values(), *(count for count in others if count is not None)]

    def bytes_lately(self) -> int:
        """The bytes of all files there, as they were at most a second ago."""
        now = time.monotonic()
        if now - self._weighed[0] > _A_MOMENT:
            self._weighed = now, take_census(self._directory).bytes
        return self._weighed[1]

    def of(self, folder: str) -> Count | None:
        """The rows in the folder of a namespace; None where no log tells its name."""
        looks = looks_of(self._directory.place_of(folder))
        known = self._known.get(folder)
        if known is None or known[0] != looks:
            known = self._known[folder] = looks, count_rows(self._directory, folder)
        return known[1]


def count_rows(directory: Directory, folder: str) -> Count | None:
    """The rows in the folder of a namespace; None where no log tells its name."""
    names = (_namespace_in(directory, folder, segment) for segment in directory.segments(folder))
    namespace = next((name for name in names if name is not None), None)
    if namespace is None:
        return None
    reading = Reading(directory, namespace, Descriptors(), mapped=False)
    reading.refresh()
    return Count(namespace, len(reading))


def _namespace_in(directory: Directory, folder: str, segment: SegmentName) -> str | None:
    try:
        read = read_header(directory, folder, segment)
    except (OSError, DamageError):
        return None
    return None if read is None else read[0].namespace
