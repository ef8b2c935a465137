"""What a get of the memory store costs beside a bare look-up and gather, and what filling it costs.

Recorded on 2 cores, Linux 6.18, torch 2.13, numpy 2.4, one thread, 256 rows of 768 fp32, all found: a get takes
1.06, 0.99 and 1.09 times the bare look-up and gather out of 2,000, 10,000 and 100,000 rows; with
``eviction="lru"``, which notes each use, 1.17, 1.07 and 1.10 times.
"""

from __future__ import annotations

import random
import struct
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from benchmarks.conftest import BATCH, Case, cycled, side_by_side
from modcache.rows import Layout, Rows
from modcache.stores import MemoryStore

if TYPE_CHECKING:
    from benchmarks.conftest import Report

pytestmark = pytest.mark.usefixtures("one_thread")

NAMESPACE = "n" * 32


def filled(store: MemoryStore, row_keys: list[bytes], values: torch.Tensor) -> MemoryStore:
    layout = Layout("*", ((values.dtype, tuple(values.shape[1:])),))
    for start in range(0, len(row_keys), 256):
        part = values[start : start + 256]
        assert store.put(NAMESPACE, row_keys[start : start + 256], Rows(layout, (part,))) == len(part)
    return store


def values_of(store: MemoryStore, row_keys: list[bytes]) -> torch.Tensor:
    (found,) = store.get(NAMESPACE, row_keys)
    return found.rows.tensors[0]


@pytest.mark.parametrize("case", [BATCH, Case(rows=256, stored=2_000), Case(rows=256, stored=100_000)], ids=str)
def test_get(case: Case, measured: bool, report: Report) -> None:
    """256 rows, all found, against ``dict`` look-ups and one ``np.take`` of a byte matrix."""
    case = case if measured else case.small()
    chance = random.Random(0)
    row_keys = [chance.randbytes(16) for _ in range(case.stored)]
    values = torch.randn(case.stored, case.width)
    store = filled(MemoryStore(), row_keys, values)
    lru = filled(MemoryStore(eviction="lru"), row_keys, values)
    places = dict(zip(row_keys, range(case.stored), strict=True))
    matrix = values.numpy().view(np.uint8).reshape(case.stored, -1).copy()

    def bare(wanted: list[bytes]) -> torch.Tensor:
        rows = np.frombuffer(struct.pack(f"{len(wanted)}q", *map(places.__getitem__, wanted)), np.int64)
        return torch.from_numpy(np.take(matrix, rows, axis=0).view(np.float32))

    batches = [chance.sample(row_keys, case.rows) for _ in range(60)]
    right = values[[places[key] for key in batches[0]]]
    for answer in (values_of(store, batches[0]), values_of(lru, batches[0]), bare(batches[0])):
        assert torch.equal(answer, right)
    sides = side_by_side(
        case.rounds,
        cycled(batches),
        bare=bare,
        store=lambda wanted: store.get(NAMESPACE, wanted),
        lru=lambda wanted: lru.get(NAMESPACE, wanted),
    )
    what = f"get of {case.rows} x {case.width} fp32 out of {case.stored}"
    report.sides(what, sides)
    report.goal(f"{what}, against look-up + one np.take", sides.ratio("store", "bare"), at_most=1.15)
    report.number(f"{what}, lru against look-up + one np.take", sides.ratio("lru", "bare"), "x")


def test_all_missing(measured: bool, report: Report) -> None:
    """256 rows of which none is there: what the first epoch pays."""
    case = BATCH if measured else BATCH.small()
    chance = random.Random(0)
    store = filled(
        MemoryStore(), [chance.randbytes(16) for _ in range(case.stored)], torch.zeros(case.stored, case.width)
    )
    batches = [[chance.randbytes(16) for _ in range(case.rows)] for _ in range(60)]
    assert store.get(NAMESPACE, batches[0]) == ()
    sides = side_by_side(case.rounds, cycled(batches), store=lambda wanted: store.get(NAMESPACE, wanted))
    report.sides(f"get of {case.rows} absent rows", sides)


@pytest.mark.parametrize("eviction", ["none", "lru"])
def test_put(eviction: str, measured: bool, report: Report) -> None:
    """256 new rows: into a store with room, or (lru) into a full one, which drops as many."""
    case = BATCH if measured else BATCH.small()
    chance = random.Random(0)
    row_bytes = case.width * 4
    bound = case.stored * row_bytes if eviction == "lru" else case.rows * row_bytes * 1000
    store = MemoryStore(bound, eviction=eviction)
    layout = Layout("*", ((torch.float32, (case.width,)),))
    rows = Rows(layout, (torch.randn(case.rows, case.width),))
    if eviction == "lru":
        while store.stats().evicted == 0:
            store.put(NAMESPACE, [chance.randbytes(16) for _ in range(case.rows)], rows)
    plain = np.empty((case.rows, case.width), np.float32)

    def put(wanted: list[bytes]) -> None:
        assert store.put(NAMESPACE, wanted, rows) == case.rows

    sides = side_by_side(
        case.rounds,
        lambda _: ([chance.randbytes(16) for _ in range(case.rows)],),
        put=put,
        copy=lambda _: np.copyto(plain, rows.tensors[0].numpy()),
    )
    assert store.stats().bytes <= bound
    report.sides(f"put of {case.rows} x {case.width} fp32, eviction {eviction}", sides)
