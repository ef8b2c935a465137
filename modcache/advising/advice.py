"""The advice: the cuts of a model beside each other, as a table, as plain values, and as a picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..errors import UsageError
from ..stats import bytes_text
from .costs import NOISE, AdvisedCut, Size

__all__ = ["Advice"]


@dataclass(frozen=True, slots=True)
class Advice:
    """What `advise` found out; prints as a table.

    Args:
        model: the name of its class.
        cuts: in the order in which a step reaches them.
        refused: cuts that `recycle` would refuse, and why.
        forward_seconds: of a step as it is, the loss included.
        backward_seconds: of a step as it is; 0.0 if nothing is trained.
        size: how much is trained on.
        store: where rows would lie.
    """

    model: str
    cuts: tuple[AdvisedCut, ...]
    refused: tuple[tuple[str, str], ...]
    forward_seconds: float
    backward_seconds: float
    size: Size
    store: str = "memory"

    @property
    def step_seconds(self) -> float:
        """A step as it is: forward, loss and backward."""
        return self.forward_seconds + self.backward_seconds

    @property
    def best(self) -> AdvisedCut | None:
        """The cut that pays with the highest ratio; ``None`` if none pays, and `reason` says why."""
        return max((cut for cut in self.cuts if cut.pays), key=lambda cut: cut.ratio, default=None)

    @property
    def reason(self) -> str:
        """Why `best` is what it is, in a sentence."""
        best = self.best
        if best is not None:
            return f"{best}: a step takes {_seconds(best.seconds)} instead of {_seconds(self.step_seconds)}"
        if not self.cuts:
            return "none: the model can be cut at no candidate" if self.refused else "none: there is no candidate"
        nearest = max(self.cuts, key=lambda cut: cut.ratio)
        if nearest.ratio > 1.0:
            if nearest.ratio > NOISE and self.size.epochs is not None:
                why = f"it takes more than {self.size.epochs} epochs to pay"
            else:
                took = f"{_seconds(nearest.seconds)} instead of {_seconds(self.step_seconds)}"
                why = f"a step takes {took}, which may be noise"
            return f"none: at {nearest}, which is the fastest, {why}"
        spent = _seconds(nearest.reading_seconds + nearest.fixed_seconds)
        saved = _seconds(max(self.step_seconds - nearest.head_seconds, 0.0))
        at = f"at {nearest} {spent} would be spent to save {saved}"
        return f"none: every trunk is cheaper than reading its rows; {at}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        best = self.best
        return {
            **asdict(self),
            "cuts": [{**asdict(cut), "frozen": list(cut.frozen)} for cut in self.cuts],
            "refused": [list(one) for one in self.refused],
            "step_seconds": self.step_seconds,
            "best": None if best is None else best.at,
            "reason": self.reason,
        }

    def __str__(self) -> str:
        table = [_HEADINGS(self.size), *(_cells(cut, self.size) for cut in self.cuts)]
        shown = [column for column in zip(*table, strict=True) if any(column[1:])]
        widths = [max(map(len, column)) for column in shown]
        lines = [self._first_line(), ""]
        for row in zip(*shown, strict=True):
            name, *cells = (f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join([f"{row[0]:<{len(name)}}", *cells]).rstrip())
        lines += ["", f"best: {self.reason}", *self._notes()]
        return "\n".join(lines)

    def _first_line(self) -> str:
        size = self.size
        parts = f"forward {_seconds(self.forward_seconds)}, backward {_seconds(self.backward_seconds)}"
        if not self.backward_seconds:
            parts = "forward alone, nothing is trained"
        line = f"{self.model}, {size.batch} rows a step: {_seconds(self.step_seconds)} as it is ({parts})"
        if size.steps is not None and size.epochs is not None:
            whole = _seconds(size.epochs * size.steps * self.step_seconds)
            line += f"; {size.epochs} epochs of {size.rows:,} rows: {whole}"
        return line

    def _notes(self) -> list[str]:
        """What a number does not tell, each followed by the cuts that it is about."""
        notes: dict[str, list[str]] = {}
        for cut in self.cuts:
            if cut.frozen:
                notes.setdefault(f"the head uses {_few(cut.frozen)}, too, and would not train it", []).append(str(cut))
            if cut.data_bytes and self.size.room is not None and cut.data_bytes > self.size.room:
                rest = "are computed in each epoch" if cut.disk_ratio is None else "come from the disk"
                room = f"memory has room for {bytes_text(self.size.room)} of rows; the others {rest}"
                notes.setdefault(room, []).append(str(cut))
            if cut.pays and cut.disk_eats_gain:
                notes.setdefault("the disk would eat the gain, if rows did not come from memory", []).append(str(cut))
        for name, why in self.refused:
            notes.setdefault(f"no cut here: {why}", []).append(name)
        return [f"at {', '.join(names)}: {note}" for note, names in notes.items()]

    def plot(self, axes: Any = None) -> Any:
        """The seconds of a step at each cut as bars, beside those of a step as it is.

        Args:
            axes: axes of matplotlib to draw on; without them a new figure is made.

        Returns:
            The axes.

        Raises:
            UsageError: matplotlib is not installed.
        """
        if axes is None:
            try:
                from matplotlib import pyplot as plt
            except ImportError:
                raise UsageError(
                    "advise(...).plot() draws with matplotlib, which is not installed: pip install 'modcache[plot]'"
                ) from None
            _, axes = plt.subplots(figsize=(8, 1.5 + 0.3 * len(self.cuts)), layout="constrained")
        names = ["as it is", *map(str, self.cuts)]
        places = range(len(names))
        parts = {
            "head": [self.step_seconds, *(cut.head_seconds for cut in self.cuts)],
            "reading rows": [0.0, *(cut.reading_seconds for cut in self.cuts)],
            "fixed": [0.0, *(cut.fixed_seconds for cut in self.cuts)],
        }
        left = [0.0] * len(names)
        for label, seconds in parts.items():
            axes.barh(places, seconds, left=left, label=label)
            left = [before + more for before, more in zip(left, seconds, strict=True)]
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.set_xlabel("seconds a step")
        axes.set_title(f"{self.model}, {self.size.batch} rows a step")
        axes.legend()
        return axes


# --- the table ------------------------------------------------------------------------------------------


def _HEADINGS(size: Size) -> tuple[str, ...]:  # noqa: N802
    last = f"{size.epochs} epochs" if size.epochs is not None else ""
    return ("cut at", "weights", "time", "a row", "all rows", "step", "reading", "fixed", "ratio", "from disk",
            "filling", "pays in epoch", last)  # fmt: skip


def _cells(cut: AdvisedCut, size: Size) -> tuple[str, ...]:
    return (
        str(cut),
        f"{cut.parameters:.0%}",
        f"{cut.time:.0%}",
        bytes_text(cut.row_bytes),
        "" if cut.data_bytes is None else bytes_text(cut.data_bytes),
        _seconds(cut.seconds),
        _seconds(cut.reading_seconds),
        _seconds(cut.fixed_seconds),
        f"{cut.ratio:.2f} x",
        "" if cut.disk_ratio is None else f"{cut.disk_ratio:.2f} x",
        _seconds(cut.filling_seconds),
        "never" if cut.break_even is None else str(cut.break_even),
        "" if cut.total_seconds is None else _seconds(cut.total_seconds),
    )


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _seconds(value: float) -> str:
    if value < 1e-3:
        return f"{value * 1e6:.0f} µs"
    if value < 1.0:
        return f"{value * 1e3:.3g} ms"
    if value < 600.0:
        return f"{value:.3g} s"
    return f"{value / 60:,.0f} min"
