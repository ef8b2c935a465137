"""Rows as records: the bytes of all leaves side by side, copied into memory that is used again."""

from __future__ import annotations

import itertools
import struct

import numpy as np
import pytest
import torch

from modcache.digest import checksum
from modcache.rows import Layout, Rows
from modcache.stores.disk.records import Buffers, matrix_of, sums_of
from tests.contracts import LAYOUTS, bytes_of, rows_of


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("chosen", [[0, 1, 2], [2], [0, 2], []])
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_records(layout, chosen):
    """A record is the bytes of its leaves, one behind the other, and has the checksum of these bytes."""
    rows = rows_of([1, 0, 2], layout)
    matrix, sums = matrix_of(rows, np.array(chosen, np.int64), np.empty(1000, np.uint8))
    want = [b"".join(bytes_of(tensor[n]) for tensor in rows.tensors) for n in chosen]
    assert [row.tobytes() for row in matrix] == want
    assert sums == sums_of(matrix) == struct.pack(f"<{len(chosen)}Q", *map(checksum, want))


def test_large_rows_are_copied_in_parts():
    """Rows of many parts, of which some are chosen, are whole."""
    tensor = torch.arange(9 * 100_000, dtype=torch.int32).reshape(9, 100_000)
    rows, chosen = Rows(Layout("*", ((torch.int32, (100_000,)),)), (tensor,)), np.array([1, 5, 8])
    matrix, sums = matrix_of(rows, chosen, np.empty(3 * 400_000, np.uint8))
    assert (matrix.view(np.int32) == tensor[[1, 5, 8]].numpy()).all()
    assert sums == sums_of(matrix)


def test_memory_is_used_again():
    """What was given back is taken again where it fits, and not where most of it would lie idle."""
    buffers = Buffers()
    large = buffers.take(1 << 20)
    buffers.give(large)
    assert buffers.take(10) is not large
    assert buffers.take(1 << 20) is large
    buffers.give(large)
    buffers.clear()
    assert buffers.take(1 << 20) is not large


@pytest.mark.parametrize("size", [1, 1 << 16, (1 << 20) + 1, 1 << 24])
def test_no_memory_is_given_twice(size):
    """Pieces that were asked for together are each large enough, and lie beside each other."""
    buffers = Buffers()
    taken = [buffers.take(size) for _ in range(5)]
    spans = sorted((piece.ctypes.data, piece.ctypes.data + piece.nbytes) for piece in taken)
    assert all(piece.nbytes >= size for piece in taken)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_memory_that_waits_is_bounded():
    """Batches of ever other sizes do not pile up memory that is kept for them."""
    buffers = Buffers()
    for size in range(1 << 20, 1 << 22, 1 << 17):
        for piece in [buffers.take(size) for _ in range(8)]:
            buffers.give(piece)
    assert sum(free.nbytes for free in buffers._free) <= 64 << 20
