"""Drop a namespace, or wipe single rows from all files of a cache directory."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence

import numpy as np

from ....errors import UsageError
from ...index import KEY_BYTES
from ..frames import ROWS
from .reports import ClearReport, ForgetReport
from .rewrite import among
from .survey import Folder, SegmentFacts, opened, standing_of, survey
from .work import Work, at_work, layout_of

__all__ = ["clear", "forget"]


def clear(path: str | os.PathLike[str], namespace: str) -> ClearReport:
    """Unlinks all rows of a namespace, with its manifest; files of somebody else in its folder stay.

    A process that still writes to it notices at its next write, and begins anew.

    Args:
        path: of the cache directory.
        namespace: the whole name.

    Raises:
        UsageError: there is no cache directory, or no such namespace.
        FormatVersionError: it was written by a newer modcache.
        OSError: it cannot be written, or somebody else is at it.
    """
    directory = opened(path)
    with at_work(directory) as work:
        found = next((folder for folder in survey(directory) if folder.namespace == namespace), None)
        if found is None:
            raise UsageError(f"There is no namespace {namespace!r} in {str(directory.path)!r}.")
        rows = standing_of(found.segments).rows
        freed = work.remove(found, found.segments)
        work.forget(found)
    place = directory.place_of(found.folder)
    left = sorted(os.listdir(place)) if place.is_dir() else []
    return ClearReport(found.namespace, rows, freed, tuple(left))


def forget(
    path: str | os.PathLike[str], keys: Sequence[bytes], *, progress: Callable[[int, int], None] | None = None
) -> ForgetReport:
    """Wipes the rows of these keys from the files, in all namespaces: what holds one is written anew without it.

    What a living writer has cannot be written anew: its rows of these keys are dropped at once, so that nobody gets
    them, and the report says what has to be wiped after that writer's end. What dead writers left uncommitted goes as
    well, because it may hold such a row.

    Args:
        path: of the cache directory.
        keys: 16 bytes each.
        progress: told how many namespaces were dealt with, and of how many.

    Raises:
        UsageError: there is no cache directory, or a key is no key.
        FormatVersionError: it was written by a newer modcache.
        OSError: it cannot be written, has no room for the new segments, or somebody else is at it.
    """
    if any(len(key) != KEY_BYTES for key in keys):
        raise UsageError(f"A key has {KEY_BYTES} bytes, which are {2 * KEY_BYTES} hexadecimal digits.")
    unwanted, directory = frozenset(keys), opened(path)
    found: set[bytes] = set()
    rows = rewritten = 0
    waiting: list[str] = []
    unreadable: list[str] = []
    with at_work(directory) as work:
        folders = survey(directory)  # under the lock: what others write anew meanwhile would be overlooked
        for number, folder in enumerate(folders):
            held = {one.title: _held(one, unwanted) for one in folder.segments}
            found.update(*held.values())
            alive = [one for one in folder.segments if one.alive and held[one.title]]
            if alive:  # first, so that no row comes back when the word that dropped it before is wiped
                _drop(work, folder, alive, sorted(set().union(*(held[one.title] for one in alive))))
            # Where a commit is damaged, nobody knows whose rows it had.
            dead = [one for one in folder.segments if not one.alive and (held[one.title] or one.behind)]
            rows += sum(_rows_of(one, unwanted) for one in dead)
            rewritten += len(dead)
            _wipe(work, folder, dead, unwanted)
            waiting += [f"{one.title}: its writer is alive" for one in alive]
            unreadable += [f"{one.title}: {one.problem}" for one in folder.segments if one.problem is not None]
            if progress is not None:
                progress(number + 1, len(folders))
    return ForgetReport(len(unwanted), len(found), rows, rewritten, tuple(waiting), tuple(unreadable))


def _drop(work: Work, folder: Folder, alive: Sequence[SegmentFacts], keys: Sequence[bytes]) -> None:
    latest = max(frame.stamp for segment in alive for frame in segment.frames)
    work.drop_keys(folder, keys, max(time.time_ns(), latest + 1))


def _wipe(work: Work, folder: Folder, segments: Sequence[SegmentFacts], unwanted: frozenset[bytes]) -> None:
    """Writes segments of dead writers anew without these keys, and reclaims what dead writers left over."""
    counts = dict(zip([one.title for one in folder.segments], standing_of(folder.segments).counts, strict=True))
    for layout in dict.fromkeys(layout_of(one) for one in segments):
        together = [one for one in segments if layout_of(one) == layout]
        if not work.has_room_for(sum(one.bytes for one in together)):
            raise OSError(
                errno.ENOSPC, "no room to write rows anew without the forgotten ones", str(work.directory.path)
            )
        work.rewrite(folder, together, counts, unwanted)
    rewritten = {one.title for one in segments}
    for one in folder.segments:
        if not one.alive and one.is_orphan:
            work.remove(folder, [one])
        elif not one.alive and one.leftover_bytes and one.title not in rewritten:
            work.cut(folder, one)


def _held(segment: SegmentFacts, unwanted: frozenset[bytes]) -> set[bytes]:
    """Which of these keys a segment says anything about."""
    told = [frame.keys for frame in segment.told]
    keys = np.frombuffer(b"".join(told), np.uint8).reshape(-1, KEY_BYTES)
    return {bytes(key) for key in keys[among(keys, unwanted)]}


def _rows_of(segment: SegmentFacts, unwanted: frozenset[bytes]) -> int:
    """How many rows of these keys a segment has."""
    told = [frame.keys for frame in segment.told if frame.kind == ROWS]
    return int(among(np.frombuffer(b"".join(told), np.uint8).reshape(-1, KEY_BYTES), unwanted).sum())
