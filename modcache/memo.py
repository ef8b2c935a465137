"""What all calls of one cached module share: options, store, counts, findings, and what is said once."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .explain import Recent
from .findings import Findings
from .keys import Extractor
from .locks import lock_of
from .looking import look_up_in
from .manifests import TokenDims, Word
from .misses import PaddingWatch, SharedWatch
from .notices import log, warn
from .recipe import Form, Recipe
from .rows import Rows
from .stats import CallHook, CallReport, Counters, Seconds, Stats
from .stores import Found, MemoryStore, Store, TieredStore, bytes_of

__all__ = ["Bypass", "Memo", "Options"]

_NOTHING = object()

Known = TypeVar("Known")


class Bypass(Exception):  # noqa: N818 - it is no error, and never leaves the package
    """This call is to be run as if uncached.

    Args:
        reason: a few words, under which it is counted.
        advice: what to say once, or ``None`` to say nothing.
        output: what the module gave on the whole call, if it ran already.
    """

    def __init__(self, reason: str, advice: str | None = None, output: object = _NOTHING) -> None:
        super().__init__(reason)
        self.reason = reason
        self.advice = advice
        self.output = output

    @property
    def ran(self) -> bool:
        """Whether the module ran on the whole call already."""
        return self.output is not _NOTHING


@dataclass(frozen=True, slots=True)
class Options:
    """How a module is cached (see `cached_module`)."""

    extractor: Extractor = field(default_factory=Extractor)
    prepare: Callable[..., Any] | None = None
    broadcast: frozenset[str] = frozenset()
    per_row: bool = True
    verify: float = 0.0


def _passing(store: Store) -> Store | None:
    """The part of a store that ends with the process."""
    if isinstance(store, TieredStore):
        return _passing(store.front)
    return store if isinstance(store, MemoryStore) else None


class Memo:
    """What all calls of one cached module share; safe in threads.

    Args:
        name: the class name of the module, for messages.
        options: how it is cached.
        store: where its rows lie.
        findings: makes what is known of the forms of its calls.
    """

    def __init__(
        self,
        name: str,
        options: Options,
        store: Store,
        findings: Callable[[Store, Word], Findings] = Findings,
    ) -> None:
        self.name = name
        self.options = options
        self.store = store
        self.look_up = look_up_in(store)
        self.word = Word(store, name)
        self.findings = findings(store, self.word)
        self.recent = Recent()
        self.padding = PaddingWatch()
        self.shared = SharedWatch()
        self.hooks: dict[int, CallHook] = {}
        self.recipes: dict[object, Recipe] = {}
        self._counters = Counters()
        self._lock = lock_of(self)
        self._said: set[str] = set()
        self._fleeting = False
        self._moved = 0
        self._latest: deque[tuple[int, str, Sequence[bytes]]] = deque(maxlen=64)

    # --- what was found out about calls of a form

    def block(self, form: Form, reason: str) -> None:
        """Bypass calls of this form from now on, and drop what they stored unchecked."""
        for namespace, keys in self.findings.block(form, reason):
            self.delete(namespace, keys)
        for namespace in self.findings.namespaces(form):
            self._leave_word(namespace, form, None)

    def let_pass(self, namespace: str, form: Form, dims: TokenDims, same: frozenset[str] = frozenset()) -> None:
        """Calls of this form may serve and store rows of this namespace from now on (see `Findings.let_pass`)."""
        self.findings.let_pass(namespace, form, dims, same)
        self._leave_word(namespace, form, dims, same)

    def _leave_word(
        self, namespace: str, form: Form, dims: TokenDims | None, same: frozenset[str] = frozenset()
    ) -> None:
        if self.word.lasts:
            self._guarded("describing", lambda: self.word.note(namespace, form, dims, same))

    # --- weights that moved

    def note_put(self, turn: int, namespace: str, keys: Sequence[bytes]) -> None:
        """Rows are stored that rely on a look at the weights; a write that is noticed late may reach back to it."""
        with self._lock:
            self._latest.append((turn, namespace, keys))

    def drop_since(self, turn: int) -> int:
        """Drop the rows that rely on looks from this one on; how many were among the latest."""
        with self._lock:
            spoiled = [(namespace, keys) for at, namespace, keys in self._latest if at >= turn]
            self._latest.clear()
        for namespace, keys in spoiled:
            self.delete(namespace, keys)
        return sum(len(keys) for _, keys in spoiled)

    def note_moved(self) -> bool:
        """A forward moved weights; whether that has happened too often in a row."""
        self._moved += 1
        return self._moved >= 3

    def note_still(self) -> None:
        """A forward left the weights alone."""
        self._moved = 0

    # --- the store, which may fail without breaking the loop

    def get(self, namespace: str, keys: Sequence[bytes]) -> tuple[Found, ...]:
        """What the store has of these rows; nothing if it fails."""
        return self._guarded("reading", lambda: self.look_up(namespace, keys)) or ()

    def contains(self, namespace: str, keys: Sequence[bytes]) -> list[bool]:
        """Which of these rows the store has; none if it fails."""
        ask = getattr(self.store, "contains", None)
        if ask is not None:
            asked = self._guarded("listing", lambda: [bool(there) for there in ask(namespace, keys)])
            if asked is not None and len(asked) == len(keys):
                return asked
        there = [False] * len(keys)
        for part in self.get(namespace, keys):
            for place in part.positions.tolist():
                there[place] = True
        return there

    def put(self, namespace: str, keys: Sequence[bytes], rows: Rows) -> None:
        """Hand rows to the store; the run goes on if it fails."""
        store = self.store if not self._fleeting else _passing(self.store)
        if store is not None:
            admitted = self._guarded("writing", lambda: store.put(namespace, keys, rows))
            if isinstance(store, MemoryStore) and type(admitted) is int and admitted < len(keys):
                self._refused(store, len(keys) - admitted)
            if self.word.lasts and not self._fleeting:
                self._guarded("describing", lambda: self.word.told(namespace))

    def _refused(self, store: MemoryStore, rows: int) -> None:
        self._counters.add_refused(rows)
        if store.shares_room:  # who gave a bound knows of it
            self.say(
                "the store is full",
                f"{rows} of the rows that it computed found no room in its store, and will be computed each time: all "
                f"such stores of the process share {store.stats().max_bytes} bytes. Give it a directory, or "
                "store=MemoryStore(max_bytes=...) with as much as you can spare.",
            )

    def delete(self, namespace: str, keys: Sequence[bytes] | None = None) -> None:
        """Drop rows from the store; the run goes on if it fails."""
        self._guarded("deleting", lambda: self.store.delete(namespace, keys))

    def introduce(self, facts: dict[str, Any]) -> None:
        """A namespace is about to be used: what earlier runs left word of is read, where the store keeps such."""
        if self.word.lasts:
            self._guarded("describing", lambda: self.word.introduce(facts))

    def retire(self, namespace: str) -> None:
        """The rows of a namespace are the first to go when room is needed, where the store can do that."""
        retire = getattr(self.store, "retire", None)
        if retire is not None:
            self._guarded("retiring", lambda: retire(namespace))

    def held(self) -> frozenset[str]:
        """The namespaces that have rows in the store; none if it fails."""
        return frozenset(self._guarded("listing", self.store.namespaces) or ())

    def drop_from_memory(self, namespace: str) -> None:
        """Nobody will ask for this namespace again: its rows leave the part of the store that ends with the process."""
        store = _passing(self.store)
        if store is not None:
            self._guarded("deleting", lambda: store.delete(namespace))
        self.findings.forget(namespace)

    def keep_in_memory(self, only: bool) -> None:
        """Whether rows are, from now on, written nowhere where they would outlast the process."""
        self._fleeting = only

    @property
    def hits(self) -> int:
        """How many rows were served so far."""
        return self._counters.hits

    @property
    def computed(self) -> int:
        """Rows that were computed so far."""
        return self._counters.computed

    def flush(self) -> None:
        """Wait until what was stored would survive the process; the run goes on if it fails."""
        self._guarded("writing", self.store.flush)

    def leave_store(self) -> None:
        """Keep nothing of the store, so that it can be given back."""
        self.store = MemoryStore()
        self.look_up = look_up_in(self.store)
        self.word = Word(self.store, self.name)
        self.findings = Findings(self.store, self.word)

    def rename(self, old: str, new: str) -> None:
        """The rows of a namespace, and all that is known of them, belong to another name from now on."""
        self.findings.rename(old, new)
        with self._lock:
            self._latest = deque(
                ((turn, new if name == old else name, keys) for turn, name, keys in self._latest), self._latest.maxlen
            )
        rename = getattr(self.store, "rename", None)
        if rename is None:
            self.delete(old)
        else:
            rename(old, new)

    def _guarded(self, doing: str, act: Callable[[], Known]) -> Known | None:
        try:
            return act()
        except Exception as error:
            self._store_failed(doing, error)
            return None

    def _store_failed(self, doing: str, error: Exception) -> None:
        self.say(
            f"the store fails {doing}",
            f"its store raised {type(error).__name__} while {doing} rows ({error}); rows are computed where it cannot "
            "serve them. Repair the store, or wrap the module with another one.",
        )

    # --- telling

    def say(self, reason: str, advice: str) -> None:
        """Warn about something once."""
        with self._lock:
            if reason in self._said:
                return
            self._said.add(reason)
        warn(f"modcache, {self.name}: {advice}")

    def count(
        self,
        namespace: str | None,
        rows: int,
        hits: int = 0,
        computed: int = 0,
        bypassed: int = 0,
        reason: str | None = None,
        seconds: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
    ) -> None:
        """Count a call, and tell whoever listens."""
        self._counters.add(rows, hits, computed, bypassed, reason, seconds)
        if self.hooks or log.isEnabledFor(logging.DEBUG):
            self._report(CallReport(self.name, namespace, rows, hits, computed, bypassed, reason, Seconds(*seconds)))

    def count_hits(self, namespace: str, rows: int, keys: float, lookup: float) -> None:
        """The same for a call all of whose rows were served: seconds for their keys, and for the look-up."""
        self._counters.add_hits(rows, keys, lookup)
        if self.hooks or log.isEnabledFor(logging.DEBUG):
            self._report(CallReport(self.name, namespace, rows, rows, seconds=Seconds(keys, lookup)))

    def _report(self, report: CallReport) -> None:
        log.debug("%s", report)
        for hook in tuple(self.hooks.values()):
            self._tell(hook, report)

    def _tell(self, hook: CallHook, report: CallReport) -> None:
        try:
            hook(report)
        except Exception as error:
            self.say("a hook fails", f"its hook {hook!r} raised {type(error).__name__}: {error}; the run goes on.")

    def stats(self) -> Stats:
        """What was counted so far."""
        return self._counters.snapshot(self._guarded("listing", lambda: bytes_of(self.store)) or 0)
