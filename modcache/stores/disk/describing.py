"""What is described of the namespaces of a directory: in their manifests, and by this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .manifest import merged, read_manifest
from .names import folder_of

if TYPE_CHECKING:
    from .directory import Directory

__all__ = ["Descriptions"]


class Descriptions:
    """Facts of namespaces, of which this process's own count before they are written.

    Args:
        directory: whose manifests are read.
    """

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._own: dict[str, dict[str, Any]] = {}

    def add(self, namespace: str, facts: Mapping[str, Any]) -> dict[str, Any]:
        """All that this process said of a namespace, these facts included."""
        known = merged(self._own.get(namespace), {"namespace": namespace, **facts})
        self._own[namespace] = known
        return known

    def of(self, namespace: str) -> dict[str, Any] | None:
        """What was described of a namespace, by any process."""
        known = self._own.get(namespace)
        found = read_manifest(self._directory.place_of(folder_of(namespace)))
        return found if known is None else merged(found, known)

    def all(self) -> dict[str, dict[str, Any]]:
        """All manifests, by namespace."""
        found = {}
        for folder in self._directory.folders():
            facts = read_manifest(self._directory.place_of(folder))
            name = None if facts is None else facts.get("namespace")
            if facts is not None and isinstance(name, str) and folder_of(name) == folder:
                found[name] = facts
        for name, known in list(self._own.items()):
            found[name] = merged(found.get(name), known)
        return found
