"""Say why a row hits or misses: what in its key, or in the namespace, differs from the nearest thing stored."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .keys import Keyed

__all__ = ["Explanation", "Memory", "differing_parts"]

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


@dataclass(frozen=True, slots=True)
class _Known:
    """What is remembered of a stored row."""

    namespace: str
    metas: tuple[tuple[object, ...], ...]
    shared: tuple[tuple[str, bytes], ...]
    digests: tuple[bytes, ...]


class Memory:
    """Remembers what the keys of the latest computed rows were made of."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, _Known] = OrderedDict()

    def remember(
        self, namespace: str, keyed: Keyed, shared: tuple[tuple[str, bytes], ...], places: Sequence[int]
    ) -> None:
        """Remember rows that were computed."""
        digests = _part_digests(keyed)
        with self._lock:
            for place in places[-_REMEMBERED_ROWS:]:
                own = tuple(column[place] for column in digests)
                self._known[keyed.keys[place]] = _Known(namespace, keyed.metas, shared, own)
            while len(self._known) > _REMEMBERED_ROWS:
                self._known.popitem(last=False)

    def explain(
        self,
        namespace: str,
        keyed: Keyed,
        shared: tuple[tuple[str, bytes], ...],
        found: Sequence[bool],
        namespaces: Mapping[str, Mapping[str, bytes]],
    ) -> list[Explanation]:
        """One explanation per row of a call."""
        digests = _part_digests(keyed)
        with self._lock:
            known = dict(self._known)
        answers = []
        for place, key in enumerate(keyed.keys):
            if found[place]:
                answers.append(Explanation(place, True, "stored in this namespace"))
                continue
            own = _Known(namespace, keyed.metas, shared, tuple(column[place] for column in digests))
            answers.append(Explanation(place, False, _why(key, own, known, namespaces)))
        return answers


def _part_digests(keyed: Keyed) -> list[list[bytes]]:
    if len(keyed.parts) == 1 or len(keyed.keys) == 0:
        return [keyed.keys]
    sizes = sum(getattr(getattr(part, "tensor", None), "nbytes", 0) for part in keyed.parts)
    if sizes > _REMEMBERED_BYTES:
        return [keyed.keys]
    return [part.digests(0) for part in keyed.parts]


def _why(key: bytes, own: _Known, known: Mapping[bytes, _Known], namespaces: Mapping[str, Mapping[str, bytes]]) -> str:
    if not known:
        return "nothing was stored by this module yet"
    twin = known.get(key)
    if twin is not None and twin.namespace != own.namespace:
        parts = differing_parts(namespaces.get(own.namespace, {}), namespaces.get(twin.namespace, {}))
        return f"its input is known, but under another state or context: {', '.join(parts) or 'not digested'}"
    if twin is not None:
        return "it was stored and is no longer held (evicted, cleared, or refused by a full store)"
    nearest = max(known.values(), key=lambda other: _agreement(own, other))
    return _differences(own, nearest)


def differing_parts(one: Mapping[str, bytes], other: Mapping[str, bytes]) -> list[str]:
    """The names of the parts of two namespaces that differ, at most six."""
    names = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    return names if len(names) <= 6 else [*names[:5], f"{len(names) - 5} more"]


def _agreement(own: _Known, other: _Known) -> tuple[int, int, int]:
    return (
        sum(a == b for a, b in zip(own.metas, other.metas, strict=False)),
        len(set(own.shared) & set(other.shared)),
        sum(a == b for a, b in zip(own.digests, other.digests, strict=False)),
    )


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
    if len(own.digests) == len(other.digests) == len(paths):  # a large row was not digested part by part
        names = [path for path, a, b in zip(paths, own.digests, other.digests, strict=True) if a != b]
        return f"not seen before; differs from the nearest stored row in {', '.join(names) or 'its containers'}"
    return "not seen before"


def _form(metas: Sequence[tuple[object, ...]]) -> str:
    return "; ".join(" ".join(str(item) for item in meta) for meta in metas) or "no such argument"
