"""Digest the columns of a batch: each kind of column in its own way, then all columns of a row together."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from ..batch import Batch, Column
from ..digest import KEY_SCHEME, digest, encode, frame, seed_of
from ..row_digests import row_digests, tensor_row_digests
from ..rows import bytes_of
from ..tensors import NoContentError, is_ordinary, is_plain, memory_of, plain_memory, settled
from .files import path_key
from .inside import files_key
from .registry import encode_registered, has_extractor

__all__ = [
    "Digested",
    "Meta",
    "Part",
    "Values",
    "files_part",
    "frame_seed",
    "part_of",
    "paths_part",
    "row_keys",
    "shared_bytes",
    "shared_digests",
    "text_digests",
    "texts_part",
]

Meta = tuple[object, ...]
"""What is the same for all rows of a column: path, kind, dtype, trailing shape. Hashable."""

_SMALL_ROW = 4096
"""Bytes up to which the rows of several tensors are laid side by side and digested in one go."""


class Part(Protocol):
    """How the rows of one column become keys."""

    @property
    def meta(self) -> Meta:
        """What is the same for all rows."""

    def digests(self, seed: int) -> list[bytes]:
        """One digest per row."""

    def matrix(self) -> np.ndarray | None:
        """The rows as a small byte matrix, if they are one."""


class Values(NamedTuple):
    """The rows of a tensor: their bytes in C order."""

    meta: Meta
    tensor: torch.Tensor

    def digests(self, seed: int) -> list[bytes]:
        """One digest per row."""
        return tensor_row_digests(self.tensor, seed)

    def matrix(self) -> np.ndarray | None:
        """The rows as a byte matrix, if they are small."""
        tensor = self.tensor
        count = tensor.shape[0]
        width = tensor.numel() // max(count, 1) * tensor.element_size()
        if not 0 < width <= _SMALL_ROW:
            return None
        memory = plain_memory(tensor) if is_plain(tensor) else None
        if memory is not None:
            return np.frombuffer(memory, np.uint8).reshape(count, width)
        values = settled(tensor).contiguous()
        if values.data_ptr() != tensor.data_ptr():
            return bytes_of(values)
        return np.frombuffer(memory_of(values), np.uint8).reshape(count, width)  # kept alive by self.tensor


class Digested(NamedTuple):
    """Rows that become bytes one by one."""

    meta: Meta
    rows: Sequence[Any]
    to_bytes: Callable[[Any], bytes]

    def digests(self, seed: int) -> list[bytes]:
        """One digest per row."""
        return list(map(digest, map(self.to_bytes, self.rows), itertools.repeat(seed)))

    def matrix(self) -> np.ndarray | None:
        """There is none."""
        return None


# --- columns to parts -----------------------------------------------------------------------------------


def part_of(column: Column) -> Part:
    """How a column is digested, by the type of its value.

    Raises:
        NoContentError: its rows have no content.
    """
    value = column.value
    if column.single:
        return _listed(column, [value])
    if isinstance(value, torch.Tensor):
        if is_ordinary(value):
            return Values((column.path, "tensor", value.dtype, tuple(value.shape[1:])), value)
        return _registered_rows(column)
    if isinstance(value, np.ndarray):
        return _array(column)
    return _listed(column, value)


def _listed(column: Column, rows: Sequence[Any]) -> Part:
    types = set(map(type, rows))
    if types == {str}:
        return texts_part(column, rows)
    if types and all(issubclass(cls, os.PathLike) and not has_extractor(cls) for cls in types):
        return Digested((column.path, "path", "content", *_holder(column)), rows, _object_bytes)
    return Digested((column.path, "objects", *_holder(column)), rows, _object_bytes)


def _object_bytes(value: object) -> bytes:
    return encode(value, encode_registered)


def _holder(column: Column) -> tuple[str, bool]:
    return type(column.value).__name__ if not column.single else "", column.single


_utf8 = functools.partial(str.encode, encoding="utf-8", errors="surrogatepass")


def texts_part(column: Column, rows: Sequence[str]) -> Part:
    """Rows of text, by their UTF-8 bytes."""
    return Texts((column.path, "text", *_holder(column)), rows)


class Texts(NamedTuple):
    """Rows of text: their UTF-8 bytes."""

    meta: Meta
    rows: Sequence[str]

    def digests(self, seed: int) -> list[bytes]:
        """One digest per row."""
        return text_digests(self.rows, seed)

    def matrix(self) -> np.ndarray | None:
        """There is none."""
        return None


def text_digests(rows: Sequence[str], seed: int) -> list[bytes]:
    """One digest per text."""
    seeds = itertools.repeat(seed)
    try:
        return list(map(digest, map(str.encode, rows), seeds))
    except UnicodeEncodeError:  # lone surrogates
        return list(map(digest, map(_utf8, rows), seeds))


def paths_part(column: Column, rows: Sequence[Any], check: str) -> Part:
    """Rows that are paths of files."""
    return Digested((column.path, "path", check, *_holder(column)), rows, functools.partial(path_key, check=check))


def files_part(column: Column, rows: Sequence[Any], check: str) -> Part:
    """Rows that are paths of files, or have such inside."""
    to_bytes = functools.partial(_path_or_files, check=check, single=column.single)
    return Digested((column.path, "path", check, *_holder(column)), rows, to_bytes)


def _path_or_files(row: Any, check: str, single: bool) -> bytes:
    """The key of a row: of a path what it names, of anything else also what it is."""
    named = isinstance(row, os.PathLike) or (isinstance(row, str | bytes) and not single)
    return path_key(row, check) if named else files_key(row, check)


def _array(column: Column) -> Part:
    array: np.ndarray = column.value
    if has_extractor(type(array)):
        return _registered_rows(column)
    if array.dtype.hasobject or type(array) is not np.ndarray:
        return Digested((column.path, "array of objects", *_holder(column)), list(array), _object_bytes)
    kind = array.dtype.str if array.dtype.names is None else str(array.dtype.descr)
    width = array[:1].nbytes
    rows = np.ascontiguousarray(array).reshape(-1).view(np.uint8) if width else np.empty(0, np.uint8)
    bytes_tensor = torch.from_numpy(_writable(rows).reshape(len(array), width))
    return Values((column.path, "array", kind, array.shape[1:]), bytes_tensor)


def _writable(rows: np.ndarray) -> np.ndarray:
    """Torch warns of arrays that are read-only; nothing here writes, so a copy keeps it quiet."""
    return rows if rows.flags.writeable else rows.copy()


def _registered_rows(column: Column) -> Part:
    cls = type(column.value)
    if not has_extractor(cls):
        raise NoContentError(
            f"{column.path} is a {cls.__module__}.{cls.__qualname__}, which has no content to make a key of"
        )
    return Digested((column.path, "registered", cls.__qualname__), list(column.value), _object_bytes)


# --- parts to keys --------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _frame_bytes(metas: tuple[Meta, ...], containers: tuple[tuple[str, str, int], ...]) -> bytes:
    return frame(b"rows", encode(KEY_SCHEME) + encode(metas) + encode(containers))


def frame_seed(metas: tuple[Meta, ...], batch: Batch) -> int:
    """The seed that stands for all that the rows of a call have in common, shared arguments by content.

    Raises:
        NoContentError: a shared argument has no content.
    """
    common = _frame_bytes(metas, batch.containers)
    if not batch.shared:
        return _seed(common)
    return seed_of(common + b"".join(encode(path) + shared_bytes(path, value) for path, value in batch.shared))


_seed = functools.lru_cache(maxsize=4096)(seed_of)


def shared_bytes(path: str, value: object) -> bytes:
    """The framed bytes of an argument that all rows share.

    Raises:
        NoContentError: naming the argument.
    """
    try:
        return _object_bytes(value)
    except NoContentError as error:
        raise NoContentError(f"{path}: {error}", error.remedy, shared=True) from None
    except OSError as error:  # where to write to, maybe: only the module knows whether it reads that file
        raise NoContentError(f"{path} names a file that cannot be read ({error})") from None


def row_keys(parts: Sequence[Part], seed: int) -> list[bytes]:
    """One key per row, of all its parts: small tensors side by side, everything else by its digest."""
    if len(parts) == 1:
        return parts[0].digests(seed)
    matrices = []
    for part in parts:
        matrix = part.matrix()
        if matrix is None:
            digests = b"".join(part.digests(0))
            matrix = np.frombuffer(digests, np.uint8).reshape(-1, 16)
        matrices.append(matrix)
    joined = np.concatenate(matrices, axis=1)
    count, width = joined.shape
    return row_digests(joined.data.cast("B"), count, width, seed)


def shared_digests(batch: Batch) -> tuple[tuple[str, bytes], ...]:
    """Path and digest of each argument that all rows share, to be compared in an explanation.

    It is asked after the forward, so no file is read and no registered function asked: these count by their class.
    """
    return tuple((path, _said(value)) for path, value in batch.shared)


def _said(value: object) -> bytes:
    try:
        return digest(encode(value, _class_of))
    except Exception:  # what it was when its key was made is gone
        return b""


def _class_of(value: object) -> bytes | None:
    cls = type(value)
    return frame(b"class", encode(f"{cls.__module__}.{cls.__qualname__}")) if has_extractor(cls) else None
