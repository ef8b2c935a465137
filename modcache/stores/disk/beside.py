"""What is written beside the rows: manifests, and when a namespace was used, each where there is room for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .forks import undisturbed
from .manifest import manifest_bytes, merged, read_manifest, write_manifest
from .names import ROWS_FOLDER

if TYPE_CHECKING:
    from .catalogue import Catalogue
    from .directory import Directory
    from .tasks import Facts, Use

__all__ = ["Beside"]


class Beside:
    """Writes manifests and notes of use; where there is no room for one it is not worth a word.

    Args:
        directory: that is written to.
        catalogue: of the directory.
        refusal: why so many bytes may not be written for the namespace of a folder, or None.
    """

    def __init__(self, directory: Directory, catalogue: Catalogue, refusal: Callable[[int, str], str | None]) -> None:
        self._directory, self._catalogue, self._refusal = directory, catalogue, refusal
        self._undescribed: dict[str, Facts] = {}  # by folder

    def describe(self, task: Facts) -> None:
        """Writes a manifest, now or as soon as there was room for rows of its namespace.

        Raises:
            OSError: it cannot be written.
        """
        place = self._directory.place_of(task.folder)
        facts = merged(read_manifest(place), task.facts)
        if self._refusal(manifest_bytes(facts), task.folder) is not None:
            self._undescribed[task.folder] = task
            return
        self._directory.make_folder((ROWS_FOLDER, task.folder))
        write_manifest(place, facts)

    def describe_late(self, folder: str) -> None:
        """Rows of a namespace were written: there may be room for its manifest.

        Raises:
            OSError: it cannot be written.
        """
        task = self._undescribed.pop(folder, None)
        if task is not None:
            self.describe(task)

    def note_use(self, use: Use) -> None:
        """Notes that a namespace was used."""
        with undisturbed:
            growth = self._catalogue.growth(use.namespace)
        if not growth or self._refusal(growth, use.folder) is None:
            with undisturbed:
                self._catalogue.note(use.namespace, use.entry)
