"""What all calls of one cached module share: options, store, counts, and what the self-checks found."""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .explain import Memory
from .keys import Extractor
from .keys.tokens import PaddingWatch
from .locks import lock_of
from .looking import look_up_in
from .manifests import TokenDims, Word
from .notices import log, warn
from .recipe import Form, Recipe
from .rows import Rows
from .stats import CallHook, CallReport, Counters, Seconds, Stats
from .stores import Found, MemoryStore, Store, TieredStore, bytes_of

__all__ = ["Bypass", "Memo", "Options"]

_NOTHING = object()
_MOST_UNCHECKED = 1 << 16
_NO_NAMES: frozenset[str] = frozenset()

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


@dataclass(frozen=True, slots=True)
class _Findings:
    """What self-checks found of the calls of each form in each namespace.

    Args:
        passed: the token dimensions of the outputs, where one passed.
        untested: in what the rows were the same that were checked, where they were.
    """

    passed: dict[tuple[str, Form], TokenDims] = field(default_factory=dict)
    untested: dict[tuple[str, Form], frozenset[str]] = field(default_factory=dict)


_shared: weakref.WeakKeyDictionary[Any, _Findings] = weakref.WeakKeyDictionary()


def _findings_in(store: Store) -> _Findings:
    """What is known in a store: a copy, or a module of the same content, need not compute stored rows once more."""
    try:
        return _shared.setdefault(store, _Findings())
    except TypeError:  # a store of the user's that has no hash or no weak reference
        return _Findings()


def _rename(known: dict[tuple[str, Form], Known], old: str, new: str) -> None:
    for key in [key for key in known if key[0] == old]:
        known[new, key[1]] = known.pop(key)


def _forget(known: dict[tuple[str, Form], Any], namespace: str) -> None:
    for key in [key for key in known if key[0] == namespace]:
        known.pop(key, None)


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
    """

    def __init__(self, name: str, options: Options, store: Store) -> None:
        self.name = name
        self.options = options
        self.store = store
        self.look_up = look_up_in(store)
        self.word = Word(store, name)
        self.memory = Memory()
        self.padding = PaddingWatch()
        self.hooks: dict[int, CallHook] = {}
        self.recipes: dict[object, Recipe] = {}
        self._counters = Counters()
        self._lock = lock_of(self)
        self._said: set[str] = set()
        self._fleeting = False
        self._findings = _findings_in(store)
        self._blocked: dict[Form, str] = {}
        self._steady: set[tuple[str, Form]] = set()
        self._unchecked: dict[tuple[str, Form], list[bytes] | None] = {}
        self._moved = 0
        self._latest: deque[tuple[int, str, Sequence[bytes]]] = deque(maxlen=64)

    # --- what was found out about calls of a form

    def blocked(self, form: Form) -> str | None:
        """Why calls of this form are bypassed for good, if they are."""
        return self._blocked.get(form) if self._blocked else None

    def block(self, form: Form, reason: str) -> None:
        """Bypass calls of this form from now on, and drop what they stored unchecked."""
        with self._lock:
            self._blocked[form] = reason
            dropped = [(key, self._unchecked.pop(key)) for key in list(self._unchecked) if key[1] == form]
        for (namespace, _), keys in dropped:
            self.delete(namespace, keys)
        for namespace in {namespace for namespace, known in [*self._findings.passed] if known == form}:
            self._leave_word(namespace, form, None)

    def passed(self, namespace: str, form: Form) -> TokenDims | None:
        """The token dimensions of the outputs (mostly none) once a self-check passed, else ``None``."""
        if self._blocked and form in self._blocked:
            return None
        known = self._findings.passed.get((namespace, form))
        return self._passed_before(namespace, form) if known is None and self.word.lasts else known

    def untested(self, namespace: str, form: Form) -> frozenset[str]:
        """In what the rows of all batches were the same that passed a self-check: it says nothing of rows that differ.

        These are the names that `sameness` gives; mostly none.
        """
        known = self._findings.untested
        return known.get((namespace, form), _NO_NAMES) if known else _NO_NAMES

    def let_pass(self, namespace: str, form: Form, dims: TokenDims, same: frozenset[str] = frozenset()) -> None:
        """Calls of this form may serve and store rows of this namespace from now on.

        Args:
            namespace: of the rows.
            form: of the calls.
            dims: the token dimensions of the outputs.
            same: in what the rows were the same that were checked; calls whose rows differ in it are to be checked yet.
        """
        key = namespace, form
        with self._lock:
            if key in self._findings.passed:
                same &= self._findings.untested.get(key, _NO_NAMES)
            self._note_passed(key, dims, same)
            self._unchecked.pop(key, None)
        self._leave_word(namespace, form, dims, same)

    def _note_passed(self, key: tuple[str, Form], dims: TokenDims, same: frozenset[str]) -> None:
        if same:  # first: who sees that it passed sees this as well
            self._findings.untested[key] = same
        self._findings.passed[key] = dims
        if not same:
            self._findings.untested.pop(key, None)

    def _passed_before(self, namespace: str, form: Form) -> TokenDims | None:
        """As `passed`, by what an earlier run left word of."""
        known = self.word.passed(namespace, form)
        if known is None:
            return None
        self._note_passed((namespace, form), *known)
        return known[0]

    def _leave_word(
        self, namespace: str, form: Form, dims: TokenDims | None, same: frozenset[str] = frozenset()
    ) -> None:
        if self.word.lasts:
            self._guarded("describing", lambda: self.word.note(namespace, form, dims, same))

    def is_steady(self, namespace: str, form: Form) -> bool:
        """Whether the module draws no random numbers on single rows of this form, or makes no use of them."""
        return (namespace, form) in self._steady

    def note_steady(self, namespace: str, form: Form) -> None:
        """That need not be looked at again and again."""
        with self._lock:
            self._steady.add((namespace, form))

    def note_unchecked(self, namespace: str, form: Form, keys: Sequence[bytes]) -> None:
        """Rows were stored although nothing could be checked with them; a failing check drops them."""
        with self._lock:
            known = self._unchecked.setdefault((namespace, form), [])
            if known is not None and len(known) < _MOST_UNCHECKED:
                known.extend(keys)
            else:  # a module that is only ever called with single rows; should it fail a check, all of them go
                self._unchecked[namespace, form] = None

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
        with self._lock:
            for known in (self._findings.untested, self._findings.passed, self._unchecked):
                _forget(known, namespace)

    def keep_in_memory(self, only: bool) -> None:
        """Whether rows are, from now on, written nowhere where they would outlast the process."""
        self._fleeting = only

    @property
    def hits(self) -> int:
        """How many rows were served so far."""
        return self._counters.hits

    def leave_store(self) -> None:
        """Keep nothing of the store, so that it can be given back."""
        self.store = MemoryStore()
        self.look_up = look_up_in(self.store)
        self.word = Word(self.store, self.name)

    def rename(self, old: str, new: str) -> None:
        """The rows of a namespace, and all that is known of them, belong to another name from now on."""
        with self._lock:
            _rename(self._findings.untested, old, new)
            _rename(self._findings.passed, old, new)
            _rename(self._unchecked, old, new)
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
            report = CallReport(self.name, namespace, rows, hits, computed, bypassed, reason, Seconds(*seconds))
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
