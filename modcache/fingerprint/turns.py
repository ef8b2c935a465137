"""Look at what hardly ever changes a part at a time: a change is noticed late, and each look is short."""

from __future__ import annotations

import bisect
import functools
import itertools
import operator
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["LONG", "MOST_TURNS", "Places", "Turns", "getter", "in_pieces", "parted"]

Places = list[tuple[Callable[[Any], Iterable[object]], Any]]
"""Where to look: a getter of values, and what it is to be called with."""

MOST_TURNS = 64
"""After how many looks all places were looked at, at the latest."""

LONG = 1 << 10
"""Items from which on a container is cut into pieces."""

_TURNS = 16
_VALUES = 1 << 12  # that one look takes, if there are so many that they need more turns
_AT_ONCE = 1 << 14  # comparisons that each look may take for containers: a third of a millisecond
_chain = itertools.chain.from_iterable


class Turns:
    """Places, and what was there, in parts that take turns.

    Args:
        places: where to look.
    """

    def __init__(self, places: Places) -> None:
        self._parts = _even_parts(places)
        self._values = [list(_fetched(part)) for part in self._parts]

    def same(self, turn: int) -> bool:
        """Whether this turn's part is the very same."""
        number = turn % len(self._parts)
        if not self._parts[number]:
            return True
        now, values = [*_fetched(self._parts[number])], self._values[number]
        return len(now) == len(values) and all(map(operator.is_, now, values))


def getter(names: tuple[str, ...], get: Any = operator.itemgetter) -> Callable[[Any], tuple[object, ...]]:
    """Gets all of these items (or attributes) as a tuple, also if it is one or none."""
    if not names:
        return _nothing
    # A getter of one name gives the bare value; asked for the name twice it gives a tuple, like the others.
    made: Callable[[Any], tuple[object, ...]] = get(*names) if len(names) > 1 else get(names[0], names[0])
    return made


def _nothing(_: object) -> tuple[object, ...]:
    return ()


def parted(containers: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """The containers that are compared in each look, the smallest ones, and those that are looked at in turn."""
    ordered = sorted(containers, key=_count)
    few = bisect.bisect_right(list(itertools.accumulate(map(_count, ordered))), _AT_ONCE)
    return ordered[:few], ordered[few:]


def _count(value: Any) -> int:
    """How many comparisons a container takes, or as many as going to it is worth."""
    return (2 * len(value) if isinstance(value, dict) else len(value)) + 4


def in_pieces(containers: list[Any]) -> Places:
    """Containers in pieces of about as many items: the large ones cut, the small ones bundled."""
    dicts = [value for value in containers if isinstance(value, dict) and len(value) <= LONG]
    sequences = [value for value in containers if not isinstance(value, dict) and len(value) <= LONG]
    found: Places = [(_items_of_dicts, bundle) for bundle in _bundles(dicts)]
    found += [(_chain, bundle) for bundle in _bundles(sequences)]
    return found + [piece for value in containers if len(value) > LONG for piece in _pieces(value)]


def _bundles(containers: list[Any]) -> Iterable[list[Any]]:
    edges = list(itertools.accumulate(map(_count, containers)))
    for _, places in itertools.groupby(range(len(containers)), lambda place: edges[place] // LONG):
        yield [containers[place] for place in places]


def _items_of_dicts(dicts: list[dict[Any, object]]) -> Iterable[object]:
    return itertools.chain(_chain(dicts), _chain(map(dict.values, dicts)))


def _pieces(value: Any) -> Iterable[tuple[Callable[[Any], Iterable[object]], Any]]:
    """A container of very many items, some at a time; the order of a dict or set is not looked at again."""
    if isinstance(value, dict | set):
        keys = list(value)
        for start in range(0, len(keys), LONG):
            names = tuple(keys[start : start + LONG])
            yield (getter(names) if isinstance(value, dict) else functools.partial(_held, names)), value
        return
    for start in range(0, len(value), LONG):
        yield functools.partial(_piece, start=start), value


def _held(items: tuple[object, ...], value: set[object]) -> Iterable[object]:
    return filter(value.__contains__, items)


def _piece(value: Any, start: int) -> Iterable[object]:
    if isinstance(value, list):
        return value[start : start + LONG]
    return itertools.islice(value, start, start + LONG)


def _fetched(places: Places) -> Iterable[object]:
    return _chain([get(place) for get, place in places])


def _even_parts(places: Places) -> list[Places]:
    """The places in parts that hold about as many values each, so that no turn takes much longer than another."""
    sized = sorted(((len(list(get(place))), at) for at, (get, place) in enumerate(places)), reverse=True)
    total = sum(size for size, _ in sized)
    parts: list[Places] = [[] for _ in range(min(max(_TURNS, total // _VALUES), MOST_TURNS))]
    sizes = [0] * len(parts)
    for size, number in sized:
        least = sizes.index(min(sizes))
        parts[least].append(places[number])
        sizes[least] += size
    return parts
