"""How much may still be written: what a cache directory holds, what may go, and what others reserved."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from .catalogue import FIRST_BYTES, MORE_BYTES
from .directory import Directory
from .names import CATALOGUE

__all__ = [
    "IN_USE",
    "Census",
    "Usage",
    "floor_of",
    "grant",
    "kept_for_notes",
    "looks_of",
    "reserved",
    "take_census",
    "to_drop",
]

_LARGEST_FLOOR: Final = 1 << 30
_ENOUGH_FOR_NOTES: Final = 1 << 20  # a smaller bound is used up by rows
_FLOOR_SHARE: Final = 20
IN_USE: Final = 3600.0
"""Seconds for which what was used is not dropped."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a namespace takes, and when it was used last by anybody.

    Args:
        folder: of the namespace.
        bytes: of its files.
        last_used: seconds since the epoch.
    """

    folder: str
    bytes: int
    last_used: float


@dataclass(slots=True)
class Census:
    """The bytes in a cache directory.

    Args:
        bytes: of all files there.
        catalogue: of these, the bytes of the catalogue.
        folders: the usage of each namespace, as far as its files tell.
        writers: the bytes of the segments of each writer.
    """

    bytes: int = 0
    catalogue: int = 0
    folders: dict[str, Usage] = field(default_factory=dict)
    writers: dict[str, int] = field(default_factory=dict)


def take_census(directory: Directory) -> Census:
    """Counts what lies in a cache directory; what vanishes meanwhile is not there."""
    census = Census()
    for folder in directory.folders():
        names, total, latest = directory.names_in(folder), 0, 0.0
        for name, found in _files_in(directory.place_of(folder)):
            total += found.st_size
            latest = max(latest, found.st_mtime)
            if name in names:
                writer = names[name].writer
                census.writers[writer] = census.writers.get(writer, 0) + found.st_size
        census.folders[folder] = Usage(folder, total, latest)
        census.bytes += total
    census.catalogue = sum(found.st_size for _, found in _files_in(directory.path / CATALOGUE))
    census.bytes += census.catalogue
    return census


def to_drop(usages: Iterable[Usage], needed: int, now: float, spared: frozenset[str]) -> list[str]:
    """The folders to drop for so many bytes, the longest unused first; none that anybody used within the hour.

    >>> old, older = Usage("old", 10, 2000.0), Usage("older", 10, 1000.0)
    >>> to_drop([old, older, Usage("new", 10, 9000.0)], 15, 10_000.0, frozenset())
    ['older', 'old']
    """
    unused = (
        usage for usage in usages if usage.folder not in spared and usage.bytes and now - usage.last_used > IN_USE
    )
    dropped: list[str] = []
    for usage in sorted(unused, key=lambda usage: usage.last_used):
        if needed <= 0:
            break
        dropped.append(usage.folder)
        needed -= usage.bytes
    return dropped


def reserved(written: Mapping[str, int], caps: Mapping[str, int]) -> int:
    """The bytes that live writers may still write without asking, by how far each may go in all.

    >>> reserved({"a": 10, "b": 30}, {"a": 25, "b": 30, "c": 5})
    20
    """
    return sum(max(0, cap - written.get(writer, 0)) for writer, cap in caps.items())


def grant(left: int, wanted: int, writers: int) -> int:
    """How much a writer may write without asking again, of what is left for all; 0 if it does not fit.

    >>> grant(100, 10, 2), grant(100, 60, 2), grant(100, 101, 2)
    (25, 60, 0)
    """
    if wanted > left:
        return 0
    return max(wanted, left // (2 * max(1, writers)))


def kept_for_notes(max_bytes: int, catalogue_bytes: int) -> int:
    """The bytes that are left for the catalogue to grow: who has no note may be taken for unused.

    >>> kept_for_notes(1 << 30, 0), kept_for_notes(1 << 30, 1 << 20), kept_for_notes(100_000, 0)
    (33792, 8192, 0)
    """
    return max(MORE_BYTES, FIRST_BYTES + MORE_BYTES - catalogue_bytes) if max_bytes >= _ENOUGH_FOR_NOTES else 0


def floor_of(file_system_bytes: int) -> int:
    """The bytes that stay free when nothing else was asked for: the smaller of 1 GiB and 5 %."""
    return min(_LARGEST_FLOOR, file_system_bytes // _FLOOR_SHARE)


def looks_of(place: os.PathLike[str]) -> tuple[object, ...]:
    """What the files of a folder look like from outside; it moves when one of them does."""
    return tuple(sorted((name, found.st_size, found.st_mtime_ns) for name, found in _files_in(place)))


def _files_in(place: os.PathLike[str]) -> list[tuple[str, os.stat_result]]:
    found = []
    try:
        with os.scandir(place) as entries:
            for entry in entries:
                facts = _facts_of(entry)
                if facts is not None and stat.S_ISREG(facts.st_mode):
                    found.append((entry.name, facts))
    except OSError:
        return found
    return found


def _facts_of(entry: os.DirEntry[str]) -> os.stat_result | None:
    try:
        return entry.stat(follow_symlinks=False)
    except OSError:
        return None
