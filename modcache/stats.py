"""Count what calls did, and show it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from .locks import lock_of

__all__ = ["CallHook", "CallReport", "Counters", "Seconds", "Stats", "bytes_text"]


@dataclass(frozen=True, slots=True)
class Seconds:
    """Where the time of calls went.

    Args:
        keys: splitting the call and making keys.
        lookup: asking the store, gathering its rows.
        computing: the module itself, on missing rows.
        storing: handing computed rows to the store.
    """

    keys: float = 0.0
    lookup: float = 0.0
    computing: float = 0.0
    storing: float = 0.0

    def __str__(self) -> str:
        return ", ".join(f"{name} {getattr(self, name):.3f}" for name in ("keys", "lookup", "computing", "storing"))


@dataclass(frozen=True, slots=True)
class CallReport:
    """What one call of a cached module did.

    Args:
        module: the class name of the module.
        namespace: where its rows lie, if the call got that far.
        rows: rows of the call; each was a hit, computed or bypassed.
        hits: rows that were stored (or were twins of a row computed in this call).
        computed: rows that the module computed and the cache kept an eye on.
        bypassed: rows that were run as if uncached.
        reason: why rows were bypassed, in a few words.
        seconds: where the time went.
    """

    module: str
    namespace: str | None
    rows: int
    hits: int = 0
    computed: int = 0
    bypassed: int = 0
    reason: str | None = None
    seconds: Seconds = Seconds()


class CallHook(Protocol):
    """Receives a frozen report after each call; see ``cache_of(module).add_hook``."""

    def __call__(self, report: CallReport, /) -> None:
        """Take notice of one call."""


@dataclass(frozen=True, slots=True)
class Stats:
    """What a cached module did so far; prints as a small table.

    >>> print(Stats(calls=2, rows=8, hits=4, computed=4))  # doctest: +ELLIPSIS
    rows        8  in 2 calls
    hits        4  50.0 %
    computed    4...

    Args:
        calls: calls counted.
        rows: rows of all calls: hits + computed + bypassed.
        hits: rows served from the store (or twins of a row computed in the same call).
        computed: rows computed, and stored where the store had room.
        bypassed: rows run as if uncached.
        reasons: bypassed rows by reason.
        bytes: bytes that the store holds for all its modules.
        seconds: where the time went.
        seconds_saved: hits times the mean time to compute a row, less the time spent on keys, look-up and storing.
        refused: computed rows that a full store in memory did not take.
    """

    calls: int = 0
    rows: int = 0
    hits: int = 0
    computed: int = 0
    bypassed: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)
    bytes: int = 0
    seconds: Seconds = Seconds()
    seconds_saved: float = 0.0
    refused: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits as a share of all rows, 0.0 before the first."""
        return self.hits / self.rows if self.rows else 0.0

    def __str__(self) -> str:
        lines = [
            f"rows       {self.rows:>{(width := max(len(str(self.rows)), 2))}}  in {self.calls} calls"
            + ("" if self.calls else " of the module itself; what its other methods run is not cached"),
            f"hits       {self.hits:>{width}}  {self.hit_rate:.1%}".replace("%", " %"),
            f"computed   {self.computed:>{width}}" + (f"  {self.refused} not stored" if self.refused else ""),
            f"bypassed   {self.bypassed:>{width}}",
            *(f"           {count:>{width}}  {reason}" for reason, count in self.reasons.items()),
            f"held       {bytes_text(self.bytes)}",
            f"seconds    {self.seconds}",
            "saved      "
            + (f"{self.seconds_saved:.3f} s" if self.computed or not self.hits else "not known: no row was computed"),
        ]
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


class Counters:
    """Adds up the reports of a module's calls; safe in threads."""

    def __init__(self) -> None:
        self._lock = lock_of(self)
        self._calls = self._rows = self._hits = self._computed = self._bypassed = self._refused = 0
        self._reasons: Counter[str] = Counter()
        self._keys = self._lookup = self._computing = self._storing = 0.0

    def add(
        self,
        rows: int,
        hits: int = 0,
        computed: int = 0,
        bypassed: int = 0,
        reason: str | None = None,
        seconds: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
    ) -> None:
        """Count one call."""
        with self._lock:
            self._calls += 1
            self._rows += rows
            self._hits += hits
            self._computed += computed
            self._keys += seconds[0]
            self._lookup += seconds[1]
            self._computing += seconds[2]
            self._storing += seconds[3]
            if reason is not None:
                self._bypassed += bypassed
                self._reasons[reason] += bypassed

    def add_hits(self, rows: int, keys: float, lookup: float) -> None:
        """Count a call all of whose rows were served, and the seconds that their keys and their look-up took."""
        with self._lock:
            self._calls += 1
            self._rows += rows
            self._hits += rows
            self._keys += keys
            self._lookup += lookup

    def add_refused(self, rows: int) -> None:
        """Count rows that were computed and found no room."""
        with self._lock:
            self._refused += rows

    @property
    def hits(self) -> int:
        """Rows that were served so far."""
        return self._hits

    @property
    def computed(self) -> int:
        """Rows that were computed so far."""
        return self._computed

    def snapshot(self, held: int) -> Stats:
        """What was counted so far, with the bytes that the store holds."""
        with self._lock:
            per_row = self._computing / self._computed if self._computed else 0.0
            spent = self._keys + self._lookup + self._storing
            return Stats(
                calls=self._calls,
                rows=self._rows,
                hits=self._hits,
                computed=self._computed,
                bypassed=self._bypassed,
                reasons=dict(self._reasons),
                bytes=held,
                seconds=Seconds(self._keys, self._lookup, self._computing, self._storing),
                seconds_saved=max(self._hits * per_row - spent, 0.0) if per_row else 0.0,
                refused=self._refused,
            )
