"""Reports as plain text for a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ..stats import bytes_text
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
from .columns import ago, shortest, table, visible

__all__ = ["text_of"]


def text_of(report: object) -> str:
    """The lines that tell a report."""
    text: str = _TEXTS[type(report)](report)
    return text


def _listing(report: Listing) -> str:
    if not report.namespaces:
        return "no namespaces"
    short = shortest([visible(facts.namespace) for facts in report.namespaces])
    lines = [["namespace", "class", "rows", "bytes", "last used", "differs"]]
    for facts in report.namespaces:
        notes = [f"{facts.damaged} damaged segments"] if facts.damaged else []
        lines.append(
            [
                short[visible(facts.namespace)],
                _class(facts),
                f"{facts.rows:,}",
                bytes_text(facts.bytes),
                ago(facts.last_used),
                visible("; ".join([*notes, *(facts.differs or ())])) or "-",
            ]
        )
    return table(lines, frozenset({2, 3}))


def _class(facts: NamespaceFacts) -> str:
    """The name of the class, and of the module at which a recycled model is cut."""
    name, cut = visible(facts.cls or "-").rpartition(".")[2], (facts.manifest or {}).get("cut")
    return f"{name} at {visible(cut)}" if isinstance(cut, str) else name


def _namespace(report: NamespaceFacts) -> str:
    lines = [
        ["namespace", report.namespace],
        ["folder", f"rows/{report.folder}"],
        ["class", report.cls or "-"],
        ["rows", f"{report.rows:,}"],
        *(["layout", _layout(layout.leaves, layout.rows)] for layout in report.layouts),
        *_holdings(report),
        ["differs", "; ".join(report.differs or ()) or "-"],
    ]
    manifest = "no manifest" if report.manifest is None else json.dumps(_brief(report.manifest), indent=2)
    return f"{table([[name, visible(text)] for name, text in lines])}\n\n{manifest}"


def _holdings(report: NamespaceFacts | Totals) -> list[list[str]]:
    return [
        ["bytes", bytes_text(report.bytes)],
        ["dead", bytes_text(report.dead_bytes)],
        ["left over", bytes_text(report.leftover_bytes)],
        ["segments", f"{report.segments:,}"],
        ["damaged", f"{report.damaged:,}"],
        ["writers", f"{report.writers:,} alive"],
        ["last used", ago(report.last_used)],
    ]


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
            *_holdings(report),
            ["free", bytes_text(report.free_bytes)],
        ]
    )


def _usage(report: Usage) -> str:
    largest = sorted(report.namespaces.items(), key=lambda entry: -entry[1])
    sizes = [
        *((visible(name), size) for name, size in largest),
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
    lines += [f"not modcache's, stays: {name}" for name in report.left]
    left = sum(not damage.repaired for damage in report.damages)
    lines.append("nothing is damaged" if not report.damages else f"{len(report.damages)} segments damaged, {left} left")
    return visible("\n".join(lines))


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
    return visible("\n".join(lines))


def _cleared(report: ClearReport) -> str:
    lines = [f"dropped {report.rows:,} rows of {report.namespace}, {bytes_text(report.bytes)}"]
    lines += [f"not modcache's, stays: {name}" for name in report.left]
    return visible("\n".join(lines))


def _forgotten(report: ForgetReport) -> str:
    lines = [f"found {report.found:,} of {report.keys:,} keys; wiped {report.rows:,} rows from the files"]
    lines += [f"not yet: {text}; nobody gets these rows, run it again later" for text in report.waiting]
    lines += [f"cannot tell: {text}; see modcache verify --repair" for text in report.unreadable]
    return "\n".join(lines)


def _exported(report: ExportReport) -> str:
    damaged = f"; {report.damaged:,} damaged rows left out" if report.damaged else ""
    columns = ", ".join(report.columns[:6])
    return f"wrote {report.rows:,} rows to {report.path}, {bytes_text(report.bytes)}: {columns}{damaged}"


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
