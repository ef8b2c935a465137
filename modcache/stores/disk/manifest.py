"""The readable description beside the rows of a namespace: written whole, and read warily."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from .names import MANIFEST

__all__ = ["TEMPORARY", "manifest_growth", "merged", "read_manifest", "write_manifest"]

TEMPORARY: Final = re.compile(r"\.manifest-[0-9a-f]{16}\.tmp")
"""A manifest that is being written, or that a killed process left."""

_MAX_BYTES: Final = 4 << 20

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


def manifest_growth(folder: Path, facts: Mapping[str, Any]) -> int:
    """How many bytes more `write_manifest` would leave there than there are."""
    try:
        found = os.lstat(folder / MANIFEST).st_size
    except OSError:
        found = 0
    return len(_content_of(facts)) - found


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
