"""The readings of a store, one for each namespace: read anew after an interrupt in the middle of a change."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from .reading import Reading

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .descriptors import Descriptors
    from .directory import Directory

__all__ = ["Readings"]


class Readings:
    """What is known of the namespaces of a directory. Not safe in threads.

    Args:
        directory: that they lie in.
        descriptors: of open files.
        mapped: whether small rows are mapped.
    """

    def __init__(self, directory: Directory, descriptors: Descriptors, *, mapped: bool) -> None:
        self._directory, self._descriptors, self._mapped = directory, descriptors, mapped
        self._by_name: dict[str, Reading] = {}
        self._left: list[Reading] = []  # of which something may wait to be written

    def of(self, namespace: str) -> Reading:
        """The reading of a namespace, which is begun if there is none."""
        reading = self._by_name.get(namespace)
        if reading is None:
            reading = Reading(self._directory, namespace, self._descriptors, mapped=self._mapped)
            reading.refresh()
            self._by_name[namespace] = reading
        return reading

    @contextlib.contextmanager
    def using(self, namespace: str) -> Iterator[Reading]:
        """The reading of a namespace for the time of the block; an exception in it leaves nothing half-changed."""
        reading = self.of(namespace)
        try:
            yield reading
        except BaseException:
            self.leave(reading)
            raise

    def leave(self, reading: Reading) -> None:
        """Forgets a reading that may be half-changed; what waits in its segments is still written."""
        self._by_name.pop(reading.namespace, None)
        reading.leave()
        self._left = [left for left in [*self._left, reading] if left.waits]

    def hide(self, reading: Reading, stamp: int) -> int:
        """Drops all rows of a namespace that were put until now; how many there were."""
        for left in self._left:
            if left.namespace == reading.namespace:
                left.end_segments()
        return reading.hide(stamp)

    def refreshed(self) -> list[Reading]:
        """All that there are, after a look at what others did."""
        for namespace in list(self._by_name):
            with self.using(namespace) as reading:
                reading.refresh()
        return list(self._by_name.values())

    def close(self) -> None:
        """Closes all files."""
        for reading in self._by_name.values():
            reading.close()
        self._by_name, self._left = {}, []
        self._descriptors.close()
