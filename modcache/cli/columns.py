"""Columns, sizes, times and names as people read them in a terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

__all__ = ["ago", "shortest", "table", "visible"]

_AGO: Final = ((86400 * 2, 86400, "days"), (3600 * 2, 3600, "hours"), (120, 60, "minutes"), (2, 1, "seconds"))


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


def ago(seconds: float | None) -> str:
    """How long a moment is past."""
    if seconds is None:
        return "never"
    past = time.time() - seconds
    for least, unit, name in _AGO:
        if past >= least:
            return f"{past / unit:.0f} {name} ago"
    return "now"


def visible(text: str) -> str:
    """A text that somebody else may have written, without what a terminal would obey."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)
