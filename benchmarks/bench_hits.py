"""How long a hit takes: against the least that Python and numpy can do, and against the other two libraries."""

from __future__ import annotations

import random
import struct
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from xxhash import xxh3_128_digest

from benchmarks.conftest import BATCH, BATCHES, Case, cycled, each, in_groups, side_by_side
from modcache import MemoryStore, cache_of, cached_module, mode

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence
    from pathlib import Path

    from benchmarks.conftest import Report

TOKENS = 64  # of a row of ids
FEATURES = 64  # of a row of floats; for torchcache, which turns outputs into the dtype of the inputs
DIFFERENT = 32  # batches that take turns, so that no batch is in the processor's cache already
AT_A_TURN = 8  # calls of a peer and of ours

by_rows = pytest.mark.parametrize("case", BATCHES, ids=lambda case: f"{case.rows} rows")
pytestmark = pytest.mark.usefixtures("one_thread")


class ByNumber(nn.Module):
    """Looks rows up by a number that is made of each input: exact, and the same in any batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(997, width, generator=torch.Generator().manual_seed(0)))

    def outputs(self, numbers: Sequence[int]) -> torch.Tensor:
        picked = torch.tensor(numbers, dtype=torch.int64)
        return self.table[picked % 997] + (picked // 997 % 4096)[:, None]


class OfTexts(ByNumber):
    def forward(self, texts: list[str]) -> torch.Tensor:
        return self.outputs([zlib.crc32(text.encode()) for text in texts])


class OfTensors(ByNumber):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.outputs([zlib.crc32(row.tobytes()) for row in values.numpy().copy()])


class Gathered:
    """The strict ideal behind the keys: a dict, row numbers by `struct`, one `np.take` of a byte matrix."""

    def __init__(self, keys: Sequence[Hashable], rows: torch.Tensor) -> None:
        self.index = {key: place for place, key in enumerate(keys)}
        self.matrix = rows.numpy().copy().view(np.uint8)

    def __call__(self, keys: Sequence[Hashable]) -> torch.Tensor:
        places = np.frombuffer(struct.pack(f"{len(keys)}q", *map(self.index.__getitem__, keys)), np.int64)
        return torch.from_numpy(self.matrix.take(places, 0)).view(torch.float32)


def text_keys(texts: Sequence[str]) -> list[bytes]:
    return list(map(xxh3_128_digest, map(str.encode, texts)))


def row_keys(rows: torch.Tensor) -> list[bytes]:
    """The keys of the rows of a small tensor; `struct.unpack` is the quickest way to its rows' bytes."""
    size = rows.shape[1] * rows.element_size()
    return list(map(xxh3_128_digest, struct.unpack(f"{size}s" * len(rows), rows.numpy())))


def sized(case: Case, measured: bool) -> Case:
    return case if measured else case.small()


def sampled(case: Case, stored: Sequence[Any] | torch.Tensor) -> list[tuple[list[int], Any]]:
    """Batches of stored rows, each with its row numbers, in random order and without twins."""
    chance = random.Random(case.rows)
    batches = []
    for _ in range(DIFFERENT):
        numbers = chance.sample(range(case.stored), case.rows)
        rows = stored[numbers] if isinstance(stored, torch.Tensor) else [stored[number] for number in numbers]
        batches.append((numbers, rows))
    return batches


def filled(module: nn.Module, rows: Any, **more: Any) -> nn.Module:
    """The module with all of these rows stored, called as an epoch would."""
    for start in range(0, len(rows), 500):
        module(rows[start : start + 500], **{name: value[start : start + 500] for name, value in more.items()})
    return module


def of_texts(case: Case) -> tuple[list[str], OfTexts]:
    chance = random.Random(1)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 10))) for _ in range(5000)]
    texts = [f"{number} {' '.join(chance.choices(words, k=12))}" for number in range(case.stored)]
    return texts, OfTexts(case.width)


def in_store(module: nn.Module) -> nn.Module:
    return cached_module(module, store=MemoryStore(1 << 30), freeze=True)


def agree(
    expected: Callable[[Any], torch.Tensor], batches: Sequence[Any], *sides: Callable[[Any], torch.Tensor]
) -> None:
    """Each side gives, bit by bit, what is expected of the first and the last batch; nothing is computed for it."""
    with mode("require-hit"):
        for batch in (batches[0], batches[-1]):
            for side in sides:
                torch.testing.assert_close(side(batch), expected(batch), rtol=0, atol=0)


@by_rows
def test_texts(case: Case, measured: bool, report: Report) -> None:
    """A hit by text against the strict ideal."""
    case = sized(case, measured)
    texts, plain = of_texts(case)
    encoder = filled(in_store(OfTexts(case.width)), texts)
    gathered = Gathered(text_keys(texts), plain(texts))
    batches = [rows for _, rows in sampled(case, texts)]

    def ideal(batch: list[str]) -> torch.Tensor:
        return gathered(text_keys(batch))

    agree(plain, batches, encoder, ideal)
    sides = side_by_side(case.rounds, cycled(batches), modcache=encoder, ideal=ideal)
    report.sides(f"hit by text, {case.rows} rows", sides)
    if case.rows == BATCH.rows:
        report.goal("hit by text, 256 x 3 KB ÷ strict ideal", sides.ratio("modcache", "ideal"), at_most=1.3)


@by_rows
def test_tokens(case: Case, measured: bool, report: Report) -> None:
    """A hit by rows of ids, with the keys that tensors get by default, against the strict ideal."""
    case = sized(case, measured)
    ids = torch.randint(0, 30_000, (case.stored, TOKENS), generator=torch.Generator().manual_seed(1))
    plain, encoder = OfTensors(case.width), filled(in_store(OfTensors(case.width)), ids)
    gathered = Gathered(row_keys(ids), plain(ids))
    batches = [rows for _, rows in sampled(case, ids)]

    def ideal(batch: torch.Tensor) -> torch.Tensor:
        return gathered(row_keys(batch))

    agree(plain, batches, encoder, ideal)
    sides = side_by_side(case.rounds, cycled(batches), modcache=encoder, ideal=ideal)
    report.sides(f"hit by ids, {case.rows} rows", sides)
    if case.rows == BATCH.rows:
        ratio = sides.ratio("modcache", "ideal")
        report.goal("hit by ids (int64, 64 a row), 256 x 3 KB ÷ strict ideal", ratio, at_most=1.3)


@by_rows
def test_given_keys(case: Case, measured: bool, report: Report) -> None:
    """A hit by keys that the caller gives, against looking ints up in a dict and one `np.take`."""
    case = sized(case, measured)
    ids = torch.randint(0, 30_000, (case.stored, TOKENS), generator=torch.Generator().manual_seed(1))
    plain, cached = OfTensors(case.width), in_store(OfTensors(case.width))
    filled(cached, ids, cache_keys=range(case.stored))
    gathered = Gathered(range(case.stored), plain(ids))
    batches = sampled(case, ids)

    def encoder(numbered: tuple[list[int], torch.Tensor]) -> torch.Tensor:
        return cached(numbered[1], cache_keys=numbered[0])

    def ideal(numbered: tuple[list[int], torch.Tensor]) -> torch.Tensor:
        return gathered(numbered[0])

    agree(lambda numbered: plain(numbered[1]), batches, encoder, ideal)
    sides = side_by_side(case.rounds, cycled(batches), modcache=encoder, ideal=ideal)
    report.sides(f"hit by given ints, {case.rows} rows", sides)
    if case.rows == BATCH.rows:
        ratio = sides.ratio("modcache", "ideal")
        report.goal("hit by cache_keys= (ints), 256 x 3 KB ÷ look-up + np.take", ratio, at_most=1.6)


@by_rows
@pytest.mark.filterwarnings("ignore")  # the peer's own
def test_against_torchcache(case: Case, measured: bool, report: Report) -> None:
    """A hit by rows of floats, in memory, against torchcache."""
    from torchcache import torchcache

    case = sized(replace(case, rounds=100), measured)
    values = torch.randint(0, 30_000, (case.stored, FEATURES), generator=torch.Generator().manual_seed(1)).float()
    plain, encoder = OfTensors(case.width), filled(in_store(OfTensors(case.width)), values)
    peer = filled(torchcache()(OfTensors)(case.width), values)
    batches = [rows for _, rows in sampled(case, values)]
    agree(plain, batches, encoder, peer)
    calls = in_groups(batches, AT_A_TURN)
    sides = side_by_side(case.rounds, calls, modcache=each(encoder), torchcache=each(peer))
    report.sides(f"{AT_A_TURN} hits by floats, {case.rows} rows", sides)
    if case.rows == BATCH.rows:
        report.goal("hit in memory, 256 rows: torchcache ÷ modcache", sides.ratio("torchcache", "modcache"), at_least=8)


@by_rows
@pytest.mark.filterwarnings("ignore")  # the peer's own
def test_against_torch_module_cache(case: Case, measured: bool, report: Report, tmp_path: Path) -> None:
    """A hit by given keys, in memory, against torch-module-cache, which takes no others."""
    from torch_module_cache import CacheLevel, cache_module

    case = sized(replace(case, stored=2_000, rounds=100), measured)
    ids = torch.randint(0, 30_000, (case.stored, TOKENS), generator=torch.Generator().manual_seed(1))
    plain, cached = OfTensors(case.width), in_store(OfTensors(case.width))
    filled(cached, ids, cache_keys=range(case.stored))

    class OfTensorsKept(OfTensors):
        """The peer changes the class that it decorates."""

        def forward(self, values: torch.Tensor, cache_key: list[int] | None = None) -> torch.Tensor:
            return super().forward(values)

    kept = cache_module(cache_path=str(tmp_path), cache_level=CacheLevel.MEMORY)(OfTensorsKept)(case.width)
    for _ in range(2):  # it keeps rows in memory only once they were read from its files
        filled(kept, ids, cache_key=list(range(case.stored)))
    batches = sampled(case, ids)

    def encoder(numbered: tuple[list[int], torch.Tensor]) -> torch.Tensor:
        return cached(numbered[1], cache_keys=numbered[0])

    def peer(numbered: tuple[list[int], torch.Tensor]) -> torch.Tensor:
        return kept(numbered[1], cache_key=numbered[0])

    agree(lambda numbered: plain(numbered[1]), batches, encoder, peer)
    calls = in_groups(batches, AT_A_TURN)
    sides = side_by_side(case.rounds, calls, modcache=each(encoder), torch_module_cache=each(peer))
    report.sides(f"{AT_A_TURN} hits by given ints against the peer, {case.rows} rows", sides)
    assert cache_of(cached).stats.computed == case.stored
    if case.rows == BATCH.rows:
        ratio = sides.ratio("torch_module_cache", "modcache")
        report.goal("hit in memory, keys given, 256 rows: torch-module-cache ÷ modcache", ratio, at_least=2)
