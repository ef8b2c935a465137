"""What a cache directory holds, for people to read: namespaces, totals, and where the bytes are."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ....errors import UsageError
from ....rows import Layout
from ...differing import differences
from .. import catalogue
from ..directory import Directory
from ..manifest import TEMPORARY
from ..names import CATALOGUE, FORMAT_FILE, MANIFEST
from .reports import LayoutFacts, Listing, NamespaceFacts, Totals, Usage
from .survey import Folder, Standing, opened, standing_of, survey

__all__ = ["du", "find_namespace", "listing", "show", "stats"]


def listing(path: str | os.PathLike[str]) -> Listing:
    """The namespaces of a cache directory, the latest used first.

    Raises:
        UsageError: there is no cache directory.
        FormatVersionError: it was written by a newer modcache.
    """
    directory = opened(path)
    folders = sorted(survey(directory), key=lambda folder: (-folder.last_used, folder.namespace))
    return Listing(str(directory.path), tuple(_facts(folder, folders) for folder in folders))


def show(path: str | os.PathLike[str], namespace: str) -> NamespaceFacts:
    """One namespace, by its name or the beginning of it.

    Raises:
        UsageError: there is no cache directory, or not one namespace that begins so.
        FormatVersionError: it was written by a newer modcache.
    """
    found = listing(path)
    name = find_namespace([facts.namespace for facts in found.namespaces], namespace)
    return next(facts for facts in found.namespaces if facts.namespace == name)


def find_namespace(names: Sequence[str], beginning: str) -> str:
    """The one name that begins so, or is so.

    Raises:
        UsageError: there is none, or more than one.
    """
    if beginning in names:
        return beginning
    found = [name for name in names if beginning and name.startswith(beginning)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise NoNamespaceError(f"No namespace begins with {beginning!r}.")
    raise UsageError(f"{len(found)} namespaces begin with {beginning!r}: {', '.join(found[:5])}. Give more of it.")


class NoNamespaceError(UsageError):
    """Nothing has such a name."""


def stats(path: str | os.PathLike[str]) -> Totals:
    """A cache directory as a whole.

    Raises:
        UsageError: there is no cache directory.
        FormatVersionError: it was written by a newer modcache.
    """
    directory = opened(path)
    found = listing(path).namespaces
    return Totals(
        directory=str(directory.path),
        format=directory.format(),
        namespaces=len(found),
        rows=sum(facts.rows for facts in found),
        bytes=sum(facts.bytes for facts in found),
        dead_bytes=sum(facts.dead_bytes for facts in found),
        leftover_bytes=sum(facts.leftover_bytes for facts in found),
        segments=sum(facts.segments for facts in found),
        damaged=sum(facts.damaged for facts in found),
        writers=sum(directory.is_alive(writer) for writer in directory.writers()),
        last_used=max((facts.last_used for facts in found), default=None),
        free_bytes=shutil.disk_usage(directory.path).free,
    )


def du(path: str | os.PathLike[str]) -> Usage:
    """Where the bytes of a cache directory are.

    Raises:
        UsageError: there is no cache directory.
        FormatVersionError: it was written by a newer modcache.
    """
    directory = opened(path)
    folders = survey(directory)
    segments = [segment for folder in folders for segment in folder.segments]
    standing = [(folder, standing_of(folder.segments)) for folder in folders]
    alive, dead = sum(_alive(*pair) for pair in standing), sum(_dead(*pair) for pair in standing)
    leftover = sum(segment.leftover_bytes for segment in segments)
    damaged = sum(segment.bytes for segment in segments if segment.problem is not None)
    in_segments = sum(segment.bytes for segment in segments)
    files = list(_files(directory.path))
    ours = {folder.folder: _ours(directory, folder) for folder in folders}
    known = [found for parts, found in files if _is_ours(parts, ours)]
    strange = sum(found.st_size for parts, found in files if not _is_ours(parts, ours))
    return Usage(
        directory=str(directory.path),
        namespaces={folder.namespace: folder.bytes for folder in folders},
        rows_bytes=alive,
        dead_bytes=dead,
        leftover_bytes=leftover,
        log_bytes=in_segments - alive - dead - leftover - damaged,
        damaged_bytes=damaged,
        other_bytes=sum(found.st_size for found in known) - in_segments,
        strange_bytes=strange,
        total_bytes=sum(found.st_size for _, found in files),
        allocated_bytes=sum(getattr(found, "st_blocks", 0) * 512 for _, found in files),
    )


def _facts(folder: Folder, folders: Sequence[Folder]) -> NamespaceFacts:
    standing = standing_of(folder.segments)
    manifest = folder.manifest or {}
    cls = manifest.get("class")
    return NamespaceFacts(
        namespace=folder.namespace,
        folder=folder.folder,
        cls=cls if isinstance(cls, str) else None,
        rows=standing.rows,
        bytes=folder.bytes,
        dead_bytes=_dead(folder, standing),
        leftover_bytes=sum(segment.leftover_bytes for segment in folder.segments),
        last_used=folder.last_used,
        segments=len(folder.segments),
        writers=len({segment.name.writer for segment in folder.segments if segment.alive}),
        damaged=sum(segment.damage is not None for segment in folder.segments),
        layouts=_layouts(folder, standing),
        differs=_differs(folder, folders),
        manifest=folder.manifest,
    )


def _differs(folder: Folder, folders: Sequence[Folder]) -> tuple[str, ...] | None:
    """What is other than in the latest used namespace of the same class; None where there is no other one."""
    mine = folder.manifest
    if mine is None:
        return None
    others = (other.manifest for other in folders if other is not folder and other.manifest is not None)
    theirs = next((manifest for manifest in others if manifest.get("class") == mine.get("class")), None)
    return None if theirs is None else differences(mine, theirs)


def _layouts(folder: Folder, standing: Standing) -> tuple[LayoutFacts, ...]:
    found: dict[Layout, list[int]] = {}
    for segment, flags in zip(folder.segments, standing.counts, strict=True):
        if segment.header is not None:
            counted = found.setdefault(segment.header.layout, [0, 0])
            counted[0] += int(flags.sum())
            counted[1] += 1
    return tuple(
        LayoutFacts(
            tuple((str(dtype).removeprefix("torch."), shape) for dtype, shape in layout.leaves),
            rows,
            layout.row_bytes,
            segments,
        )
        for layout, (rows, segments) in found.items()
    )


def _alive(folder: Folder, standing: Standing) -> int:
    return sum(
        int(flags.sum()) * segment.row_bytes for segment, flags in zip(folder.segments, standing.counts, strict=True)
    )


def _dead(folder: Folder, standing: Standing) -> int:
    return sum(
        int((~flags).sum()) * segment.row_bytes for segment, flags in zip(folder.segments, standing.counts, strict=True)
    )


# --- files ----------------------------------------------------------------------------------------------

_TRACE = re.compile(r"[0-9a-f]{16}|admission|upkeep")
_FORMAT_FILES = re.compile(rf"{re.escape(FORMAT_FILE)}(\.[0-9a-f]{{16}})?")
_OF_CATALOGUE = {catalogue.FILE, catalogue.MARK, *catalogue.BESIDE}


def _files(place: Path, parts: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], os.stat_result]]:
    """The regular files below a place, without following a link."""
    try:
        names = sorted(os.listdir(place.joinpath(*parts)))
    except OSError:
        return
    for name in names:
        here = (*parts, name)
        try:
            found = os.lstat(place.joinpath(*here))
        except OSError:
            continue
        if stat.S_ISDIR(found.st_mode):
            yield from _files(place, here)
        elif stat.S_ISREG(found.st_mode):
            yield here, found


def _ours(directory: Directory, folder: Folder) -> frozenset[str]:
    """The names of the files of its segments."""
    known = {segment.name for segment in folder.segments}
    return frozenset(file for file, name in directory.names_in(folder.folder).items() if name in known)


def _is_ours(parts: tuple[str, ...], segments: Mapping[str, object]) -> bool:
    match parts:
        case (name,):
            return _FORMAT_FILES.fullmatch(name) is not None
        case ("writers", name):
            return _TRACE.fullmatch(name) is not None
        case (folder, name) if folder == CATALOGUE:
            return name in _OF_CATALOGUE
        case ("rows", folder, name):
            names = segments.get(folder, ())
            return name == MANIFEST or name in names or TEMPORARY.fullmatch(name) is not None  # type: ignore[operator]
    return False
