"""Keys of rows that have paths of files somewhere inside: the files count as well as what names them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from ..digest import encode, frame
from .files import path_key
from .registry import encode_registered

__all__ = ["files_key", "holds_paths"]

_NO_FILE = frame(b"no file", b"")


def holds_paths(row: object) -> bool:
    """Whether a row is a text or a path, or has one inside of tuples, lists and mappings."""
    return any(isinstance(value, str | bytes | os.PathLike) for value in _inside(row))


def files_key(row: object, check: str) -> bytes:
    """The framed key of a row: all that is in it, and each file that a text in it is the path of.

    Which texts are paths cannot be known, so a text counts by itself and by its file, if there is one.

    Raises:
        NoContentError: something in it has no content.
        OSError: what opening the file of a ``pathlib`` path would raise.
    """

    def paths(value: object) -> bytes | None:
        return path_key(value, check) if isinstance(value, os.PathLike) else encode_registered(value)

    texts = (value for value in _inside(row) if isinstance(value, str | bytes) and check != "name")
    return encode(row, paths) + b"".join(_file(text, check) for text in texts)


def _inside(value: object) -> Iterator[object]:
    """What a row is made of: the items of its tuples, lists and mappings, or the row itself."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _inside(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _inside(item)
    else:
        yield value


def _file(text: str | bytes, check: str) -> bytes:
    try:
        return path_key(text, check) if os.path.isfile(text) else _NO_FILE
    except (OSError, ValueError):  # it vanished, may not be read, or cannot be a path
        return _NO_FILE
