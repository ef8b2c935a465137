"""What differs between the descriptions of two namespaces, in words for a reader."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

__all__ = ["differences"]

_MAX_SHOWN: Final = 60

_OF_THE_ROWS: Final = frozenset(
    {"namespace", "fingerprint", "rows", "bytes", "made", "wrapped", "checked", "parts", "bookkeeping"}
)
"""Facts that differ anyhow, or are told in other words."""

_FIRST: Final = ("class", "weights", "dtypes", "key", "prepare", "version", "context", "key_scheme")
_NAMES: Final = {"dtypes": "dtype", "key_scheme": "key scheme"}
_DIGEST: Final = re.compile(r"[0-9a-f]{16,}")
_READABLE: Final = re.compile(r" of |^global |^(prepare|key function|in training mode)$")  # the others are weights


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, ...]:
    """What a reader should know to see why two descriptions name two namespaces: short texts, "theirs -> mine".

    >>> theirs = {"class": "Encoder", "weights": "0" * 32, "made_with": {"transformers": "4.56"}}
    >>> differences({"class": "Encoder", "weights": "1" * 32, "made_with": {"transformers": "5.0"}}, theirs)
    ('weights', 'transformers 4.56 -> 5.0')

    Args:
        mine: the description of the newer one.
        theirs: that of the one to compare with.
    """
    names = [*_FIRST, *sorted((mine.keys() | theirs.keys()) - {*_FIRST, *_OF_THE_ROWS})]
    found = [text for name in names for text in _difference(_NAMES.get(name, name), mine.get(name), theirs.get(name))]
    parts = _parts_that_differ(mine.get("parts"), theirs.get("parts"))
    if parts:
        found.append(parts)
    if not found and mine.get("fingerprint") != theirs.get("fingerprint"):
        found.append("code or configuration")
    return tuple(found)


def _difference(name: str, mine: object, theirs: object) -> Iterator[str]:
    if mine == theirs:
        return
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        for inner in sorted(mine.keys() | theirs.keys()):
            yield from _difference(str(inner), mine.get(inner), theirs.get(inner))
    elif _is_digest(mine) or _is_digest(theirs):
        yield name
    else:
        yield f"{name} {_shown(theirs)} -> {_shown(mine)}"


def _parts_that_differ(mine: object, theirs: object) -> str:
    """The parts of the module that are not weights and that differ, the first of them by name."""
    if not isinstance(mine, Mapping) or not isinstance(theirs, Mapping):
        return ""
    names = [str(name) for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name)]
    named = [name for name in names if _READABLE.search(name)]
    more = f" and {len(named) - 2} more" if len(named) > 2 else ""
    return ", ".join(named[:2]) + more


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _shown(value: object) -> str:
    items = value if isinstance(value, list | tuple) else [value]
    text = ", ".join(["none" if item is None else str(item).removeprefix("torch.") for item in items])
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."
