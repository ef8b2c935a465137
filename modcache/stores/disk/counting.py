"""How many rows the namespaces of a directory have, also those that nobody asked for yet."""

from __future__ import annotations

from dataclasses import dataclass

from .descriptors import Descriptors
from .directory import Directory
from .frames import DamageError
from .names import SegmentName
from .reading import Reading
from .room import looks_of
from .segment import read_header

__all__ = ["Count", "Counts", "count_rows"]


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
