"""Trim and pad rows of tokens around the run: what is computed and stored has no padding, what is returned has."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from ..batch import Batch
from ..outputs import UnknownClassError, token_dims_of, with_token_dims
from ..rows import Layout, Lent, Rows, bytes_of, tensor_of
from .tokens import TokenRows

__all__ = ["fit_tokens", "pad_lent", "pad_rows", "token_dims", "unpad_rows"]


def fit_tokens(batch: Batch, tokens: TokenRows, width: int) -> Batch:
    """The batch with its per-token columns cut, or padded with zeros, to ``width`` tokens."""
    columns = tuple(
        column._replace(value=_fitted(column.value, width)) if column.path in tokens.paths else column
        for column in batch.columns
    )
    return batch._replace(columns=columns)


def _fitted(value: torch.Tensor, width: int) -> torch.Tensor:
    if width <= value.shape[1]:
        return value[:, :width]
    more = torch.zeros(
        (value.shape[0], width - value.shape[1], *value.shape[2:]), dtype=value.dtype, device=value.device
    )
    return torch.cat([value, more], 1)


def token_dims(one: Layout, width: int, other: Layout, other_width: int) -> tuple[tuple[int, ...], ...] | None:
    """The row dimensions of each leaf that are tokens: those that went from one width to the other.

    ``None`` if the two runs do not differ by their widths alone, so that it cannot be told.
    """
    if one.tree != other.tree or len(one.leaves) != len(other.leaves):
        return None
    found = []
    for (dtype, shape), (other_dtype, other_shape) in zip(one.leaves, other.leaves, strict=True):
        if dtype != other_dtype or len(shape) != len(other_shape):
            return None
        moved = tuple(dim for dim, (size, new) in enumerate(zip(shape, other_shape, strict=True)) if size != new)
        if any(shape[dim] != width or other_shape[dim] != other_width for dim in moved):
            return None
        found.append(moved)
    return tuple(found)


def unpad_rows(rows: Rows, lengths: np.ndarray, dims: tuple[tuple[int, ...], ...]) -> list[tuple[np.ndarray, Rows]]:
    """The rows in groups of one length, each cut to it; the layouts say which dimensions are tokens."""
    tree = with_token_dims(rows.layout.tree, dims)
    groups = []
    for length in np.unique(lengths).tolist():
        places = np.flatnonzero(lengths == length)
        taken = rows.take(places.tolist()).tensors
        tensors = tuple(_cut(tensor, length, leaf_dims) for tensor, leaf_dims in zip(taken, dims, strict=True))
        leaves = tuple((tensor.dtype, tuple(tensor.shape[1:])) for tensor in tensors)
        groups.append((places, Rows(Layout(tree, leaves), tensors)))
    return groups


def _cut(tensor: torch.Tensor, length: int, dims: tuple[int, ...]) -> torch.Tensor:
    for dim in dims:
        tensor = tensor.narrow(dim + 1, 0, length)
    return tensor.contiguous()


def pad_rows(count: int, width: int, parts: Sequence[tuple[np.ndarray, Rows]]) -> Rows | None:
    """``count`` rows in order, the token dimensions of every part padded with zeros to ``width``.

    ``None`` if the parts do not agree in everything but the size of those dimensions, or cannot be read.
    """
    layout = _common([rows.layout for _, rows in parts], width)
    if layout is None:
        return None
    tensors = []
    for leaf, dims in enumerate(token_dims_of(layout.tree)):
        own = [(places, rows.tensors[leaf]) for places, rows in parts]
        if all(tensor.device.type == "cpu" for _, tensor in own) and dims in _FIRST:
            whole = [(places, bytes_of(tensor), np.arange(len(places))) for places, tensor in own]
            tensors.append(_pad_bytes(count, whole, *layout.leaves[leaf]))
        else:
            tensors.append(_pad_values(count, own, *layout.leaves[leaf]))
    return Rows(layout, tuple(tensors))


def pad_lent(count: int, width: int, parts: Sequence[Lent]) -> Rows | None:
    """What `pad_rows` gives, of rows that a store lends; ``None`` also if tokens do not come first in them."""
    layout = _common([part.layout for part in parts], width)
    if layout is None or not all(dims in _FIRST for dims in token_dims_of(layout.tree)):
        return None
    tensors = []
    for number, leaf in enumerate(layout.leaves):
        own = [(part.positions, part.leaves[number], part.rows) for part in parts]
        tensors.append(_pad_bytes(count, own, *leaf))
    return Rows(layout, tuple(tensors))


_FIRST: tuple[tuple[int, ...], ...] = ((), (0,))
"""Tokens that come first in a row are the beginning of its bytes: a fifth of the time of placing values."""

_FEW = 8  # rows up to which one by one is quicker than all at once, which copies them twice


def _common(layouts: Sequence[Layout], width: int) -> Layout | None:
    """The layout that all of these have when they are padded, if there is one."""
    try:
        first, *others = [_padded(layout, width) for layout in layouts]
    except (UnknownClassError, ValueError):
        return None
    return first if all(other == first for other in others) else None


_LeafParts = Sequence[tuple[np.ndarray, torch.Tensor]]


def _pad_bytes(
    count: int,
    parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    dtype: torch.dtype,
    shape: tuple[int, ...],
) -> torch.Tensor:
    """Rows of byte matrices at their places; each part is places, a matrix, and numbers of rows in it."""
    width = dtype.itemsize * torch.Size(shape).numel()
    places, held, rows = parts[0]
    if len(places) == count and held.shape[1] == width:  # nothing to pad
        return tensor_of(held.take(rows, axis=0), dtype, shape)
    joined = np.empty((count, width), np.uint8)
    for places, held, rows in parts:
        size = held.shape[1]
        if len(places) <= _FEW:
            for place, row in zip(places.tolist(), rows.tolist(), strict=True):
                joined[place, :size] = held[row]
                joined[place, size:] = 0
        else:
            joined[places, :size] = held[rows]
            joined[places, size:] = 0
    return tensor_of(joined, dtype, shape)


def _pad_values(count: int, parts: _LeafParts, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    device = parts[-1][1].device
    joined = torch.zeros((count, *shape), dtype=dtype, device=device)
    for places, tensor in parts:
        _place(joined, places, tensor.to(device))
    return joined


def _place(joined: torch.Tensor, places: np.ndarray, values: torch.Tensor) -> None:
    region = joined
    for dim, size in enumerate(values.shape[1:], start=1):
        region = region.narrow(dim, 0, size)
    region[torch.from_numpy(places).to(joined.device)] = values


@functools.lru_cache(maxsize=4096)
def _padded(layout: Layout, width: int) -> Layout:
    leaves = tuple(
        (dtype, tuple(width if dim in dims else size for dim, size in enumerate(shape)))
        for (dtype, shape), dims in zip(layout.leaves, token_dims_of(layout.tree), strict=True)
    )
    return Layout(layout.tree, leaves)
