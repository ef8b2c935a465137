"""Reports as plain text for a terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ..stores.disk.upkeep.reports import (
    ClearReport,
    ExportReport,
    ForgetReport,
    GcReport,
    Listing,
    NamespaceFacts,
    Totals,
    Usage,
    VerifyReport,
)

__all__ = ["bytes_text", "shortest", "table", "text_of"]

_AGO: Final = ((86400 * 2, 86400, "days"), (3600 * 2, 3600, "hours"), (120, 60, "minutes"), (2, 1, "seconds"))


def text_of(report: object) -> str:
    """The lines that tell a report."""
    text: str = _TEXTS[type(report)](report)
    return text


def table(rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> str:
    """Columns as wide as they must be, two blanks apart.

    >>> print(table([["name", "rows"], ["a", "12"]], frozenset({1})))
    name  rows
    a       12
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def bytes_text(count: float) -> str:
    """A number of bytes for people.

    >>> bytes_text(12), bytes_text(1536), bytes_text(3 << 30)
    ('12 B', '1.5 KiB', '3.0 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def shortest(names: Sequence[str], least: int = 8) -> dict[str, str]:
    """For each name the shortest beginning that no other name has.

    >>> shortest(["0123456789", "0123456788", "abcdefghijkl"])
    {'0123456789': '0123456789', '0123456788': '0123456788', 'abcdefghijkl': 'abcdefgh'}
    """
    found = {}
    ordered = sorted(names)
    for place, name in enumerate(ordered):
        beside = ordered[max(0, place - 1) : place] + ordered[place + 1 : place + 2]
        length = max([least, *(_common(name, other) + 1 for other in beside)])
        found[name] = name[:length]
    return {name: found[name] for name in names}


def _common(name: str, other: str) -> int:
    pairs = enumerate(zip(name, other, strict=False))
    return next((place for place, (mine, theirs) in pairs if mine != theirs), min(len(name), len(other)))


def _ago(seconds: float | None) -> str:
    if seconds is None:
        return "never"
    past = time.time() - seconds
    for least, unit, name in _AGO:
        if past >= least:
            return f"{past / unit:.0f} {name} ago"
    return "now"


def _listing(report: Listing) -> str:
    if not report.namespaces:
        return "no namespaces"
    short = shortest([_visible(facts.namespace) for facts in report.namespaces])
    lines = [["namespace", "class", "rows", "bytes", "last used", "differs"]]
    for facts in report.namespaces:
        notes = [f"{facts.damaged} damaged segments"] if facts.damaged else []
        lines.append(
            [
                short[_visible(facts.namespace)],
                _visible(facts.cls or "-").rpartition(".")[2],
                f"{facts.rows:,}",
                bytes_text(facts.bytes),
                _ago(facts.last_used),
                _visible("; ".join([*notes, *(facts.differs or ())])) or "-",
            ]
        )
    return table(lines, frozenset({2, 3}))


def _namespace(report: NamespaceFacts) -> str:
    lines = [
        ["namespace", report.namespace],
        ["folder", f"rows/{report.folder}"],
        ["class", report.cls or "-"],
        ["rows", f"{report.rows:,}"],
        *(["layout", _layout(layout.leaves, layout.rows)] for layout in report.layouts),
        ["bytes", bytes_text(report.bytes)],
        ["dead", bytes_text(report.dead_bytes)],
        ["left over", bytes_text(report.leftover_bytes)],
        ["segments", f"{report.segments:,}"],
        ["damaged", f"{report.damaged:,}"],
        ["writers", f"{report.writers:,} alive"],
        ["last used", _ago(report.last_used)],
        ["differs", "; ".join(report.differs or ()) or "-"],
    ]
    manifest = "no manifest" if report.manifest is None else json.dumps(_brief(report.manifest), indent=2)
    return f"{table([[name, _visible(text)] for name, text in lines])}\n\n{manifest}"


def _layout(leaves: Sequence[tuple[str, tuple[int, ...]]], rows: int) -> str:
    told = ", ".join(f"{dtype}{list(shape)}" for dtype, shape in leaves[:4])
    more = f" and {len(leaves) - 4} more" if len(leaves) > 4 else ""
    return f"{told}{more}: {rows:,} rows"


def _brief(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest without what is there for comparing only, and fills pages."""
    return {name: value for name, value in manifest.items() if name not in ("parts", "checked")}


def _totals(report: Totals) -> str:
    return table(
        [
            ["directory", report.directory],
            ["format", str(report.format) if report.format is not None else "not told"],
            ["namespaces", f"{report.namespaces:,}"],
            ["rows", f"{report.rows:,}"],
            ["bytes", bytes_text(report.bytes)],
            ["dead", bytes_text(report.dead_bytes)],
            ["left over", bytes_text(report.leftover_bytes)],
            ["segments", f"{report.segments:,}"],
            ["damaged", f"{report.damaged:,}"],
            ["writers", f"{report.writers:,} alive"],
            ["last used", _ago(report.last_used)],
            ["free", bytes_text(report.free_bytes)],
        ]
    )


def _usage(report: Usage) -> str:
    largest = sorted(report.namespaces.items(), key=lambda entry: -entry[1])
    sizes = [
        *((_visible(name), size) for name, size in largest),
        ("rows", report.rows_bytes),
        ("dead rows", report.dead_bytes),
        ("left over", report.leftover_bytes),
        ("keys and checksums", report.log_bytes),
        ("damaged segments", report.damaged_bytes),
        ("manifests, catalogue", report.other_bytes),
        ("not modcache's", report.strange_bytes),
        ("all", report.total_bytes),
        ("on disk", report.allocated_bytes),
    ]
    return table([[bytes_text(size), name] for name, size in sizes], frozenset({0}))


def _verified(report: VerifyReport) -> str:
    lines = [
        f"{damage.namespace}: {damage.segment}: {damage.what}"
        + (f" ({damage.rows} rows)" if damage.rows else "")
        + (" - repaired" if damage.repaired else "")
        for damage in report.damages
    ]
    lines.append(f"read {report.rows:,} rows in {report.segments:,} segments, {bytes_text(report.bytes)}")
    if report.leftover_bytes:
        lines.append(f"{bytes_text(report.leftover_bytes)} were never committed; modcache gc reclaims that")
    left = sum(not damage.repaired for damage in report.damages)
    lines.append("nothing is damaged" if not report.damages else f"{len(report.damages)} segments damaged, {left} left")
    return _visible("\n".join(lines))


def _reclaimed(report: GcReport) -> str:
    would = "would be " if report.dry_run else ""
    lines = [f"{would}dropped: {name}" for name in report.dropped]
    lines += [f"in use, stays: {name}" for name in report.in_use]
    lines += [f"left for later: {text}" for text in report.waiting]
    for count, what in (
        (report.tails, "tails of dead writers"),
        (report.orphans, "orphans"),
        (report.compacted, "segments compacted"),
    ):
        if count:
            lines.append(f"{count:,} {what}")
    lines.append(
        f"{bytes_text(report.bytes_before)} before, {bytes_text(report.bytes_after)} {would}left: "
        f"{bytes_text(report.freed_bytes)} {would}freed"
    )
    return _visible("\n".join(lines))


def _cleared(report: ClearReport) -> str:
    lines = [f"dropped {report.rows:,} rows of {report.namespace}, {bytes_text(report.bytes)}"]
    lines += [f"not modcache's, stays: {name}" for name in report.left]
    return _visible("\n".join(lines))


def _forgotten(report: ForgetReport) -> str:
    lines = [f"found {report.found:,} of {report.keys:,} keys; wiped {report.rows:,} rows from the files"]
    lines += [f"not yet: {text}; nobody gets these rows, run it again later" for text in report.waiting]
    lines += [f"cannot tell: {text}; see modcache verify --repair" for text in report.unreadable]
    return "\n".join(lines)


def _exported(report: ExportReport) -> str:
    damaged = f"; {report.damaged:,} damaged rows left out" if report.damaged else ""
    columns = ", ".join(report.columns[:6])
    return f"wrote {report.rows:,} rows to {report.path}, {bytes_text(report.bytes)}: {columns}{damaged}"


def _visible(text: str) -> str:
    """A text that somebody else may have written, without what a terminal would obey."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)


_TEXTS: Final[Mapping[type, Any]] = {
    ClearReport: _cleared,
    ExportReport: _exported,
    ForgetReport: _forgotten,
    GcReport: _reclaimed,
    Listing: _listing,
    NamespaceFacts: _namespace,
    Totals: _totals,
    Usage: _usage,
    VerifyReport: _verified,
}
