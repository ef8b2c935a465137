"""Rows as records: the bytes of all leaves side by side, copied into memory that is used again."""

from __future__ import annotations

import itertools
import struct

import numpy as np
import pytest
import torch

from modcache.digest import checksum
from modcache.rows import Layout, Rows
from modcache.stores.disk.records import Buffers, records_of, sums_of
from tests.contracts import LAYOUTS, bytes_of, rows_of


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("chosen", [[0, 1, 2], [1, 2], [2], [0, 2]])
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_records(layout, chosen):
    """A record is the bytes of its leaves, one behind the other, and has the checksum of these bytes."""
    rows = rows_of([1, 0, 2], layout)
    (records,) = records_of(rows, np.array(chosen, np.int64), Buffers().take)
    want = [b"".join(bytes_of(tensor[n]) for tensor in rows.tensors) for n in chosen]
    assert records.places.tolist() == chosen
    assert [row.tobytes() for row in records.matrix] == want
    assert records.sums == sums_of(records.matrix) == struct.pack(f"<{len(chosen)}Q", *map(checksum, want))


@pytest.mark.parametrize("chosen", [range(40), range(3, 40), [*range(0, 40, 3)]], ids=["all", "a stretch", "some"])
def test_large_batches_come_in_pieces(chosen):
    """Every chosen row is in one of the pieces, in order, and none of them asks for much memory at once."""
    tensor = torch.arange(40 * 100_000, dtype=torch.int32).reshape(40, 100_000)
    rows, sizes = Rows(Layout("*", ((torch.int32, (100_000,)),)), (tensor,)), []

    def take(size):
        sizes.append(size)
        return np.empty(size, np.uint8)

    pieces = list(records_of(rows, np.array(chosen), take))
    assert np.concatenate([piece.places for piece in pieces]).tolist() == list(chosen)
    assert (np.concatenate([piece.matrix for piece in pieces]).view(np.int32) == tensor[list(chosen)].numpy()).all()
    assert all(piece.sums == sums_of(piece.matrix) for piece in pieces)
    assert max(sizes) <= 4 << 20


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
    assert sum(free.nbytes for free in buffers._free) <= 32 << 20
