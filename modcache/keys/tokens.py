"""Rows of token ids whatever their padding: find their lengths, and key them unpadded."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..batch import Batch, Column
from ..digest import digest
from ..tensors import is_plain, is_readable, memory_of, plain_memory, settled
from .parts import Meta, part_of

__all__ = [
    "TokenPlaces",
    "TokenRows",
    "find_tokens",
    "name_of",
    "token_keys",
    "token_metas",
    "token_places",
]

_PER_TOKEN = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids", "special_tokens_mask"})
"""Arguments whose values beyond a row's length are padding by definition."""


class TokenRows(NamedTuple):
    """Which columns of a batch are per token, and how long each row is.

    Args:
        lengths: int64, tokens of each row, at least 1.
        width: the padded length of the batch.
        paths: paths of the per-token columns, the attention mask among them.
        mask: path of the attention mask.
    """

    lengths: np.ndarray
    width: int
    paths: tuple[str, ...]
    mask: str


def find_tokens(batch: Batch) -> TokenRows | None:
    """The token rows of a batch, or ``None`` unless it has ``input_ids`` and a mask that pads on the right."""
    ids, mask = _named(batch, "input_ids"), _named(batch, "attention_mask")
    if ids is None or mask is None or ids.value.dim() != 2 or ids.value.shape != mask.value.shape:
        return None
    lengths = _right_padded(_array(mask.value))
    if lengths is None:
        return None
    width = int(ids.value.shape[1])
    paths = tuple(column.path for column in batch.columns if _is_per_token(column, lengths, width))
    return TokenRows(lengths, width, paths, mask.path)


def _named(batch: Batch, name: str) -> Column | None:
    for column in batch.columns:
        if name_of(column.path) == name and isinstance(column.value, torch.Tensor) and is_readable(column.value):
            return column
    return None


@functools.lru_cache(maxsize=1024)
def name_of(path: str) -> str:
    """The name of an argument or of the item of one, without where it lies."""
    return re.split(r"\.|\['", path)[-1].rstrip("]'")


def _array(tensor: torch.Tensor) -> np.ndarray:
    """The values of an integer or float tensor of the user as a private array."""
    values = settled(tensor)
    dtype = torch.float64 if values.dtype.is_floating_point else values.dtype  # numpy has no bfloat16
    array: np.ndarray = values.to(dtype, copy=True).numpy()
    return array


def _right_padded(mask: np.ndarray) -> np.ndarray | None:
    """The length of each row of a mask of ones followed by zeros, or ``None`` if it is another kind of mask."""
    ones = mask == 1
    if not mask.shape[1] or not ones[:, 0].all():
        return None
    lengths: np.ndarray = ones.argmin(axis=1)  # where the first one that is missing would be; a quarter of a sum's time
    if not lengths.all():  # none is missing
        lengths[lengths == 0] = mask.shape[1]
    right = np.count_nonzero(ones) == np.count_nonzero(mask) == lengths.sum()
    return lengths if right else None


def _is_per_token(column: Column, lengths: np.ndarray, width: int) -> bool:
    """Known names, or anything of the batch's width that is zero beyond each row's length: nothing is lost then."""
    value = column.value
    if not isinstance(value, torch.Tensor) or not is_readable(value) or value.dim() < 2 or value.shape[1] != width:
        return False
    if name_of(column.path) in _PER_TOKEN:
        return True
    held = settled(value).contiguous()
    if not held.numel():
        return False
    beyond = torch.arange(width, device="cpu") >= torch.from_numpy(lengths)[:, None]
    # Of one value, any stride is contiguous; a view as bytes asks for 1, which a new dimension has.
    return not bool(held.view(len(held), width, -1).unsqueeze(-1).view(torch.uint8)[beyond].any())


# --- keys -----------------------------------------------------------------------------------------------


def token_metas(batch: Batch, tokens: TokenRows) -> tuple[Meta, ...]:
    """What all rows have in common: the padded length is not part of it."""
    metas: list[Meta] = [("tokens",)]
    for column in batch.columns:
        if column.path in tokens.paths:
            metas.append((column.path, "per token", column.value.dtype, tuple(column.value.shape[2:])))
        else:
            metas.append(part_of(column).meta)
    return tuple(metas)


def token_keys(batch: Batch, tokens: TokenRows, seed: int) -> list[bytes]:
    """One key per row: its unpadded ids, its other per-token values up to its length, and the rest of the row.

    All per-token parts of a row have its length and everything else has a width of its own, so the length of
    the joined bytes says where each part begins.
    """
    held = [
        settled(column.value).contiguous()
        for column in batch.columns
        if column.path in tokens.paths and column.path != tokens.mask
    ]
    rest = [part_of(column).digests(0) for column in batch.columns if column.path not in tokens.paths]
    return _unpadded_keys([memory_of(values) for values in held], rest, tokens.lengths, tokens.width, seed)


def _unpadded_keys(
    held: Sequence[memoryview], rest: Sequence[list[bytes]], lengths: np.ndarray, width: int, seed: int
) -> list[bytes]:
    count, own = len(lengths), lengths.tolist()
    pieces = [
        [memory[at : at + size * length] for at, length in zip(itertools.count(0, size * width), own)]
        for memory, size in ((memory, len(memory) // (count * width)) for memory in held)
    ]
    rows = pieces[0] if len(pieces) == 1 and not rest else map(b"".join, zip(*pieces, *rest, strict=True))
    return list(map(digest, rows, itertools.repeat(seed)))


class TokenPlaces(NamedTuple):
    """Where the token rows of calls of one outline are, whose tensors are plain and all per token by their names.

    Args:
        like: the token rows of such a call.
        held: places among the values of a call of what is per token, in the order of the columns, without the mask.
        mask: the place of the mask.
        metas: what the rows of each column have in common, with the padding.
    """

    like: TokenRows
    held: tuple[int, ...]
    mask: int
    metas: tuple[Meta, ...]

    def tokens(self, values: Sequence[torch.Tensor]) -> TokenRows | None:
        """The token rows of a call of this outline, or ``None`` if its mask is of another kind."""
        mask = values[self.mask]
        memory = plain_memory(mask)
        if memory is None:
            return None
        lengths = _right_padded(np.frombuffer(memory, _MASKS[mask.dtype]).reshape(mask.shape))
        return None if lengths is None else TokenRows(lengths, *self.like[1:])

    def keys(self, values: Sequence[torch.Tensor], seed: int) -> list[bytes] | None:
        """What `token_keys` gives for a call of this outline, or ``None`` if it is to be looked at in full."""
        tokens = self.tokens(values)
        held = [plain_memory(values[place]) for place in self.held]
        if tokens is None or None in held:
            return None
        return _unpadded_keys(held, (), tokens.lengths, tokens.width, seed)  # type: ignore[arg-type]  # none is None


_MASKS = {torch.bool: np.bool_, torch.uint8: np.uint8, torch.int32: np.int32, torch.int64: np.int64}


def token_places(batch: Batch, tokens: TokenRows, places: Sequence[int]) -> TokenPlaces | None:
    """Where the token rows of such calls are, or ``None`` if that takes more than their outline.

    Args:
        batch: the call as rows.
        tokens: its token rows.
        places: the place of each column among the values of the call.
    """
    at = {column.path: place for column, place in zip(batch.columns, places, strict=True)}
    named = all(column.path in tokens.paths and name_of(column.path) in _PER_TOKEN for column in batch.columns)
    mask = next(column.value for column in batch.columns if column.path == tokens.mask)
    if not named or mask.dtype not in _MASKS or not all(is_plain(column.value) for column in batch.columns):
        return None
    held = tuple(place for path, place in at.items() if path != tokens.mask)
    return TokenPlaces(tokens, held, at[tokens.mask], tuple(part_of(column).meta for column in batch.columns))
