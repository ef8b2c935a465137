"""Reclaim what nobody can use any more, and keep a cache directory within limits."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from ....errors import UsageError
from ....rows import Layout
from ...index import KEY_BYTES
from ..directory import Directory
from ..frames import ROWS_HEAD_BYTES
from ..manifest import TEMPORARY
from ..names import FORMAT_FILE, folder_of
from .reports import GcReport
from .rewrite import Flags
from .survey import Folder, SegmentFacts, entries_of, opened, standing_of, survey
from .work import Work, at_work, drops_to_keep

__all__ = ["Compaction", "Plan", "gc", "plan_gc"]

_DEAD_SHARE: Final = 0.25  # of the rows of a segment that are worth copying the rest
_SMALL: Final = 16 << 20
_MANY: Final = 8  # small segments that are worth being one
_HOUR: Final = 3600.0
_HALF_WRITTEN: Final = re.compile(rf"{re.escape(FORMAT_FILE)}\.[0-9a-f]{{16}}")


@dataclass(frozen=True, slots=True)
class Compaction:
    """Segments of one layout that are written anew together.

    Args:
        segments: of dead writers.
        keep: which rows of each are worth it.
    """

    segments: tuple[SegmentFacts, ...]
    keep: tuple[Flags, ...]

    @property
    def new_bytes(self) -> int:
        """About what the new segments take."""
        rows = sum(
            int(flags.sum()) * segment.row_bytes for segment, flags in zip(self.segments, self.keep, strict=True)
        )
        return ROWS_HEAD_BYTES + rows + sum(segment.log_end for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Plan:
    """What would be done with one namespace.

    Args:
        folder: the namespace.
        tails: segments to cut.
        orphans: segments to unlink.
        compactions: segments to write anew.
        drop: all of it goes, for a limit.
        in_use: all of it would have to go, but somebody writes to it.
    """

    folder: Folder
    tails: tuple[SegmentFacts, ...] = ()
    orphans: tuple[SegmentFacts, ...] = ()
    compactions: tuple[Compaction, ...] = ()
    drop: bool = False
    in_use: bool = False

    @property
    def bytes_after(self) -> int:
        """About what it takes afterwards."""
        if self.drop:
            return 0
        freed = sum(segment.leftover_bytes for segment in self.tails) + sum(one.bytes for one in self.orphans)
        for compaction in self.compactions:
            freed += sum(segment.bytes for segment in compaction.segments) - compaction.new_bytes
        return self.folder.bytes - freed


def gc(
    path: str | os.PathLike[str],
    *,
    max_bytes: int | None = None,
    older_than: float | None = None,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> GcReport:
    """Reclaims what dead writers left uncommitted, writes segments anew that hold many dead rows, keeps limits.

    Nothing of a living writer is touched. For the limits whole namespaces go, the longest unused first.

    Args:
        path: of the cache directory.
        max_bytes: what the segments may take on disk.
        older_than: seconds; a namespace that was not used for so long goes.
        dry_run: only tell what would be done.
        progress: told how many namespaces were dealt with, and of how many.

    Raises:
        UsageError: there is no cache directory or a limit cannot be right.
        FormatVersionError: it was written by a newer modcache.
        OSError: it cannot be read or written, or somebody else is at it.
    """
    for name, limit in (("max_bytes", max_bytes), ("older_than", older_than)):
        if limit is not None and not limit >= 0:
            raise UsageError(f"{name} is a limit of 0 or more; found {limit!r}")
    directory = opened(path)
    waiting: list[str] = []
    # What is planned on must not change: others who reclaim have done so by then, or are kept out.
    with contextlib.nullcontext() if dry_run else at_work(directory) as work:
        folders = survey(directory)
        plans = plan_gc(folders, time.time(), max_bytes, older_than)
        before = after = sum(folder.bytes for folder in folders)
        if work is None:
            after = sum(plan.bytes_after for plan in plans)
        else:
            for number, plan in enumerate(plans):
                waiting += _carry_out(work, plan)
                if progress is not None:
                    progress(number + 1, len(plans))
            _sweep(work, folders)
            after = sum(folder.bytes for folder in survey(directory))
    return GcReport(
        directory=str(directory.path),
        dry_run=dry_run,
        bytes_before=before,
        bytes_after=after,
        tails=sum(len(plan.tails) for plan in plans),
        orphans=sum(len(plan.orphans) for plan in plans),
        compacted=sum(len(compaction.segments) for plan in plans for compaction in plan.compactions) - len(waiting),
        dropped=tuple(plan.folder.namespace for plan in plans if plan.drop),
        in_use=tuple(plan.folder.namespace for plan in plans if plan.in_use),
        waiting=tuple(waiting),
    )


# --- deciding -------------------------------------------------------------------------------------------


def plan_gc(folders: Sequence[Folder], now: float, max_bytes: int | None, older_than: float | None) -> list[Plan]:
    """What to do with each namespace."""
    plans = [_plan(folder) for folder in folders]
    unwanted = {
        plan.folder.folder for plan in plans if older_than is not None and now - plan.folder.last_used > older_than
    }
    if max_bytes is not None:
        left = sum(plan.bytes_after for plan in plans if plan.folder.folder not in unwanted or _in_use(plan.folder))
        for plan in sorted(plans, key=lambda plan: plan.folder.last_used):
            if left <= max_bytes:
                break
            if plan.folder.folder not in unwanted and plan.folder.bytes:
                unwanted.add(plan.folder.folder)
                left -= 0 if _in_use(plan.folder) else plan.bytes_after
    return [_dropped(plan) if plan.folder.folder in unwanted else plan for plan in plans]


def _dropped(plan: Plan) -> Plan:
    if _in_use(plan.folder):
        return Plan(plan.folder, plan.tails, plan.orphans, plan.compactions, in_use=True)
    return Plan(plan.folder, drop=True)


def _in_use(folder: Folder) -> bool:
    return any(segment.alive for segment in folder.segments)


def _plan(folder: Folder) -> Plan:
    dead = [segment for segment in folder.segments if not segment.alive]
    whole = [segment for segment in dead if segment.header is not None and segment.damage is None]
    counts = dict(zip([one.title for one in folder.segments], standing_of(folder.segments).counts, strict=True))
    compactions = _compactions(folder.segments, whole, counts)
    rewritten = {segment.title for compaction in compactions for segment in compaction.segments}
    return Plan(
        folder,
        tails=tuple(one for one in whole if one.leftover_bytes and one.title not in rewritten),
        orphans=tuple(segment for segment in dead if segment.is_orphan),
        compactions=compactions,
    )


def _compactions(
    known: Sequence[SegmentFacts], segments: Iterable[SegmentFacts], counts: dict[str, Flags]
) -> tuple[Compaction, ...]:
    by_layout: dict[Layout, list[SegmentFacts]] = {}
    for segment in segments:
        assert segment.header is not None, segment
        by_layout.setdefault(segment.header.layout, []).append(segment)
    found = []
    for together in by_layout.values():
        small = [segment for segment in together if segment.rows_bytes < _SMALL]
        worth = {segment.title for segment in small} if len(small) >= _MANY else set()
        worth |= {segment.title for segment in together if _is_mostly_dead(known, segment, counts[segment.title])}
        chosen = tuple(segment for segment in together if segment.title in worth)
        if chosen:
            found.append(Compaction(chosen, tuple(counts[segment.title] for segment in chosen)))
    return tuple(found)


def _is_mostly_dead(known: Sequence[SegmentFacts], segment: SegmentFacts, counts: Flags) -> bool:
    """Whether much would be gained by copying the rest."""
    if len(counts):
        return int((~counts).sum()) >= max(1, _DEAD_SHARE * len(counts))
    said = sum(frame.count for frame in segment.frames)
    return not said or sum(len(keys) for _, keys in drops_to_keep(known, [segment])) < said * KEY_BYTES


# --- doing ----------------------------------------------------------------------------------------------


def _carry_out(work: Work, plan: Plan) -> list[str]:
    """Does what was decided; what had to be left, one text for each segment."""
    folder, waiting = plan.folder, []
    if plan.drop:
        work.remove(folder, folder.segments)
        work.forget(folder)
        return []
    for segment in plan.tails:
        work.cut(folder, segment)
    work.remove(folder, plan.orphans)
    for compaction in plan.compactions:
        if work.has_room_for(compaction.new_bytes):
            keep = {one.title: flags for one, flags in zip(compaction.segments, compaction.keep, strict=True)}
            work.rewrite(folder, compaction.segments, keep)
        else:
            waiting += [f"{one.title}: no room to write it anew" for one in compaction.segments]
    return waiting


def _sweep(work: Work, folders: Sequence[Folder]) -> None:
    """Removes traces of dead writers, what they left half written, and folders in which nothing is left."""
    directory = work.directory
    for writer in directory.writers():
        if not directory.is_alive(writer):
            directory.forget_writer(writer)
    _remove_old(directory, (), _HALF_WRITTEN)
    for folder in folders:
        _remove_old(directory, ("rows", folder.folder), TEMPORARY)
        if not directory.segments(folder.folder) and _age(directory, folder.folder) > _HOUR:
            work.forget(folder)
    there = {folder_of(name): name for name in work.catalogue.entries()}
    for name in {name for folder, name in there.items() if folder not in directory.folders()}:
        work.catalogue.forget(name)
    if work.catalogue.damaged:
        work.catalogue.rebuild(entries_of(survey(directory)))


def _remove_old(directory: Directory, parts: tuple[str, ...], pattern: re.Pattern[str]) -> None:
    """Unlinks files of ours that somebody began an hour ago and never renamed."""
    place = directory.path.joinpath(*parts)
    for name in os.listdir(place) if place.is_dir() else ():
        if pattern.fullmatch(name):
            with directory.opened(parts, name) as file:
                old = time.time() - os.fstat(file).st_mtime > _HOUR
            if old:
                os.unlink(place / name)


def _age(directory: Directory, folder: str) -> float:
    try:
        return time.time() - os.lstat(directory.place_of(folder)).st_mtime
    except OSError:
        return 0.0
