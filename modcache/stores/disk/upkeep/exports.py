"""Write the rows of a namespace, with their keys, into one file that other programs read."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ....errors import UsageError
from ....rows import Layout
from ..directory import Directory
from .contents import find_namespace
from .formats import FORMATS, Part, Rows
from .leaves import leaf_names
from .reports import ExportReport
from .rewrite import Flags, chunks_of
from .survey import Folder, SegmentFacts, opened, standing_of, survey

__all__ = ["export"]


def export(
    path: str | os.PathLike[str],
    namespace: str,
    to: str | os.PathLike[str],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Writes the rows of a namespace into a ``.safetensors``, ``.npy`` or ``.parquet`` file, with their keys.

    Each row is compared with its checksum, and a damaged one is left out. The rows are never all in memory.

    Args:
        path: of the cache directory.
        namespace: its name, or the beginning of it.
        to: the file to make; its suffix says in which format.
        progress: told how many bytes of rows were written, and of how many.

    Raises:
        UsageError: there is no cache directory or namespace, the suffix is unknown, the file is there already, or
            the format cannot hold these rows.
        FormatVersionError: it was written by a newer modcache.
        OSError: a file cannot be read or written.
    """
    target = Path(to)
    write = FORMATS.get(target.suffix)
    if write is None:
        raise UsageError(f"Nothing is known of the suffix {target.suffix!r}; known are {', '.join(sorted(FORMATS))}.")
    if os.path.lexists(target):
        raise UsageError(f"{str(target)!r} is there already. Remove it, or give another name.")
    directory = opened(path)
    folders = survey(directory)
    name = find_namespace([folder.namespace for folder in folders], namespace)
    folder = next(folder for folder in folders if folder.namespace == name)
    keep = dict(zip([one.title for one in folder.segments], standing_of(folder.segments).counts, strict=True))
    wanted = sum(int(flags.sum()) for flags in keep.values())
    if not wanted:
        raise UsageError(f"The namespace {name!r} has no rows.")
    beside = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        columns = _write(directory, folder, keep, beside, write, progress)
        os.replace(beside, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
    rows = sum(int(flags.sum()) for flags in keep.values())
    return ExportReport(name, str(target), rows, target.stat().st_size, columns, wanted - rows)


class _DamagedError(Exception):
    """A row does not have its checksum, so there are fewer rows than the file was begun for."""


def _write(
    directory: Directory,
    folder: Folder,
    keep: dict[str, Flags],
    beside: Path,
    write: Callable[[Path, str, list[Part]], tuple[str, ...]],
    progress: Callable[[int, int], None] | None,
) -> tuple[str, ...]:
    """Writes the file, and a second time without the damaged rows if it finds any; takes these out of ``keep``."""
    try:
        return write(beside, folder.namespace, _parts(directory, folder, keep, progress))
    except _DamagedError:
        os.unlink(beside)
    for segment in folder.segments:
        for chunk in chunks_of(directory, folder.folder, segment, segment.frames):
            keep[segment.title][chunk.first : chunk.first + len(chunk.good)] &= chunk.good
    return write(beside, folder.namespace, _parts(directory, folder, keep, progress))


def _parts(
    directory: Directory, folder: Folder, keep: dict[str, Flags], progress: Callable[[int, int], None] | None
) -> list[Part]:
    """The rows of each layout, and how to read them."""
    by_layout: dict[Layout, list[SegmentFacts]] = {}
    for segment in folder.segments:
        if segment.header is not None and keep[segment.title].any():
            by_layout.setdefault(segment.header.layout, []).append(segment)
    total = sum(int(keep[one.title].sum()) * one.row_bytes for one in folder.segments)
    done = 0

    def read(segments: list[SegmentFacts]) -> Iterator[Rows]:
        nonlocal done
        for segment in segments:
            for chunk in chunks_of(directory, folder.folder, segment, segment.frames):
                flags = keep[segment.title][chunk.first : chunk.first + len(chunk.good)]
                if (flags & ~chunk.good).any():
                    raise _DamagedError
                yield chunk.keys[flags], np.ascontiguousarray(chunk.rows[flags])
                done += int(flags.sum()) * segment.row_bytes
                if progress is not None:
                    progress(done, total)

    return [
        Part(layout, leaf_names(layout), sum(int(keep[one.title].sum()) for one in segments), read(segments))
        for layout, segments in by_layout.items()
    ]
