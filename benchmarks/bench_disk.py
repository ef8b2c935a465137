"""What a cache directory costs: hits out of files, filling it, reopening it, and several writers at once."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from benchmarks.bench_epoch import Tokenized, Training, definitions, minilm, shuffled
from benchmarks.bench_hits import OfTensors, OfTexts, agree, filled, in_store, of_texts, sampled, sized
from benchmarks.conftest import BATCH, Sides, Times, cycled, side_by_side
from modcache import DiskStore, cache_of, cached_module
from modcache.rows import SINGLE, Layout, Rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.conftest import Report

__all__ = ["minilm"]  # a fixture

pytestmark = pytest.mark.usefixtures("one_thread")

NAMESPACE = "f" * 32
TOKENS = 64
LARGEST = os.environ.get("MODCACHE_BENCH_10M") == "1"  # ten million rows: two minutes, 1 GB of disk


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

    Each side makes several calls at a turn: the slow ones leave nothing of ours in the processor's caches. torchcache
    makes its keys of the rows' content, and so do we beside it; the others are given numbers, and so are we.
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
        filled(encoder, values, cache_keys=range(case.stored))
        batches = sampled(case, values)
        sides: dict[str, Callable[[Any], torch.Tensor]] = {
            "modcache": lambda numbered: encoder(numbered[1]),
            "modcache_given": lambda numbered: encoder(numbered[1], cache_keys=numbered[0]),
            "torchcache": lambda numbered: peer(numbered[1]),
            "torch_module_cache": lambda numbered: kept(numbered[1], cache_key=numbered[0]),
            "diskcache": of_raw,
        }
        agree(lambda numbered: plain(numbered[1]), batches, *sides.values())
        several = {name: functools.partial(_each, side, batches[:calls]) for name, side in sides.items()}
        found = side_by_side(case.rounds, **several)
    raw.close()
    report.sides(f"{calls} hits from disk, 256 rows", found)
    own = {"torchcache": "modcache", "torch_module_cache": "modcache_given", "diskcache": "modcache_given"}
    for name, least in (("torchcache", 100), ("torch_module_cache", 300), ("diskcache", 6)):
        report.goal(f"hit from disk, 256 x 3 KB: {name} ÷ modcache", found.ratio(name, own[name]), at_least=least)
    content = found.ratio("diskcache", "modcache")
    report.number("hit from disk, 256 x 3 KB: diskcache by number ÷ modcache by content", content, "x")


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


# --- a cold page cache ----------------------------------------------------------------------------------


def drop_pages(*files: Path) -> None:
    """Takes files out of the page cache, and nothing else: others may be at work on this machine."""
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())  # pages that are not written yet would stay
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="nothing takes files out of the page cache here")
@pytest.mark.parametrize(("row_bytes", "stored"), [(3072, 20_480), (197 * 768 * 2, 1024)])
def test_cold_reads(row_bytes: int, stored: int, directory: Path, measured: bool, report: Report) -> None:
    """All rows once, by 256 in random order, after their files left the page cache: against `np.memmap`.

    A host below this machine may have them in a cache of its own.
    """
    stored, rows, rounds = (stored, 256, 5) if measured else (64, 16, 1)
    layout = Layout(SINGLE, ((torch.uint8, (row_bytes,)),))
    row_keys = random_keys(stored)
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (stored, row_bytes), np.uint8))
    with DiskStore(directory) as store:
        store.put(NAMESPACE, row_keys, Rows(layout, (values,)))
    plain = directory.parent / "plain"
    values.numpy().tofile(plain)
    files = [plain, *directory.glob("rows/*/*.rows"), *directory.glob("rows/*/*.log")]
    order = np.random.default_rng(1)

    def of_disk(batches: list[np.ndarray]) -> torch.Tensor:
        with DiskStore(directory) as store:
            for batch in batches:
                (found,) = store.get(NAMESPACE, [row_keys[place] for place in batch.tolist()])
        return found.rows.tensors[0]

    def of_memmap(batches: list[np.ndarray]) -> torch.Tensor:
        matrix = np.memmap(plain, np.uint8, "r").reshape(stored, row_bytes)
        for batch in batches:
            found = torch.from_numpy(matrix[batch])
        return found

    def dropped(_: int) -> tuple[list[np.ndarray]]:
        drop_pages(*files)
        return (np.array_split(order.permutation(stored), stored // rows),)

    batches = dropped(0)[0]
    assert torch.equal(of_disk(batches), values[batches[-1]])
    sides = side_by_side(rounds, dropped, modcache=of_disk, memmap=of_memmap)
    what = f"{stored} rows of {row_bytes} bytes by {rows}, cold page cache (posix_fadvise)"
    report.sides(what, sides)
    report.number(f"{what}: np.memmap ÷ disk", sides.ratio("memmap", "modcache"), "x")
    report.number(f"{what}: read by modcache at", stored * row_bytes / sides.median("modcache") / 1e6, "MB/s")


# --- filling --------------------------------------------------------------------------------------------


@pytest.fixture(params=["disk", "tmpfs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Where files are written: a disk, which soon has to be waited for, or memory, which takes all there is."""
    if request.param == "disk":
        yield tmp_path
        return
    memory = Path("/dev/shm")  # noqa: S108 - a folder of our own in it
    if not memory.is_dir() or shutil.disk_usage(memory).free < 2 << 30:
        pytest.skip("there is no file system in memory here")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.mark.parametrize(("row_bytes", "least"), [(3072, 0.4), (1 << 16, 0.75), (197 * 768 * 2, 0.75)])
def test_filling(
    row_bytes: int,
    least: float,
    place: Path,
    measured: bool,
    report: Report,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows put and flushed, keys digested from texts, against writing the same bytes to a file one after the other.

    Neither waits for the device: that would hide what our part costs.
    """
    from xxhash import xxh3_128_digest

    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda _: None)
    # Many rounds, since pages that the host took back while they were free make some of them several times as slow.
    total, rounds = (1 << 28, 15) if measured else (row_bytes * 64, 1)
    count = max(64, min(256, (8 << 20) // row_bytes))
    batches = max(2, total // (count * row_bytes))
    layout = Layout(SINGLE, ((torch.uint8, (row_bytes,)),))
    rows = torch.randint(0, 256, (count, row_bytes), dtype=torch.uint8)
    texts = [[f"{batch} {row} " + "some words of a text " * 4 for row in range(count)] for batch in range(batches)]
    plain, directory = place / "plain", place / "cache"

    def fresh(_: int) -> tuple[()]:
        plain.unlink(missing_ok=True)
        shutil.rmtree(directory, ignore_errors=True)
        return ()

    def written() -> None:
        with open(plain, "wb", buffering=0) as file:
            file.writelines(rows.numpy() for _ in range(batches))

    def stored() -> None:
        with DiskStore(directory) as store:
            for batch in texts:
                row_keys = list(map(xxh3_128_digest, map(str.encode, batch)))
                store.put(NAMESPACE, row_keys, Rows(layout, (rows,)))
            store.flush()

    sides = side_by_side(rounds, fresh, write=written, modcache=stored)
    what = f"filling a directory on {request.node.callspec.params['place']}, rows of {row_bytes} bytes"
    report.sides(what, sides)
    report.goal(f"{what}: write() ÷ modcache", sides.ratio("write", "modcache"), at_least=least)
    with DiskStore(directory) as store:
        assert len(store.row_keys(NAMESPACE)) == count * batches


def test_filling_epoch(
    minilm: Any,
    directory: Path,
    measured: bool,
    report: Report,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a directory adds to an epoch of MiniLM that fills it, batch by batch beside the same epoch uncached.

    Each batch waits until its rows are written, else the thread that writes would work in the other side's time;
    neither waits for the device.
    """
    monkeypatch.setattr(os, "fsync", lambda _: None)
    request.getfixturevalue("two_threads" if measured else "one_thread")
    tokenizer, made = minilm
    rows = definitions(512 if measured else 16)
    batch_size, epochs = (64, 3) if measured else (8, 1)
    tokenized, plain = Tokenized(tokenizer), made()
    encoder = cached_module(made(), key="text", prepare=tokenized, store=directory, freeze=True)
    cache, trainings = cache_of(encoder), {"uncached": Training(), "filling": Training()}
    batches = list(shuffled(rows, batch_size))  # type: ignore[arg-type]  # a list of pairs is a data set
    torch.testing.assert_close(encoder(batches[0][0]), plain(**tokenized(batches[0][0])), rtol=1e-3, atol=1e-4)

    def step(side: str, texts: Any, labels: torch.Tensor) -> float:
        began = time.perf_counter()
        features = plain(**tokenized(texts)) if side == "uncached" else encoder(texts)
        trainings[side].epoch([(features, labels)])
        if side == "filling":
            cache.flush()
        return time.perf_counter() - began

    seconds: dict[str, np.ndarray] = {side: np.empty((epochs, len(batches))) for side in trainings}
    for epoch in range(epochs):
        cache.clear()
        before = cache.stats.computed
        for at, batch in enumerate(batches):
            for side in list(trainings)[:: 1 if (epoch + at) % 2 else -1]:
                seconds[side][epoch, at] = step(side, *batch)
        assert cache.stats.computed - before == len(rows), "each row was computed"
    cache.store.close()
    times = {side: Times(np.sort(found, axis=0)[epochs // 2]) for side, found in seconds.items()}
    report.sides(f"batch of {batch_size} texts, filling a directory", Sides(times))
    ratio = float(times["filling"].seconds.sum() / times["uncached"].seconds.sum())
    report.goal("epoch of MiniLM that fills a directory ÷ uncached one", ratio, at_most=1.03)


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
    count, rounds = (200, 3) if measured else (2, 1)

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
        shutil.rmtree(place)
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
    if (not measured and count > 10_000) or (count > 1_000_000 and not LARGEST):
        pytest.skip("takes its time: only with --benchmark-enable, ten million rows only with MODCACHE_BENCH_10M=1")
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
