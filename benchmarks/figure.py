"""Draw what `bench_training.py` measured, out of the newest results that have it, as ``docs/images/epochs.svg``.

``python benchmarks/figure.py`` writes the file. Its colours are of a middle lightness, so that it can be read on a
light page and on a dark one.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "epochs.svg"

MEASURED = re.compile(r"training a head on MiniLM, (\d+) texts, epoch (\d+), (without|with) the cache")

WIDTH, HEIGHT = 760, 118
LEFT, LENGTH, THICK = 116, 516, 30  # where bars begin, how long the longest is, and how high each is
TOPS = {"without": 10, "with": 50}
WORDS = {"without": "without", "with": "with modcache"}
FILLS = {"without": "#6e7781", "with": "#1f6feb"}
TEXT = "#768390"
FONTS = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


@dataclass(frozen=True)
class Runs:
    """Seconds of each epoch, without and with the cache, and of what and on what."""

    seconds: dict[str, tuple[float, ...]]
    texts: int
    machine: str


def newest_runs(results: Path = RESULTS) -> Runs:
    """What the newest results say that have it.

    Raises:
        LookupError: no file of results has these numbers.
    """
    for file in sorted(results.glob("*.json"), reverse=True):
        found = runs_of(json.loads(file.read_text(encoding="utf-8")))
        if found is not None:
            return found
    raise LookupError(f"no file in {results} has what bench_training.py measures; run that first")


def runs_of(recorded: dict[str, Any]) -> Runs | None:
    """The epochs in one file of results, or ``None`` if they were not measured."""
    seconds: dict[str, dict[int, float]] = {side: {} for side in WORDS}
    texts = 0
    for name, number in recorded["numbers"].items():
        if match := MEASURED.fullmatch(name):
            texts = int(match[1])
            seconds[match[3]][int(match[2])] = number["value"]
    if not texts:
        return None
    machine = f"{recorded['machine']['processor']}, {recorded['machine']['cores']} cores".replace("(R)", "")
    return Runs({side: tuple(own[epoch] for epoch in sorted(own)) for side, own in seconds.items()}, texts, machine)


def drawn(runs: Runs) -> str:
    """The picture: a bar for each run, parted at its epochs, true to scale."""
    plain, ours = (runs.seconds[side] for side in WORDS)
    scale = LENGTH / max(sum(plain), sum(ours))
    after = f"each epoch after the first takes {_text(max(ours[1:]))}"
    below = f"{len(ours)} epochs of a head on a frozen MiniLM, {runs.texts:,} texts; {runs.machine}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{WIDTH}" height="{HEIGHT}"',
        f'     viewBox="0 0 {WIDTH} {HEIGHT}" font-family="{FONTS}">',
        f"<title>{len(ours)} epochs take {_text(sum(plain))} without, {_text(sum(ours))} with the cache</title>",
        *_bar("without", plain, scale),
        *_bar("with", ours, scale),
        _words(LEFT + sum(ours) * scale + 64, TOPS["with"] + 20, after),
        _words(LEFT, HEIGHT - 14, below, size=11),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _bar(side: str, seconds: tuple[float, ...], scale: float) -> list[str]:
    """One run: its name, its epochs with a hair between them, and their sum."""
    middle = TOPS[side] + 20
    lines = [_words(LEFT - 10, middle, WORDS[side], anchor="end")]
    at = float(LEFT)
    for epoch, length in enumerate((own * scale for own in seconds), 1):
        wide = length > 60
        shown = length - 1.5 if wide else length
        place = f'x="{at:.2f}" y="{TOPS[side]}" width="{shown:.2f}" height="{THICK}"'
        lines.append(f'<rect {place} fill="{FILLS[side]}"/>')
        if wide:
            lines.append(_words(at + length / 2, middle, f"epoch {epoch}", anchor="middle", fill="#ffffff"))
        at += length
    return [*lines, _words(at + 10, middle, _text(sum(seconds)), weight=600)]


def _words(
    x: float, y: float, text: str, *, anchor: str = "start", fill: str = TEXT, size: int = 13, weight: int = 400
) -> str:
    place = f'x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}"'
    return f'<text {place} fill="{fill}" font-size="{size}" font-weight="{weight}">{escape(text)}</text>'


def _text(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2f} s"


def main() -> int:
    """Write the picture."""
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    FIGURE.write_text(drawn(newest_runs()), encoding="utf-8")
    print(f"written to {FIGURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
