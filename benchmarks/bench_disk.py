"""What a cache directory costs: hits out of files, filling it, reopening it, and several writers at once."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from benchmarks.bench_hits import OfTensors, OfTexts, agree, filled, in_store, of_texts, sampled, sized
from benchmarks.conftest import BATCH, cycled, side_by_side
from modcache import DiskStore, cache_of, cached_module
from modcache.rows import SINGLE, Layout, Rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.conftest import Report

pytestmark = pytest.mark.usefixtures("one_thread")

NAMESPACE = "f" * 32
TOKENS = 64


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def random_keys(count: int, seed: int = 0) -> list[bytes]:
    drawn = np.random.default_rng(seed).bytes(16 * count)
    return [drawn[at : at + 16] for at in range(0, len(drawn), 16)]


# --- hits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segments", [1, 8])
def test_hits(segments: int, directory: Path, measured: bool, report: Report) -> None:
    """256 rows by text out of files in the page cache, checked already, against the same out of memory."""
    case = sized(BATCH, measured)
    texts, plain = of_texts(case)
    for part in range(segments):
        with DiskStore(directory) as store:  # each has a segment of its own
            filled(cached_module(OfTexts(case.width), store=store, freeze=True), texts[part::segments])
    with DiskStore(directory) as store:
        disk = cached_module(OfTexts(case.width), store=store, freeze=True)
        memory = filled(in_store(OfTexts(case.width)), texts)
        filled(disk, texts)
        assert cache_of(disk).stats.computed == 0
        batches = [rows for _, rows in sampled(case, texts)]
        agree(plain, batches, disk, memory)
        sides = side_by_side(case.rounds, cycled(batches), disk=disk, memory=memory)
    what = f"hit by text from disk, 256 x 3 KB, {segments} segments"
    report.sides(what, sides)
    report.goal(f"{what} ÷ memory", sides.ratio("disk", "memory"), at_most=1.3)


@pytest.mark.filterwarnings("ignore")  # the peers' own
def test_hits_of_peers(directory: Path, tmp_path: Path, measured: bool, report: Report) -> None:
    """256 rows from disk, page cache warm, against the disk tiers of the other two, and bytes in diskcache.

    Each side makes several calls at a turn: the slow ones leave nothing of ours in the processor's caches.
    """
    import diskcache
    from torch_module_cache import CacheLevel, cache_module
    from torchcache import torchcache

    case = sized(replace(BATCH, stored=1024, rounds=8), measured)
    calls = 16 if measured else 1
    values = torch.randint(0, 30_000, (case.stored, TOKENS), generator=torch.Generator().manual_seed(1)).float()
    plain = OfTensors(case.width)
    peer = torchcache(
        persistent=True,
        persistent_cache_dir=str(tmp_path / "torchcache"),
        max_memory_cache_size=1,
        subsample_count=TOKENS,
    )(OfTensors)(case.width)

    class Kept(OfTensors):
        """The peer changes the class that it decorates."""

        def forward(self, values: torch.Tensor, cache_key: list[int] | None = None) -> torch.Tensor:
            return super().forward(values)

    kept = cache_module(cache_path=str(tmp_path / "kept"), cache_level=CacheLevel.DISK)(Kept)(case.width)
    filled(peer, values)
    filled(kept, values, cache_key=list(range(case.stored)))
    raw = diskcache.Cache(str(tmp_path / "raw"), eviction_policy="none", disk_min_file_size=1 << 30)
    for number, row in enumerate(plain(values).numpy()):
        raw[number] = row.tobytes()

    def of_raw(numbered: tuple[list[int], torch.Tensor]) -> torch.Tensor:
        joined = b"".join([raw[number] for number in numbered[0]])
        return torch.frombuffer(bytearray(joined), dtype=torch.float32).view(-1, case.width)

    with DiskStore(directory) as store:
        encoder = filled(cached_module(OfTensors(case.width), store=store, freeze=True), values)
        batches = sampled(case, values)
        sides: dict[str, Callable[[Any], torch.Tensor]] = {
            "modcache": lambda numbered: encoder(numbered[1]),
            "torchcache": lambda numbered: peer(numbered[1]),
            "torch_module_cache": lambda numbered: kept(numbered[1], cache_key=numbered[0]),
            "diskcache": of_raw,
        }
        agree(lambda numbered: plain(numbered[1]), batches, *sides.values())
        several = {name: functools.partial(_each, side, batches[:calls]) for name, side in sides.items()}
        found = side_by_side(case.rounds, **several)
    raw.close()
    report.sides(f"{calls} hits from disk, 256 rows", found)
    for name, least in (("torchcache", 100), ("torch_module_cache", 300), ("diskcache", 6)):
        report.goal(f"hit from disk, 256 x 3 KB: {name} ÷ modcache", found.ratio(name, "modcache"), at_least=least)


def _each(side: Callable[[Any], torch.Tensor], batches: list[Any]) -> None:
    for batch in batches:
        side(batch)


def test_large_rows(directory: Path, measured: bool, report: Report) -> None:
    """256 rows of 197 x 768 fp16, page cache warm: against a gather out of `np.memmap`, first and later reads."""
    stored, rows, rounds = (1024, 256, 9) if measured else (8, 4, 1)
    layout = Layout(SINGLE, ((torch.float16, (197, 768)),))
    row_keys = random_keys(stored)
    values = torch.arange(stored * 197 * 768, dtype=torch.int32).view(torch.float16)[: stored * 197 * 768]
    values = values.view(stored, 197, 768)
    with DiskStore(directory) as store:
        for start in range(0, stored, 64):
            store.put(NAMESPACE, row_keys[start : start + 64], Rows(layout, (values[start : start + 64],)))
            store.flush()
    (file,) = directory.glob("rows/*/*.rows")
    mapped = np.memmap(file, np.uint8, "r", offset=0)
    row_bytes = layout.row_bytes
    matrix = mapped[len(mapped) - stored * row_bytes :].reshape(stored, row_bytes)
    order = random.Random(0)
    places = [order.sample(range(stored), rows) for _ in range(rounds + rounds // 8 + 1)]

    def gathered(wanted: list[int]) -> torch.Tensor:
        return torch.from_numpy(matrix[np.array(wanted)]).view(torch.float16).view(-1, 197, 768)

    def out_of(store: DiskStore, wanted: list[int]) -> torch.Tensor:
        (found,) = store.get(NAMESPACE, [row_keys[place] for place in wanted])
        return found.rows.tensors[0]

    with DiskStore(directory) as store:
        for start in range(0, stored, 64):
            out_of(store, list(range(start, min(start + 64, stored))))
        for answer in (out_of(store, places[0]), gathered(places[0])):
            assert torch.equal(answer.view(torch.int16), values[places[0]].view(torch.int16))
        warm = side_by_side(
            rounds, lambda turn: (places[turn],), modcache=lambda wanted: out_of(store, wanted), memmap=gathered
        )

    def opened(_: int) -> tuple[DiskStore, list[int]]:
        store = DiskStore(directory)
        store.row_keys(NAMESPACE)
        return store, order.sample(range(stored), rows)

    first = side_by_side(rounds, opened, modcache=out_of, memmap=lambda _, wanted: gathered(wanted))
    report.sides("256 x (197 x 768) fp16 from disk", warm)
    report.sides("256 x (197 x 768) fp16 from disk, first read", first)
    report.goal("256 x (197 x 768) fp16: np.memmap ÷ disk", warm.ratio("memmap", "modcache"), at_least=0.85)
    report.goal("the same, first (checked) read", first.ratio("memmap", "modcache"), at_least=0.6)


# --- filling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row_bytes", "least"), [(3072, 0.4), (1 << 16, 0.75), (197 * 768 * 2, 0.75)])
def test_filling(
    row_bytes: int, least: float, directory: Path, measured: bool, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows put and flushed, keys digested from texts, against writing the same bytes to a file one after the other.

    Neither waits for the device: that would hide what our part costs.
    """
    from xxhash import xxh3_128_digest

    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda _: None)
    total, rounds = (1 << 28, 7) if measured else (row_bytes * 64, 1)
    count = max(64, min(256, (8 << 20) // row_bytes))
    batches = max(2, total // (count * row_bytes))
    layout = Layout(SINGLE, ((torch.uint8, (row_bytes,)),))
    rows = torch.randint(0, 256, (count, row_bytes), dtype=torch.uint8)
    texts = [[f"{batch} {row} " + "some words of a text " * 4 for row in range(count)] for batch in range(batches)]
    numbers = iter(range(1 << 20))

    def fresh(_: int) -> tuple[Path]:
        return (directory.parent / str(next(numbers)),)

    def written(place: Path) -> None:
        with open(place, "wb", buffering=0) as file:
            file.writelines(rows.numpy() for _ in range(batches))

    def stored(place: Path) -> None:
        with DiskStore(place.with_suffix(".cache")) as store:
            for batch in texts:
                row_keys = list(map(xxh3_128_digest, map(str.encode, batch)))
                store.put(NAMESPACE, row_keys, Rows(layout, (rows,)))
            store.flush()

    sides = side_by_side(rounds, fresh, write=written, modcache=stored)
    what = f"filling a directory, rows of {row_bytes} bytes"
    report.sides(what, sides)
    report.goal(f"{what}: write() ÷ modcache", sides.ratio("write", "modcache"), at_least=least)
    with DiskStore(next(directory.parent.glob("*.cache"))) as store:
        assert len(store.row_keys(NAMESPACE)) == count * batches


def _write(directory: str, seed: int, count: int, pause: float, began: Any, queue: Any) -> None:
    torch.set_num_threads(1)
    layout = Layout(SINGLE, ((torch.float32, (768,)),))
    rows = torch.full((256, 768), float(seed))
    waits = []
    with DiskStore(directory) as store:
        began.wait()
        start = time.perf_counter()
        for batch in range(count):
            keys = random_keys(256, seed * 100_000 + batch)
            time.sleep(pause)
            at = time.perf_counter()
            store.put(NAMESPACE, keys, Rows(layout, (rows,)))
            waits.append(time.perf_counter() - at)
        store.flush()
        queue.put((time.perf_counter() - start, waits))


def test_writers(directory: Path, measured: bool, report: Report) -> None:
    """Four processes that fill one directory, against one: their rate in all, and how long a put took.

    For the rate, rows are put as fast as they are taken, so that puts wait for the disk at the bound of the queue;
    for the time of a put there is a pause before each, as there is a forward in a loop.
    """
    context = multiprocessing.get_context("fork")
    count, rounds = (400, 3) if measured else (2, 1)

    def filled_by(writers: int, place: str, pause: float = 0.0) -> tuple[float, list[float]]:
        began, queue = context.Barrier(writers), context.Queue()
        args = [(place, seed, count * 4 // writers, pause, began, queue) for seed in range(writers)]
        workers = [context.Process(target=_write, args=each) for each in args]
        for worker in workers:
            worker.start()
        answers = [queue.get(timeout=300) for _ in workers]
        for worker in workers:
            worker.join()
        with DiskStore(place) as store:
            assert len(store.row_keys(NAMESPACE)) == count * 4 * 256
        return max(seconds for seconds, _ in answers), [wait for _, waits in answers for wait in waits]

    ratios, slowest = [], []
    for turn in range(rounds):
        alone, _ = filled_by(1, f"{directory}-{turn}-1")
        together, _ = filled_by(4, f"{directory}-{turn}-4")
        _, waits = filled_by(4, f"{directory}-{turn}-paused", 0.02)
        ratios.append(alone / together)
        slowest.append(float(np.percentile(waits, 99)))
    report.goal("four writers on one directory: their rate ÷ one's", float(np.median(ratios)), at_least=0.9)
    report.goal("p99 of a put with four writers and pauses of 20 ms, ms", float(np.median(slowest)) * 1e3, at_most=5)


# --- reopening ------------------------------------------------------------------------------------------

_REOPEN = """
import json, sys, time, numpy as np
from modcache import DiskStore
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
began = time.perf_counter()
store = DiskStore(sys.argv[1])
key = bytes.fromhex(sys.argv[2])
(found,) = store.get("f" * 32, [key])
took = time.perf_counter() - began
print(json.dumps({"seconds": took, "bytes": resident() - before, "value": found.rows.tensors[0].tolist()}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("count", [10_000, 1_000_000, 10_000_000])
def test_reopening(count: int, directory: Path, measured: bool, report: Report) -> None:
    """From opening a directory to the first row out of it, in a new process, with the memory that the index takes."""
    if not measured and count > 10_000:
        pytest.skip("takes a minute: only with --benchmark-enable")
    layout = Layout(SINGLE, ((torch.float32, (1,)),))
    key = b""
    with DiskStore(directory) as store:
        for start in range(0, count, 256):
            keys = random_keys(min(256, count - start), start)
            store.put(NAMESPACE, keys, Rows(layout, (torch.arange(start, start + len(keys)).view(-1, 1).float(),)))
            key = keys[0]
    command = [sys.executable, "-c", _REOPEN, str(directory), key.hex()]
    answers = [
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)  # noqa: S603 - our own text
        for _ in range(3 if measured else 1)
    ]
    assert answers[0]["value"] == [[float((count - 1) // 256 * 256)]]
    seconds = float(np.median([answer["seconds"] for answer in answers]))
    if count == 1_000_000:
        report.goal("reopening 1 M rows from disk, s", seconds, at_most=0.5)
    report.number(f"reopening {count / 1e6:g} M rows", seconds, "s")
    report.number(f"memory of {count / 1e6:g} M reopened rows, a row", answers[0]["bytes"] / count, "B")
