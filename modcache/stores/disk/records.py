"""Rows as records: the bytes of all their leaves side by side, in one matrix that nobody else holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ...tensors import memory_of
from ..index import Places

if TYPE_CHECKING:
    import torch

    from ...rows import Rows

__all__ = ["matrix_of"]


def matrix_of(rows: Rows, chosen: Places) -> npt.NDArray[np.uint8]:
    """The bytes of some of the rows, copied, one record a row.

    >>> import torch
    >>> from modcache.rows import SINGLE, Layout, Rows
    >>> pairs = Rows(Layout(SINGLE, ((torch.uint8, (2,)),)), (torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8),))
    >>> matrix_of(pairs, np.array([1]))
    array([[3, 4]], dtype=uint8)
    """
    sizes = rows.layout.leaf_bytes
    matrix, place = np.empty((len(chosen), sum(sizes)), np.uint8), 0
    for tensor, size in zip(rows.tensors, sizes, strict=True):
        if size:
            values = _settled(tensor)
            source = np.frombuffer(memory_of(values), np.uint8).reshape(len(values), size)
            # All of them: one copy, without a look at the places.
            matrix[:, place : place + size] = source if len(chosen) == len(source) else source[chosen]
        place += size
    return matrix


def _settled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
