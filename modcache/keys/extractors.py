"""How keys are made of the rows of a call: by type, and each of the ways that a user can ask for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..batch import Batch, Bound, Column, row
from ..digest import digest, encode, frame
from ..errors import UsageError, UsageTypeError
from .files import CHECKS, path_key
from .given import given_metas
from .inside import files_key, holds_paths
from .keyed import Keyed, as_they_are
from .parts import Digested, Part, files_part, frame_seed, part_of, paths_part, row_keys, shared_bytes
from .registry import key_from
from .tokens import find_tokens, name_of, token_keys, token_metas

__all__ = ["Extractor", "custom", "extractor_of", "path", "tensor", "text", "tokens", "whole_keyed"]


@dataclass(frozen=True, slots=True)
class Extractor:
    """Makes the keys of rows; this one goes by the types of the arguments.

    Every argument that it does not read stays in the key, by its type.
    """

    def __repr__(self) -> str:
        return "keys.Extractor()"

    @property
    def name(self) -> str:
        """How it is called in a manifest."""
        return "by type"

    @property
    def function(self) -> Callable[[Any], object] | None:
        """The user's function in it, whose code is part of the namespace."""
        return None

    def part(self, column: Column, batch: Batch) -> Part | None:
        """How this extractor reads a column of a batch; ``None`` to go by its type."""
        return None

    def whole(self, bound: Bound) -> bytes | None:
        """What a call that is one row is keyed by, where the extractor reads it; ``None`` to go by types."""
        return None

    def reads(self, batch: Batch) -> bool:
        """Whether there is anything in the batch that this extractor is for."""
        return True

    def reads_alike(self, batch: Batch) -> bool:
        """Whether calls of the same outline as this one are all read in the same way."""
        return True

    def __call__(self, bound: Bound, batch: Batch) -> Keyed:
        """The keys of the rows of a call.

        Raises:
            NoContentError: something in the call has no content.
            KeyExtractionError: the user's function gave something that cannot be a key.
        """
        parts = tuple([self.part(column, batch) or part_of(column) for column in batch.columns])
        metas = tuple([part.meta for part in parts])
        seed = frame_seed(metas, batch)
        return Keyed(row_keys(parts, seed), seed, metas, parts)


@dataclass(frozen=True, slots=True)
class _Text(Extractor):
    def __repr__(self) -> str:
        return "keys.text()"

    @property
    def name(self) -> str:
        return "text"

    def reads(self, batch: Batch) -> bool:
        return any(_holds(column, str) for column in batch.columns)


@dataclass(frozen=True, slots=True)
class _Tensor(Extractor):
    def __repr__(self) -> str:
        return "keys.tensor()"

    @property
    def name(self) -> str:
        return "tensor"

    def reads(self, batch: Batch) -> bool:
        return any(hasattr(column.value, "shape") for column in batch.columns)


@dataclass(frozen=True, slots=True)
class _Path(Extractor):
    check: str = "content"

    def __repr__(self) -> str:
        return "keys.path()" if self.check == "content" else f"keys.path({self.check!r})"

    @property
    def name(self) -> str:
        return f"path, by {self.check}"

    def reads(self, batch: Batch) -> bool:
        return any(self.part(column, batch) is not None for column in batch.columns)

    def part(self, column: Column, batch: Batch) -> Part | None:
        if _holds(column, str | bytes | os.PathLike):
            rows = [column.value] if column.single else column.value
            # Of bare texts the first is the path; what follows may be an option, or another path.
            named = not column.single or isinstance(column.value, os.PathLike) or column is _first_text(batch)
            return (paths_part if named else files_part)(column, rows, self.check)
        rows = _listed(column)
        return files_part(column, rows, self.check) if any(map(holds_paths, rows)) else None

    def whole(self, bound: Bound) -> bytes | None:
        first = next((name for name, value in bound if isinstance(value, str | bytes)), None)
        return b"".join(
            encode(name) + (path_key(value, self.check) if name == first else files_key(value, self.check))  # type: ignore[arg-type]
            for name, value in bound
        )


def _first_text(batch: Batch) -> Column | None:
    return next((column for column in batch.columns if isinstance(column.value, str | bytes)), None)


def _listed(column: Column) -> list[Any]:
    """The rows of a column that may hold paths."""
    value = column.value
    if isinstance(value, np.ndarray):
        return value.tolist() if value.dtype.kind in "USO" else []
    return list(value) if isinstance(value, list | tuple) else []


@dataclass(frozen=True, slots=True)
class _Tokens(Extractor):
    def __repr__(self) -> str:
        return "keys.tokens()"

    @property
    def name(self) -> str:
        return "tokens"

    def reads(self, batch: Batch) -> bool:
        return any(name_of(column.path) == "input_ids" for column in batch.columns)

    def reads_alike(self, batch: Batch) -> bool:
        names = {name_of(column.path) for column in batch.columns}
        return not {"input_ids", "attention_mask"} <= names  # else it goes by what the mask says

    def __call__(self, bound: Bound, batch: Batch) -> Keyed:
        found = find_tokens(batch)
        if found is None:
            # Named apart: without super(), which slots=True takes away from a dataclass.
            return Extractor.__call__(self, bound, batch)
        metas = token_metas(batch, found)
        seed = frame_seed(metas, batch)
        parts = tuple(part_of(column) for column in batch.columns)
        return Keyed(token_keys(batch, found, seed), seed, metas, parts, found)


@dataclass(frozen=True, slots=True)
class _Custom(Extractor):
    of_row: Callable[[Any], object]

    def __repr__(self) -> str:
        return f"keys.custom({self.of_row!r})"

    @property
    def name(self) -> str:
        named = getattr(self.of_row, "__qualname__", type(self.of_row).__qualname__)
        return f"custom {named}"

    @property
    def function(self) -> Callable[[Any], object] | None:
        return self.of_row

    def whole(self, bound: Bound) -> bytes | None:
        row = bound[0][1] if len(bound) == 1 else dict(bound)
        return key_from(self.of_row, row, "the key function")

    def __call__(self, bound: Bound, batch: Batch) -> Keyed:
        found = [
            key_from(self.of_row, row(bound, batch, place), f"the key function, on row {place},")
            for place in range(batch.size)
        ]
        metas = (("custom",), *given_metas(batch, 0)[1:])
        seed = frame_seed(metas, batch)
        part = Digested(("key", "custom"), found, as_they_are)
        return Keyed(part.digests(seed), seed, metas, (part,))


def _holds(column: Column, types: Any) -> bool:
    if column.single:
        return isinstance(column.value, types)
    value = column.value
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, types) for item in value)


def whole_keyed(extractor: Extractor, bound: Bound) -> Keyed:
    """The key of a call that is one row.

    Raises:
        NoContentError: an argument has no content.
    """
    content = extractor.whole(bound)
    if content is None:
        content = b"".join(encode(name) + shared_bytes(name, value) for name, value in bound)
    return Keyed([digest(frame(b"call", content))], 0, (("call",),), ())


def text() -> Extractor:
    """Rows of text, by their UTF-8 bytes; every character counts."""
    return _Text()


def path(check: str = "content") -> Extractor:
    """Rows that are paths of files.

    >>> path(check="stat").name
    'path, by stat'

    Args:
        check: ``"content"`` reads the file (an unchanged file is read once per process), ``"stat"`` trusts its
            absolute path, size, inode and times, ``"name"`` trusts its path as it was written.

    Raises:
        UsageError: an unknown ``check`` (a ``ValueError``).
    """
    if check not in CHECKS:
        raise UsageError(f"path(check=...) must be one of {', '.join(map(repr, CHECKS))}; found {check!r}")
    return _Path(check)


def tensor() -> Extractor:
    """Rows of tensors, by all of their values; this is what tensors get by default."""
    return _Tensor()


def tokens() -> Extractor:
    """Rows of token ids with a right-padding ``attention_mask``, by their unpadded ids.

    A text then hits whatever the length of its neighbours. Outputs are stored without their padding and come back
    padded with zeros, where the plain module gives what it computes for padding: do not use this if something
    reads outputs at masked positions. A batch that is padded otherwise is keyed with its padding.
    """
    return _Tokens()


def custom(function: Callable[[Any], object]) -> Extractor:
    """Rows by what a function says of them.

    >>> custom(lambda row: row["id"]).name
    'custom <lambda>'

    Args:
        function: gets one row (the row itself if one argument is per row, else a mapping of name to row); returns a
            bool, int, float, str, bytes, None or a tuple of these. Its code is part of the namespace.

    Raises:
        UsageTypeError: it is not callable (a ``TypeError``).
    """
    if not callable(function):
        raise UsageTypeError(f"custom(...) takes a function of one row; found {function!r}")
    return _Custom(function)


_NAMED: dict[str, Callable[[], Extractor]] = {"text": text, "path": path, "tensor": tensor, "tokens": tokens}


def extractor_of(key: object) -> Extractor:
    """The extractor that a ``key=`` option means.

    Raises:
        UsageError: an unknown name.
        UsageTypeError: neither a name, an extractor, a callable nor None.
    """
    if key is None:
        return Extractor()
    if isinstance(key, Extractor):
        return key
    if isinstance(key, str):
        if key not in _NAMED:
            names = ", ".join(map(repr, _NAMED))
            raise UsageError(f"key must be one of {names}, an extractor or a function of a row; found {key!r}")
        return _NAMED[key]()
    if any(key is maker for maker in (*_NAMED.values(), custom)):
        name = key.__name__  # type: ignore[attr-defined]
        raise UsageTypeError(f"key must be an extractor; found the function keys.{name}, which makes one: call it")
    if callable(key) and not (isinstance(key, type) and issubclass(key, Extractor)):
        return _Custom(key)
    raise UsageTypeError(f"key must be a name, an extractor from modcache.keys or a function of a row; found {key!r}")
