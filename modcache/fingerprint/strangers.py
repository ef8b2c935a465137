"""Tell objects without content apart, as far as one process can: by the order in which they came to a place."""

from __future__ import annotations

import uuid
import weakref
from typing import TYPE_CHECKING

from ..digest import encode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Strangers"]

_REMEMBERED = 16  # of one place; one that was forgotten is a new one when it comes back


class Strangers:
    """Remembers the opaque objects (a tokenizer, an optimizer) that were met at each place of one module.

    Such an object counts by its class, so that a module that is made anew finds the rows of before. But one that
    takes another's place in a living module may well do something else.
    """

    def __init__(self) -> None:
        self._process = uuid.uuid4().bytes
        self._met: dict[str, dict[int, Callable[[], object]]] = {}
        self._latest: dict[str, int] = {}
        self._restless: set[str] = set()

    def said(self, opaque: Mapping[str, object]) -> bytes:
        """What tells the objects of now from those that were met first: nothing, as long as they are the same."""
        for place, value in opaque.items():
            self._latest[place] = self._number(place, value)
        later = [(place, self._latest[place]) for place in sorted(opaque) if place not in self._restless]
        replaced = [(place, number) for place, number in later if number]
        return encode((self._process, replaced)) if replaced else b""

    def changed_by_forward(self, opaque: Mapping[str, object]) -> None:
        """A forward has just run: what it put in the place of another is bookkeeping."""
        for place, value in opaque.items():
            if place in self._latest and self._met[place][self._latest[place]]() is not value:
                self._restless.add(place)

    def _number(self, place: str, value: object) -> int:
        met = self._met.setdefault(place, {})
        for number, known in met.items():
            if known() is value:
                return number
        number = max(met, default=-1) + 1
        met[number] = _reference(value)
        if len(met) > _REMEMBERED:
            met.pop(min(number for number in met if number))
        return number


def _reference(value: object) -> Callable[[], object]:
    """What gives an object back; it keeps it alive only if there is no other way."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value
