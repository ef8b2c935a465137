"""The readable description beside the rows of a namespace: written whole, read warily, and compared."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from .names import MANIFEST

__all__ = ["TEMPORARY", "differences", "merged", "read_manifest", "write_manifest"]

TEMPORARY: Final = re.compile(r"\.manifest-[0-9a-f]{16}\.tmp")
"""A manifest that is being written, or that a killed process left."""

_MAX_BYTES: Final = 4 << 20
_MAX_SHOWN: Final = 60

# --- files ----------------------------------------------------------------------------------------------


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Puts the description of a namespace into its folder; a reader sees the old one or the new one, whole.

    Numbers that JSON does not have are written as texts, and so is what is no plain value. Of a description that
    is too long for its readers, the longest facts are left out.

    Raises:
        OSError: it could not be written.
    """
    content = _content_of(facts)
    path = folder / f".manifest-{os.urandom(8).hex()}.tmp"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(path, folder / MANIFEST)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The description of the namespace in this folder; ``None`` where there is none that can be read."""
    try:
        descriptor = os.open(folder / MANIFEST, os.O_RDONLY | _WARILY)
    except (OSError, ValueError):
        return None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_BYTES:
            return None
        with open(descriptor, "rb", closefd=False) as file:
            facts = json.loads(file.read(_MAX_BYTES + 1).decode(), parse_constant=_refuse)
    except (OSError, ValueError, RecursionError):
        return None
    finally:
        os.close(descriptor)
    return facts if isinstance(facts, dict) else None


# Neither through a link nor waiting on a pipe, where the system can tell.
_WARILY: Final = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


def _content_of(facts: Mapping[str, Any]) -> bytes:
    left = {str(name): _plain(value) for name, value in facts.items()}
    content = _dumped(left)
    while len(content) > _MAX_BYTES:
        longest = max(left, key=lambda name: len(_dumped(left[name])))
        left[longest] = "too long to be told"
        content = _dumped(left)
    return content


def _dumped(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _plain(value: object) -> object:
    """A value as JSON has it."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return str(value)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number")


# --- what differs ---------------------------------------------------------------------------------------

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


def merged(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a manifest after some were told anew; what is under "checked" is merged entry by entry.

    >>> merged({"a": 1, "checked": {"x": [1]}}, {"b": 2, "checked": {"y": [2]}})
    {'a': 1, 'checked': {'x': [1], 'y': [2]}, 'b': 2}
    """
    facts = {**(old or {}), **new}
    checks = [found for found in ((old or {}).get("checked"), new.get("checked")) if isinstance(found, Mapping)]
    if checks:
        facts["checked"] = {name: value for check in checks for name, value in check.items()}
    return facts
