"""What upkeep found and did: frozen, plain facts, each of which is a dictionary for JSON as well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = [
    "ClearReport",
    "Damage",
    "ExportReport",
    "ForgetReport",
    "GcReport",
    "LayoutFacts",
    "Listing",
    "NamespaceFacts",
    "Report",
    "Totals",
    "Usage",
    "VerifyReport",
]


class Report:
    """A frozen dataclass of plain values."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON has it; what is called ``cls`` here is called ``class`` there."""
        return asdict(self, dict_factory=_plain)  # type: ignore[call-overload, no-any-return]  # each is a dataclass


def _plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {"class" if name == "cls" else name: value for name, value in pairs}


@dataclass(frozen=True, slots=True)
class LayoutFacts(Report):
    """The rows of one layout.

    Args:
        leaves: dtype and shape of each tensor of a row.
        rows: that can be got.
        row_bytes: of one of them.
        segments: that hold rows of this layout.
    """

    leaves: tuple[tuple[str, tuple[int, ...]], ...]
    rows: int
    row_bytes: int
    segments: int


@dataclass(frozen=True, slots=True)
class NamespaceFacts(Report):
    """One namespace.

    Args:
        namespace: its name; that of its folder where the name cannot be read.
        folder: where it lies, below ``rows/``.
        cls: the class of the module, where the manifest tells.
        rows: that can be got.
        bytes: of its segments on disk.
        dead_bytes: of rows that were overwritten or dropped, and are still there.
        leftover_bytes: of what was never committed.
        last_used: seconds since the epoch.
        segments: pairs of files.
        writers: that are alive and have a segment here.
        damaged: segments that cannot be read in full.
        layouts: what the rows are.
        differs: from the latest used other namespace of the same class.
        manifest: the readable description.
    """

    namespace: str
    folder: str
    cls: str | None
    rows: int
    bytes: int
    dead_bytes: int
    leftover_bytes: int
    last_used: float
    segments: int
    writers: int
    damaged: int
    layouts: tuple[LayoutFacts, ...]
    differs: tuple[str, ...] | None
    manifest: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Listing(Report):
    """The namespaces of a directory, the latest used first.

    Args:
        directory: the path.
        namespaces: one after the other.
    """

    directory: str
    namespaces: tuple[NamespaceFacts, ...]


@dataclass(frozen=True, slots=True)
class Totals(Report):
    """A directory as a whole.

    Args:
        directory: the path.
        format: the number of its format; None where it does not say.
        namespaces: how many.
        rows: that can be got.
        bytes: of all segments on disk.
        dead_bytes: of rows that were overwritten or dropped.
        leftover_bytes: of what was never committed.
        segments: pairs of files.
        damaged: segments that cannot be read in full.
        writers: that are alive.
        last_used: seconds since the epoch; None where there is no namespace.
        free_bytes: of the file system.
    """

    directory: str
    format: int | None
    namespaces: int
    rows: int
    bytes: int
    dead_bytes: int
    leftover_bytes: int
    segments: int
    damaged: int
    writers: int
    last_used: float | None
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Usage(Report):
    """Where the bytes of a directory are.

    Args:
        directory: the path.
        namespaces: bytes of each, under its name.
        rows_bytes: rows that can be got.
        dead_bytes: rows that were overwritten or dropped.
        leftover_bytes: what was never committed.
        log_bytes: keys, checksums, heads and headers.
        damaged_bytes: segments of which nothing can be read.
        other_bytes: manifests, the catalogue, traces of writers.
        strange_bytes: files that are not modcache's.
        total_bytes: all of it.
        allocated_bytes: what the file system holds for it.
    """

    directory: str
    namespaces: Mapping[str, int]
    rows_bytes: int
    dead_bytes: int
    leftover_bytes: int
    log_bytes: int
    damaged_bytes: int
    other_bytes: int
    strange_bytes: int
    total_bytes: int
    allocated_bytes: int


@dataclass(frozen=True, slots=True)
class Damage(Report):
    """What is wrong with one segment.

    Args:
        namespace: that it belongs to.
        segment: the name of its files, without the ending.
        what: is wrong, in a few words.
        rows: that are lost by it, as far as that can be told.
        repaired: what can be read is in a whole segment now, and the damaged one is gone.
    """

    namespace: str
    segment: str
    what: str
    rows: int
    repaired: bool


@dataclass(frozen=True, slots=True)
class VerifyReport(Report):
    """What reading every byte of a directory found.

    Args:
        directory: the path.
        segments: that were read.
        rows: of which the checksum was compared.
        bytes: of these rows.
        damages: one for each segment with anything wrong.
        leftover_bytes: of what was never committed; that is no damage.
        left: files of somebody else that have the name of a segment's, and stay.
    """

    directory: str
    segments: int
    rows: int
    bytes: int
    damages: tuple[Damage, ...]
    leftover_bytes: int
    left: tuple[str, ...] = ()

    @property
    def fine(self) -> bool:
        """Whether nothing is wrong, or nothing any more."""
        return all(damage.repaired for damage in self.damages)


@dataclass(frozen=True, slots=True)
class GcReport(Report):
    """What was reclaimed, or would be.

    Args:
        directory: the path.
        dry_run: nothing was done.
        bytes_before: of all segments on disk.
        bytes_after: the same, afterwards.
        tails: segments of dead writers that were cut to what is committed.
        orphans: halves of segments that dead writers left.
        compacted: segments that were written anew without their dead rows.
        dropped: namespaces that had to go for the limits.
        in_use: namespaces that would have had to go, and stay because somebody writes to them.
        waiting: why something was left for later, in a few words each.
    """

    directory: str
    dry_run: bool
    bytes_before: int
    bytes_after: int
    tails: int
    orphans: int
    compacted: int
    dropped: tuple[str, ...]
    in_use: tuple[str, ...]
    waiting: tuple[str, ...]

    @property
    def freed_bytes(self) -> int:
        """Bytes fewer than before."""
        return self.bytes_before - self.bytes_after


@dataclass(frozen=True, slots=True)
class ClearReport(Report):
    """What was cleared.

    Args:
        namespace: the whole name.
        rows: that could be got before.
        bytes: that were freed.
        left: files of somebody else that stay in the folder.
    """

    namespace: str
    rows: int
    bytes: int
    left: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ForgetReport(Report):
    """What was forgotten.

    Args:
        keys: that were asked for.
        found: how many of these were in any file.
        rows: rows of them that are in no file any more, in all namespaces.
        rewritten: segments that were written anew without them.
        waiting: segments that still hold them, each with the reason.
        unreadable: segments of which nothing can be told.
    """

    keys: int
    found: int
    rows: int
    rewritten: int
    waiting: tuple[str, ...]
    unreadable: tuple[str, ...]

    @property
    def wiped(self) -> bool:
        """Whether no file of modcache holds a row of these keys."""
        return not self.waiting and not self.unreadable


@dataclass(frozen=True, slots=True)
class ExportReport(Report):
    """What was exported.

    Args:
        namespace: the whole name.
        path: of the file.
        rows: in it.
        bytes: of the file.
        columns: names of what is in it: the keys, and each tensor of a row.
        damaged: rows that were left out because they do not have their checksum.
    """

    namespace: str
    path: str
    rows: int
    bytes: int
    columns: tuple[str, ...]
    damaged: int
