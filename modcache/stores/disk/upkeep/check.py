"""Read every byte of a cache directory, and mend what can be mended."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..directory import Directory
from .reports import Damage, VerifyReport
from .rewrite import Flags, chunks_of
from .strange import is_there, strange_files
from .survey import Folder, SegmentFacts, opened, survey
from .work import Work, at_work

__all__ = ["verify"]


@dataclass(frozen=True, slots=True)
class _Checked:
    """A segment after each of its rows was read."""

    segment: SegmentFacts
    good: Flags

    @property
    def what(self) -> str | None:
        bad = int((~self.good).sum())
        told = [self.segment.damage] if self.segment.damage is not None else []
        return "; ".join(told + [f"{bad} rows do not have their checksum"] * bool(bad)) or None


def verify(
    path: str | os.PathLike[str], *, repair: bool = False, progress: Callable[[int, int], None] | None = None
) -> VerifyReport:
    """Compares every committed row of every segment with its checksum, and every head and commit with its own.

    A damaged row is a miss for every reader anyway. Repairing puts a whole segment in the place of a damaged one
    of a writer that is dead, with all that can be read of it, and unlinks what nothing can be read of. What a
    living writer has is left for later, and files that do not begin as ours do are left alone.

    Args:
        path: of the cache directory.
        repair: mend it.
        progress: told how many bytes were read, and of how many.

    Raises:
        UsageError: there is no cache directory.
        FormatVersionError: it was written by a newer modcache.
        OSError: it cannot be read, or with ``repair`` not be written, or somebody else is at it.
    """
    directory = opened(path)
    folders = survey(directory)
    total = sum(segment.committed * segment.row_bytes for folder in folders for segment in folder.segments)
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    checked = [
        (folder, [_check(directory, folder, segment, more) for segment in folder.segments]) for folder in folders
    ]
    broken = [folder.folder for folder, found in checked if any(one.what is not None for one in found)]
    mended: set[tuple[str, str]] = set()
    if repair and broken:
        with at_work(directory) as work:
            # Looked at again: somebody else may have mended or moved it until the lock was had.
            checked = [(folder, found) for folder, found in checked if folder.folder not in broken]
            for folder in survey(directory, broken):
                found = [_check(directory, folder, segment, lambda _: None) for segment in folder.segments]
                checked.append((folder, found))
                mended |= {(folder.folder, title) for title in _repair(work, folder, found)}
    return VerifyReport(
        directory=str(directory.path),
        segments=sum(len(found) for _, found in checked),
        rows=sum(len(one.good) for _, found in checked for one in found),
        bytes=sum(len(one.good) * one.segment.row_bytes for _, found in checked for one in found),
        damages=tuple(
            Damage(
                namespace=folder.namespace,
                segment=one.segment.title,
                what=one.what,
                rows=int((~one.good).sum()) + sum(len(frame.sums) // 8 for frame in one.segment.behind),
                repaired=(folder.folder, one.segment.title) in mended,
            )
            for folder, found in checked
            for one in found
            if one.what is not None
        ),
        leftover_bytes=sum(one.segment.leftover_bytes for _, found in checked for one in found),
        left=tuple(
            f"rows/{folder.folder}/{name}" for folder, _ in checked for name in strange_files(directory, folder.folder)
        ),
    )


def _check(directory: Directory, folder: Folder, segment: SegmentFacts, more: Callable[[int], None]) -> _Checked:
    good = np.ones(segment.committed, np.bool_)
    with contextlib.suppress(FileNotFoundError):  # somebody dropped it meanwhile, so nobody is served from it
        for chunk in chunks_of(directory, folder.folder, segment, segment.frames, more):
            good[chunk.first : chunk.first + len(chunk.good)] = chunk.good
    return _Checked(segment, good)


def _repair(work: Work, folder: Folder, found: list[_Checked]) -> list[str]:
    """Mends the segments of a namespace that may be touched; their titles."""
    mended = []
    for one in found:
        segment = one.segment
        if one.what is None or segment.alive:
            continue
        if segment.problem is None:
            # Also rows that were overwritten: the later one may be what is damaged.
            work.rewrite(folder, [segment], {segment.title: one.good}, all_drops=True)
        else:
            work.remove(folder, [segment])
            if is_there(work.directory, folder.folder, segment.name):
                continue  # not ours
        mended.append(segment.title)
    return mended
