"""What a key costs: per row of text, path and tensor, and for tensors against bare xxh3."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
from xxhash import xxh3_128_digest

from benchmarks.conftest import side_by_side
from modcache import cache_of, cached_module, keys
from modcache.batch import split
from modcache.keys.parts import text_digests
from modcache.keys.registry import is_row
from modcache.row_digests import tensor_row_digests

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.conftest import Report

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS, PATHS, ROUNDS = 256, 64, 200


@dataclass(frozen=True)
class Blocks:
    """Rows of a tensor; batches stay below 16 MB, from where on two threads digest."""

    row_bytes: int
    rows: int
    goal: float | None = None  # share of bare xxh3's speed; the cost of a Python call a row has to be small for it

    @property
    def name(self) -> str:
        kib = self.row_bytes >> 10
        return f"{self.rows} x {f'{kib} KB' if kib < 1024 else f'{kib >> 10} MB'}"


BLOCKS = (
    Blocks(4 << 10, 256),  # a row of token ids or features
    Blocks(16 << 10, 256),
    Blocks(64 << 10, 128, 0.9),  # from here on the digest is what costs
    Blocks(256 << 10, 48, 0.9),
    Blocks(602_112, 24, 0.9),  # an image of 3 x 224 x 224 in float32
    Blocks(1 << 20, 12, 0.9),
    Blocks(4 << 20, 3, 0.9),  # an image of 3 x 592 x 592
)
LARGE_BATCHES = (  # two threads pay
    Blocks(64 << 10, 512),
    Blocks(602_112, 64),
    Blocks(602_112, 256),  # a batch for a ViT: 154 MB
)


SEED = 1  # stands for what the rows of a call have in common; a module works it out once for all calls of one outline


def text_keys(texts: list[str]) -> list[bytes]:
    """What a call of a known outline does with texts."""
    return text_digests(texts, SEED)


def tensor_keys(values: torch.Tensor) -> list[bytes]:
    """What a call of a known outline does with a tensor."""
    return tensor_row_digests(values, SEED)


class Keyed:
    """The keys that an extractor gives to rows, and nothing else of a call."""

    def __init__(self, extractor: keys.Extractor) -> None:
        self.extractor = extractor

    def __call__(self, value: object) -> list[bytes]:
        bound = [("value", value)]
        return self.extractor(bound, split(bound, frozenset(), is_row)).keys


def all_different(found: list[bytes], count: int) -> None:
    assert len(set(found)) == len(found) == count
    assert {len(key) for key in found} == {16}


def test_texts(measured: bool, report: Report) -> None:
    """Texts of 90 characters."""
    chance = random.Random(0)
    texts = ["".join(chance.choices("etaoin shrdlu", k=90)) for _ in range(TEXTS)]
    all_different(text_keys(texts), TEXTS)

    def bare() -> list[bytes]:
        return list(map(xxh3_128_digest, map(str.encode, texts)))

    sides = side_by_side(ROUNDS if measured else 1, None, modcache=lambda: text_keys(texts), xxh3=bare)
    report.sides(f"keys of {TEXTS} texts", sides)
    report.number("key of a text of 90 characters", sides.median("modcache") / TEXTS * 1e6, "µs a row")


@pytest.mark.parametrize("check", ["content", "stat", "name"])
def test_paths(check: str, measured: bool, report: Report, tmp_path: Path) -> None:
    """Paths of files that did not change since they were digested first."""
    paths = [tmp_path / f"{number}.bin" for number in range(PATHS)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 20_000)
        os.utime(path, (1e9, 1e9))
    keyed = Keyed(keys.path(check))
    named = [str(path) for path in paths]
    all_different(keyed(named), PATHS)
    before = keyed(named)
    assert keyed(named) == before
    paths[3].write_bytes(b"other content")
    changed = [at for at, (new, old) in enumerate(zip(keyed(named), before, strict=True)) if new != old]
    assert changed == ([] if check == "name" else [3])
    os.utime(paths[3], (1e9, 1e9))
    sides = side_by_side(ROUNDS if measured else 1, None, modcache=lambda: keyed(named))
    report.sides(f"keys of {PATHS} paths, by {check}", sides)
    each = sides.median("modcache") / PATHS
    report.number(f"key of the path of an unchanged file, by {check}", each * 1e6, "µs a row")


def bare(memory: memoryview, rows: int) -> list[bytes]:
    width = len(memory) // rows
    return [xxh3_128_digest(memory[start : start + width]) for start in range(0, len(memory), width)]


def tensor_sides(blocks: Blocks, measured: bool, report: Report) -> float:
    """How many times as fast as bare xxh3 the rows of a tensor are digested."""
    rows = blocks.rows if measured else 3
    width = blocks.row_bytes // 4
    values = torch.randint(0, 1 << 30, (rows, width), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    memory = memoryview(values.numpy()).cast("B")
    all_different(tensor_keys(values), rows)
    assert tensor_keys(values[1:]) == tensor_keys(values)[1:], "a key depends on its row alone"
    sides = side_by_side(
        ROUNDS // 2 if measured else 1,
        None,
        modcache=lambda: tensor_keys(values),
        xxh3_by_row=lambda: bare(memory, rows),
        xxh3_at_once=lambda: xxh3_128_digest(memory),
    )
    report.sides(f"keys of {blocks.name}", sides)
    return sides.ratio("xxh3_at_once", "modcache")


@pytest.mark.parametrize("blocks", BLOCKS, ids=lambda blocks: blocks.name)
def test_tensors(blocks: Blocks, measured: bool, report: Report) -> None:
    """Rows of a tensor against one bare digest over the same bytes."""
    share = tensor_sides(blocks, measured, report)
    if blocks.goal is None:
        report.number(f"keys of {blocks.name}: share of bare xxh3", share, "x")
    else:
        report.goal(f"keys of {blocks.name}: share of bare xxh3", share, at_least=blocks.goal)


@pytest.mark.parametrize("blocks", LARGE_BATCHES, ids=lambda blocks: blocks.name)
def test_large_batches(blocks: Blocks, measured: bool, report: Report) -> None:
    """From 16 MB a batch on, two threads digest: against one bare digest in one thread."""
    speed = tensor_sides(blocks, measured, report)
    report.number(f"keys of {blocks.name}, threaded: speed of bare xxh3", speed, "x")
    if blocks.row_bytes > 500_000:
        report.goal(f"keys of {blocks.name}, threaded: speed of bare xxh3", speed, at_least=1.3)


def test_whole_calls_see_each_byte(measured: bool) -> None:
    """What is timed above is what a call does: a row that differs in its last byte misses."""
    layer = cached_module(torch.nn.Flatten(), freeze=True)
    values = torch.zeros(4, 64 if not measured else 1 << 16)
    values[:, 0] = torch.arange(4)
    layer(values)
    values[2, -1] = 1
    assert list(cache_of(layer).contains(values)) == [True, True, False, True]
