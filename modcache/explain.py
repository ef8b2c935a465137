"""Say why a row hits or misses: what in its key, or in the namespace, differs from the nearest thing stored."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .keys.keyed import Keyed
from .keys.parts import Part, Texts, Values
from .locks import lock_of

__all__ = ["Explanation", "Recent", "differing_parts", "part_digests"]

_REMEMBERED_ROWS = 4096
_REMEMBERED_BYTES = 1 << 22  # rows larger than this are not digested a second time just to explain a miss


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why one row hits or misses.

    Args:
        row: its place in the call.
        hit: whether it would be served.
        reason: in words.
    """

    row: int
    hit: bool
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}: {'hit' if self.hit else 'miss'}, {self.reason}"


class _Known(NamedTuple):
    """What is known of one row; the digest of a part that was not looked at is ``None``."""

    namespace: str
    metas: tuple[tuple[object, ...], ...]
    shared: tuple[tuple[str, bytes], ...]
    digests: tuple[bytes | None, ...]


class _Call(NamedTuple):
    """What is remembered of the rows that one call computed."""

    namespace: str
    metas: tuple[tuple[object, ...], ...]
    shared: tuple[tuple[str, bytes], ...]
    keys: Sequence[bytes]
    digests: Sequence[Sequence[bytes] | None]

    def rows(self) -> Iterator[tuple[bytes, _Known]]:
        """Its rows by their keys."""
        for place, key in enumerate(self.keys):
            own = tuple(None if column is None else column[place] for column in self.digests)
            yield key, _Known(self.namespace, self.metas, self.shared, own)


class Recent:
    """Remembers what the keys of the latest computed rows were made of: a few lists for each call."""

    def __init__(self) -> None:
        self._lock = lock_of(self)
        self._calls: deque[_Call] = deque()
        self._rows = 0

    def remember(
        self, namespace: str, keyed: Keyed, shared: tuple[tuple[str, bytes], ...], places: Sequence[int]
    ) -> None:
        """Remember rows that were computed; nothing is read again but plain values and texts, and nothing raises."""
        kept = places[-_REMEMBERED_ROWS:]
        keys, *digests = (_taken(column, kept) for column in (keyed.keys, *_told_digests(keyed)))
        with self._lock:
            self._calls.append(_Call(namespace, keyed.metas, shared, keys or (), digests))
            self._rows += len(kept)
            while self._rows > _REMEMBERED_ROWS:
                self._rows -= len(self._calls.popleft().keys)

    def explain(
        self,
        namespace: str,
        keyed: Keyed,
        shared: tuple[tuple[str, bytes], ...],
        found: Sequence[bool],
        namespaces: Mapping[str, Mapping[str, bytes]],
        nearest: Sequence[str] | None = None,
        bypassed: Iterable[str] = (),
    ) -> list[Explanation]:
        """One explanation per row of a call (the arguments are those of `ask.explained`)."""
        with self._lock:
            calls = tuple(self._calls)
        asked = _Call(namespace, keyed.metas, shared, keyed.keys, _told_digests(keyed))
        known = dict(row for call in calls for row in call.rows())
        near = _Near(asked, calls)
        nothing = "; ".join(_of_nothing_stored(nearest, bypassed))
        return [
            Explanation(place, True, "stored in this namespace")
            if found[place]
            else Explanation(place, False, _why(own, known.get(key), near, namespaces, nothing))
            for place, (key, own) in enumerate(asked.rows())
        ]


class _Near:
    """Finds the row that is most like an asked one, among the calls that are most like the asked one.

    One row for each digest of each part is enough to look at: the answer names the parts that differ.
    """

    def __init__(self, asked: _Call, calls: Sequence[_Call]) -> None:
        likeness = [_likeness(asked, call) for call in calls]
        rows = [
            own for call, like in zip(calls, likeness, strict=True) if like == max(likeness) for _, own in call.rows()
        ]
        self.last = rows[-1] if rows else None
        self._having = {
            (column, digest): own for own in rows for column, digest in enumerate(own.digests) if digest is not None
        }

    def nearest(self, own: _Known) -> _Known | None:
        """That row; ``None`` if nothing was stored."""
        having = (self._having.get((column, digest)) for column, digest in enumerate(own.digests) if digest is not None)
        alike = [other for other in having if other is not None]
        return max(alike, key=lambda other: _agreement(own, other)) if alike else self.last


def _taken(column: list[bytes] | None, places: Sequence[int]) -> list[bytes] | None:
    if column is None or len(places) == len(column):  # places are distinct and in order
        return column
    return [column[place] for place in places]


def _told_digests(keyed: Keyed) -> list[list[bytes] | None]:
    """The digests of each part; where there is one part alone, the keys say as much, and are made already."""
    return [keyed.keys] if len(keyed.parts) == 1 or not keyed.keys else part_digests(keyed)


def part_digests(keyed: Keyed) -> list[list[bytes] | None]:
    """The digests of each part of the rows; ``None`` for one that is large, or that takes a file or a function."""
    sizes = sum(part.tensor.nbytes for part in keyed.parts if isinstance(part, Values))
    if sizes > _REMEMBERED_BYTES:
        return [None] * len(keyed.parts)
    return [_plain_digests(part) for part in keyed.parts]


def _plain_digests(part: Part) -> list[bytes] | None:
    if not isinstance(part, Texts) and not (isinstance(part, Values) and part.tensor.device.type == "cpu"):
        return None
    try:
        return part.digests(0)
    except Exception:  # the forward freed it; an explanation is not worth an error in the user's loop
        return None


def _of_nothing_stored(nearest: Sequence[str] | None, bypassed: Iterable[str]) -> Iterator[str]:
    yield "nothing was stored by this module yet"
    if reasons := ", ".join(bypassed):
        yield f"calls were bypassed: {reasons}"
    if nearest is not None:
        told = ", ".join(nearest) or "nothing that is told in the manifests"
        yield f"the store has rows of this class under another fingerprint; what differs: {told}"


def _why(
    own: _Known, twin: _Known | None, near: _Near, namespaces: Mapping[str, Mapping[str, bytes]], nothing: str
) -> str:
    nearest = near.nearest(own)
    if nearest is None:
        return nothing
    if twin is not None and twin.namespace != own.namespace:
        parts = differing_parts(namespaces.get(own.namespace, {}), namespaces.get(twin.namespace, {}))
        return f"its input is known, but under another state or context: {', '.join(parts) or 'not digested'}"
    if twin is not None:
        return "it was stored and is no longer held (evicted, cleared, or refused by a full store)"
    return _differences(own, nearest)


def differing_parts(one: Mapping[str, bytes], other: Mapping[str, bytes]) -> list[str]:
    """The names of the parts of two namespaces that differ, at most six."""
    names = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    return names if len(names) <= 6 else [*names[:5], f"{len(names) - 5} more"]


def _likeness(one: _Call, other: _Call) -> tuple[int, int]:
    return -len({*one.metas} ^ {*other.metas}), -len({*one.shared} ^ {*other.shared})


def _agreement(own: _Known, other: _Known) -> int:
    return sum(a is not None and a == b for a, b in zip(own.digests, other.digests, strict=False))


def _differences(own: _Known, other: _Known) -> str:
    if own.metas != other.metas:
        changed = [mine for mine in own.metas if mine not in other.metas]
        theirs = [meta for meta in other.metas if meta not in own.metas]
        return f"nothing stored has this form: {_form(changed)}; the nearest has {_form(theirs)}"
    if own.shared != other.shared:
        before = dict(other.shared)
        names = [path for path, value in own.shared if before.get(path) != value]
        names += [path for path in before if path not in dict(own.shared)]
        return f"an argument that all rows share differs from the nearest stored row: {', '.join(names)}"
    paths = [str(meta[0]) for meta in own.metas]
    if not len(own.digests) == len(other.digests) == len(paths):
        return "not seen before"
    pairs = list(zip(paths, own.digests, other.digests, strict=True))
    names = [path for path, a, b in pairs if a is not None and b is not None and a != b]
    if not names and None in (*own.digests, *other.digests):  # it may be that, and it was not looked at
        return "not seen before"
    return f"not seen before; differs from the nearest stored row in {', '.join(names) or 'its containers'}"


def _form(metas: Sequence[tuple[object, ...]]) -> str:
    return "; ".join(" ".join(str(item) for item in meta) for meta in metas) or "no such argument"
