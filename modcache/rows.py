"""Rows of one layout as stacked tensors: take some, and join several parts into one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["SINGLE", "Layout", "Lent", "Rows", "bytes_of", "join_rows", "taken_as_whole", "tensor_of"]

SINGLE = "{}"
"""The tree of an output that is one tensor."""

Leaf = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Layout:
    """The dtypes and shapes of a record, and how its tensors form the output.

    Args:
        tree: the structure of the output as JSON text; `SINGLE` is a tensor and nothing else.
        leaves: dtype and shape (without the row dimension) of each tensor, in the order of the tree.
    """

    tree: str
    leaves: tuple[Leaf, ...]

    @property
    def leaf_bytes(self) -> tuple[int, ...]:
        """The bytes of one row in each tensor."""
        return tuple(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in self.leaves)

    @property
    def row_bytes(self) -> int:
        """The bytes of one record."""
        return sum(self.leaf_bytes)


@dataclass(frozen=True, slots=True)
class Rows:
    """Records of one layout, stacked: each tensor is ``(n, *shape)``, contiguous and detached."""

    layout: Layout
    tensors: tuple[torch.Tensor, ...]

    def take(self, places: Sequence[int]) -> Rows:
        """The rows at these places, as new memory."""
        return Rows(self.layout, tuple(_take(tensor, places) for tensor in self.tensors))


@dataclass(frozen=True, slots=True)
class Lent:
    """Records of one layout where they lie in the memory of their owner, who says how long that may be looked at.

    Args:
        layout: of the records.
        leaves: for each tensor of the layout a byte matrix, one record a row.
        rows: the rows that are lent, as int64.
        positions: what they are the answers to, ascending, as int64.
    """

    layout: Layout
    leaves: tuple[np.ndarray, ...]
    rows: np.ndarray
    positions: np.ndarray


def _take(tensor: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    index = torch.tensor(places, dtype=torch.int64, device=tensor.device)
    return taken_as_whole(tensor, lambda values: values.index_select(0, index))


# torch cannot index all of these dtypes, nor select from all of them; whole numbers of their size it can.
_AS_WHOLE = {
    torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64,
    torch.float8_e4m3fn: torch.int8, torch.float8_e4m3fnuz: torch.int8, torch.float8_e5m2: torch.int8,
    torch.float8_e5m2fnuz: torch.int8, torch.float8_e8m0fnu: torch.int8,
}  # fmt: skip


def taken_as_whole(tensor: torch.Tensor, take: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """What is taken of a tensor; by way of whole numbers, if nothing can be taken of its dtype as it is."""
    whole = _AS_WHOLE.get(tensor.dtype)
    return take(tensor) if whole is None else take(tensor.view(whole)).view(tensor.dtype)


# --- bytes of tensors -----------------------------------------------------------------------------------

_NUMPY = {
    dtype: torch.empty(0, dtype=dtype, device="cpu").numpy().dtype
    for dtype in (
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
        torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128,
    )
}  # fmt: skip


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """The rows of a CPU tensor of our own as a byte matrix ``(n, row bytes)``; not for a user's tensor.

    (``.numpy()`` forbids a storage to be resized; see `modcache.tensors.memory_of` for those.)
    """
    count = tensor.shape[0]
    if tensor.numel() == 0:
        return np.empty((count, 0), np.uint8)
    # By way of one more dimension: the last stride of a contiguous tensor is any number where its size is 1.
    return tensor.contiguous().unsqueeze(-1).view(torch.uint8).view(count, -1).numpy()


def tensor_of(matrix: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A fresh byte matrix ``(n, row bytes)`` as the tensor ``(n, *shape)`` that owns it."""
    count = len(matrix)
    if matrix.size == 0:
        return torch.empty((count, *shape), dtype=dtype, device="cpu")
    known = _NUMPY.get(dtype)
    if known is not None:
        return torch.from_numpy(matrix.view(known).reshape(count, *shape))
    # numpy has no bfloat16 or float8; detaching keeps autograd from seeing a view of another dtype.
    return torch.from_numpy(matrix).view(dtype).reshape(count, *shape).detach()


def join_rows(count: int, parts: Sequence[tuple[np.ndarray, Rows]]) -> Rows:
    """``count`` rows in order, each place filled from the part that names it (one layout for all)."""
    layout = parts[0][1].layout
    return Rows(
        layout,
        tuple(
            _scatter(count, [(places, rows.tensors[leaf]) for places, rows in parts], *layout.leaves[leaf])
            for leaf in range(len(layout.leaves))
        ),
    )


def _scatter(
    count: int, parts: Sequence[tuple[np.ndarray, torch.Tensor]], dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    device = parts[-1][1].device
    if device.type == "cpu":
        matrix = np.empty((count, dtype.itemsize * torch.Size(shape).numel()), np.uint8)
        for places, tensor in parts:
            matrix[places] = bytes_of(tensor.cpu())
        return tensor_of(matrix, dtype, shape)
    joined = torch.empty((count, *shape), dtype=dtype, device=device)
    for places, tensor in parts:
        joined[torch.from_numpy(places).to(device)] = tensor.to(device)
    return joined
