"""What was found out about calls of each form: which may be served, which are bypassed, what is still unchecked."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .locks import lock_of
from .manifests import TokenDims, Word
from .recipe import Form
from .stores import Store

__all__ = ["NOT_ROWS", "Findings"]

NOT_ROWS = "output is not rows"
"""Why a call is bypassed of which the output cannot be parted."""

_MOST_UNCHECKED = 1 << 16
_ENOUGH = 3  # calls of a form that gave no rows, and none that did
_NO_NAMES: frozenset[str] = frozenset()

Known = TypeVar("Known")
Place = tuple[str, Form]
"""A namespace, and the form of calls whose rows lie there."""


@dataclass(frozen=True, slots=True)
class _Checked:
    """What self-checks found of the rows of a store.

    Args:
        passed: the token dimensions of the outputs, where one passed.
        untested: in what the rows were the same that were checked, where they were.
    """

    passed: dict[Place, TokenDims] = field(default_factory=dict)
    untested: dict[Place, frozenset[str]] = field(default_factory=dict)


_shared: weakref.WeakKeyDictionary[Any, _Checked] = weakref.WeakKeyDictionary()


def _checked_in(store: Store) -> _Checked:
    """What is known in a store: a copy, or a module of the same content, need not compute stored rows once more."""
    try:
        return _shared.setdefault(store, _Checked())
    except TypeError:  # a store of the user's that has no hash or no weak reference
        return _Checked()


class Findings:
    """What was found out about the calls of one module; safe in threads.

    Args:
        store: where its rows lie; modules that share it share what self-checks found of the rows there.
        word: what earlier runs left word of.
    """

    def __init__(self, store: Store, word: Word) -> None:
        self._word = word
        self._checked = _checked_in(store)
        self._blocked: dict[Form, str] = {}
        self._not_rows: dict[Place, int] = {}
        self._steady: set[Place] = set()
        self._unchecked: dict[Place, list[bytes] | None] = {}
        self._lock = lock_of(self)

    def blocked(self, form: Form) -> str | None:
        """Why calls of this form are bypassed for good, if they are."""
        return self._blocked.get(form) if self._blocked else None

    @property
    def anything_blocked(self) -> bool:
        """Whether calls of any form are bypassed for good."""
        return bool(self._blocked)

    def refused(self, namespace: str, form: Form) -> str | None:
        """Why calls of this form are bypassed, for good or while the module is as it is, if they are."""
        if self._not_rows and self._not_rows.get((namespace, form), 0) >= _ENOUGH:
            return NOT_ROWS
        return self.blocked(form)

    def note_not_rows(self, namespace: str, form: Form) -> None:
        """What a call of this form gave was no rows."""
        key = namespace, form
        with self._lock:
            if key not in self._checked.passed:
                self._not_rows[key] = self._not_rows.get(key, 0) + 1

    def block(self, form: Form, reason: str) -> list[tuple[str, list[bytes] | None]]:
        """Calls of this form are bypassed from now on; what they stored unchecked, which is to go (None: all there)."""
        with self._lock:
            self._blocked[form] = reason
            return [(key[0], self._unchecked.pop(key)) for key in list(self._unchecked) if key[1] == form]

    def passed(self, namespace: str, form: Form) -> TokenDims | None:
        """The token dimensions of the outputs (mostly none) once a self-check passed, else ``None``."""
        if self._blocked and form in self._blocked:
            return None
        known = self._checked.passed.get((namespace, form))
        return self._passed_before(namespace, form) if known is None and self._word.lasts else known

    def untested(self, namespace: str, form: Form) -> frozenset[str]:
        """In what the rows of all batches were the same that passed a self-check: it says nothing of rows that differ.

        These are the names that `sameness` gives; mostly none.
        """
        known = self._checked.untested
        return known.get((namespace, form), _NO_NAMES) if known else _NO_NAMES

    def let_pass(self, namespace: str, form: Form, dims: TokenDims, same: frozenset[str]) -> None:
        """Calls of this form may serve and store rows of this namespace from now on.

        Args:
            namespace: of the rows.
            form: of the calls.
            dims: the token dimensions of the outputs.
            same: in what the rows were the same that were checked; calls whose rows differ in it are to be checked yet.
        """
        key = namespace, form
        with self._lock:
            if key in self._checked.passed:
                same &= self._checked.untested.get(key, _NO_NAMES)
            self._note_passed(key, dims, same)
            self._unchecked.pop(key, None)

    def namespaces(self, form: Form) -> set[str]:
        """Those in which a self-check of calls of this form passed."""
        return {namespace for namespace, known in [*self._checked.passed] if known == form}

    def _note_passed(self, key: Place, dims: TokenDims, same: frozenset[str]) -> None:
        if same:  # first: who sees that it passed sees this as well
            self._checked.untested[key] = same
        self._checked.passed[key] = dims
        if not same:
            self._checked.untested.pop(key, None)

    def _passed_before(self, namespace: str, form: Form) -> TokenDims | None:
        """As `passed`, by what an earlier run left word of."""
        known = self._word.passed(namespace, form)
        if known is None:
            return None
        self._note_passed((namespace, form), *known)
        return known[0]

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

    def forget(self, namespace: str) -> None:
        """Nobody will ask for the rows of a namespace again."""
        with self._lock:
            for known in (self._checked.untested, self._checked.passed, self._unchecked, self._not_rows):
                _forget(known, namespace)

    def rename(self, old: str, new: str) -> None:
        """The rows of a namespace belong to another name from now on."""
        with self._lock:
            _rename(self._checked.untested, old, new)
            _rename(self._checked.passed, old, new)
            _rename(self._unchecked, old, new)
            _rename(self._not_rows, old, new)


def _rename(known: dict[Place, Known], old: str, new: str) -> None:
    for key in [key for key in known if key[0] == old]:
        known[new, key[1]] = known.pop(key)


def _forget(known: dict[Place, Any], namespace: str) -> None:
    for key in [key for key in known if key[0] == namespace]:
        known.pop(key, None)
