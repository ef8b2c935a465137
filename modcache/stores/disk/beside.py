"""What is written beside the rows: manifests, and when a namespace was used, each where there is room for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from .forks import undisturbed
from .manifest import manifest_growth, merged, read_manifest, write_manifest
from .names import ROWS_FOLDER

if TYPE_CHECKING:
    from .admission import Kind
    from .catalogue import Catalogue
    from .directory import Directory
    from .tasks import Facts, Use

__all__ = ["Beside"]


class Beside:
    """Writes manifests and notes of use; where there is no room for one it is not worth a word, nor a row.

    Args:
        directory: that is written to.
        catalogue: of the directory.
        fits: whether there is room for so many bytes of a kind.
    """

    def __init__(self, directory: Directory, catalogue: Catalogue, fits: Callable[[int, Kind], bool]) -> None:
        self._directory, self._catalogue, self._fits = directory, catalogue, fits
        self._undescribed: dict[str, Facts] = {}  # by folder; no more than the store has in memory in any case

    def describe(self, task: Facts) -> None:
        """Writes a manifest, now or as soon as there was room for rows of its namespace.

        Raises:
            OSError: it cannot be written.
        """
        place = self._directory.place_of(task.folder)
        facts = merged(read_manifest(place), task.facts)
        growth = manifest_growth(place, facts)
        if growth > 0 and not self._fits(growth, "manifest"):
            self._undescribed[task.folder] = task
            return
        self._directory.make_folder((ROWS_FOLDER, task.folder))
        write_manifest(place, facts)
        self._undescribed.pop(task.folder, None)

    def describe_late(self, folder: str) -> None:
        """Rows of a namespace were written: there may be room for its manifest.

        Raises:
            OSError: it cannot be written.
        """
        task = self._undescribed.get(folder)
        if task is not None:
            self.describe(task)

    def note_use(self, use: Use) -> None:
        """Notes that a namespace was used."""
        with undisturbed, contextlib.suppress(OSError):
            self._catalogue.note(use.namespace, use.entry, lambda size: self._fits(size, "note"))
