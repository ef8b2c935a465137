"""Many processes on one directory: each sees what the others committed, nobody waits, nothing is written twice."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from multiprocessing import resource_tracker
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from modcache import DiskStore, MemoryStore, TieredStore, cache_of, cached_module, is_cached
from tests.contracts import VECTOR
from tests.directories import (
    LARGE,
    LAYOUTS_ON_DISK,
    Child,
    files_in,
    fork,
    have,
    key_of,
    needs_fork,
    put,
    quiet,
    sizes_in,
)
from tests.models import CountingEncoder, encoder

BATCH = torch.arange(24.0).reshape(8, 3)
FORKS = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def _tracker() -> None:
    """The process that multiprocessing keeps for spawned children is there before the first test looks for leaks."""
    resource_tracker.ensure_running()


def cached(directory: Path, **options) -> CountingEncoder:
    """A fresh encoder in front of a directory."""
    return cached_module(encoder(), freeze=True, store=str(directory), **options)


def closed(module: nn.Module) -> None:
    """Writes what the module stored, and gives its store back."""
    cache_of(module).flush()
    cache_of(module).close()


# --- one after the other --------------------------------------------------------------------------------

FRESH = """
import sys, torch
from modcache import cached_module, cache_of
from tests.models import encoder
module = cached_module(encoder(), freeze=True, store=sys.argv[1])
out = module(torch.arange(24.0).reshape(8, 3))
print(module.calls, cache_of(module).stats.hits, out.numpy().tobytes().hex())
"""


def run(code: str, *arguments: object, **options) -> subprocess.Popen:
    """Starts an interpreter of its own."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def said_by(process: subprocess.Popen) -> list[str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.split()


def test_interpreters_one_after_the_other(tmp_path):
    """An interpreter that just ends has written its rows; the next one computes nothing and has the same bytes."""
    calls, hits, first = said_by(run(FRESH, tmp_path / "cache"))
    assert int(calls) > 0
    assert int(hits) == 0
    assert said_by(run(FRESH, "cache", cwd=tmp_path, env=environment())) == ["0", "8", first]
    module = cached(tmp_path / "cache")
    assert module(BATCH).numpy().tobytes().hex() == first
    assert module.calls == 0
    closed(module)


def environment() -> dict[str, str]:
    """For an interpreter that starts elsewhere."""
    return {**os.environ, "PYTHONPATH": os.getcwd()}


@needs_fork
def test_a_full_directory_computes_nothing(tmp_path):
    """A process that finds all its rows runs the module never, and has them bit for bit, also in parts and mixed."""
    module = cached(tmp_path)
    first = module(BATCH)
    closed(module)

    def later(say):
        fresh = cached(tmp_path)
        assert torch.equal(fresh(BATCH), first)
        assert torch.equal(fresh(BATCH[[5, 1, 1, 7]]), first[[5, 1, 1, 7]])
        assert fresh.calls == 0
        mixed = fresh(torch.cat([BATCH[:2], -BATCH[:2] - 1]))
        assert torch.equal(mixed[:2], first[:2])
        assert torch.allclose(mixed[2:], encoder()(-BATCH[:2] - 1))
        assert fresh.rows in (2, 3)  # a self-check may run one of them again
        cache_of(fresh).close()

    fork(later)


@needs_fork
def test_other_weights_share_nothing(tmp_path):
    """Another checkpoint in the same directory has rows of its own, and both stay."""
    torch.manual_seed(5)
    other = CountingEncoder()
    plain = other(BATCH)
    module = cached_module(other, freeze=True, store=str(tmp_path))
    assert torch.equal(module(BATCH), plain)
    closed(module)
    module = cached(tmp_path)
    assert torch.equal(module(BATCH), encoder()(BATCH))
    assert module.calls > 0
    closed(module)
    with DiskStore(tmp_path) as store:
        assert len(store.namespaces()) == 2
        assert store.stats().rows == 16


def test_a_pickle_reopens_the_path(tmp_path):
    """A pickle of a cached module has no rows in it, and finds those of the directory again."""
    module = cached_module(nn.Linear(3, 2), freeze=True, store=str(tmp_path))
    first = module(BATCH)
    cache_of(module).flush()
    text = pickle.dumps(module)
    assert first.numpy().tobytes() not in text
    closed(module)
    again = pickle.loads(text)
    assert is_cached(again)
    assert torch.equal(again(BATCH), first)
    assert (cache_of(again).stats.hits, cache_of(again).stats.computed) == (8, 0)
    closed(again)


def test_a_pickle_of_a_store_reopens_the_path(tmp_path):
    """A store's pickle is its path and its options."""
    with DiskStore(tmp_path, max_bytes=1 << 20, mmap=False) as store:
        put(store, "a", [1, 2])
        store.flush()
        again = pickle.loads(pickle.dumps(store))
        assert have(again, "a", [1, 2, 3]) == {1, 2}
        assert again.stats().max_bytes == 1 << 20
        again.close()
        tiers = pickle.loads(pickle.dumps(TieredStore(MemoryStore(), store)))
        assert have(tiers, "a", [1, 2, 3]) == {1, 2}
        tiers.close()


def test_closing_one_module_leaves_the_other(tmp_path):
    """Two modules on one path share what is open there; when one is closed, the other goes on reading and writing."""
    one, other = cached(tmp_path), cached_module(nn.Linear(3, 2), freeze=True, store=str(tmp_path))
    first, second = one(BATCH), other(BATCH)
    closed(one)
    assert torch.equal(other(BATCH), second)
    more = other(-BATCH - 1)
    assert (cache_of(other).stats.hits, cache_of(other).stats.computed) == (8, 16)
    again = cached(tmp_path)
    assert torch.equal(again(BATCH), first)
    assert again.calls == 0
    closed(again)
    closed(other)
    copy = cached_module(nn.Linear(3, 2), freeze=True, store=str(tmp_path))
    copy.load_state_dict(other.state_dict())
    assert torch.equal(copy(torch.cat([BATCH, -BATCH - 1])), torch.cat([second, more]))
    assert cache_of(copy).stats.computed == 0
    closed(copy)


# --- forks ----------------------------------------------------------------------------------------------


@needs_fork
def test_a_fork_with_a_full_queue(tmp_path):
    """A child forked while rows wait to be written neither hangs nor writes them; it writes and reads its own."""
    store = DiskStore(tmp_path)
    rounds = 12
    for start in range(rounds):
        put(store, "a", [start], LARGE)
        put(store, "b", range(start * 50, start * 50 + 50))

        def child(say, start=start):
            put(store, "a", [1000 + start], LARGE)
            assert have(store, "a", [1000 + start], LARGE) == {1000 + start}
            store.flush()
            store.close()

        fork(child)
    store.flush()
    store.close()
    with DiskStore(tmp_path) as again:
        numbers = [*range(rounds), *range(1000, 1000 + rounds)]
        assert have(again, "a", numbers, LARGE) == set(numbers)
        assert have(again, "b", range(rounds * 50)) == set(range(rounds * 50))
    sizes = sum(path.stat().st_size - 64 for path in files_in(tmp_path) if path.suffix == ".rows")
    assert sizes == 2 * rounds * LARGE.row_bytes + rounds * 50 * VECTOR.row_bytes, "rows were written twice"


@needs_fork
def test_a_fork_in_the_middle_of_everything(tmp_path):
    """Children that are forked while threads put, get and flush are held up by nobody's lock."""
    store = DiskStore(tmp_path)
    stop = threading.Event()
    wrong: list[BaseException] = []

    def work(first: int) -> None:
        number = first
        try:
            while not stop.is_set():
                put(store, "a", [number, number + 1])
                have(store, "a", range(first, number + 2))
                number += 2
                if number % 10 == 0:
                    store.flush()
                if number > first + 400:
                    number = first
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n * 1000,)) for n in range(3)]
    for thread in threads:
        thread.start()

    def child(say, number):
        put(store, "c", [number])
        store.flush()
        assert have(store, "c", [number]) == {number}
        have(store, "a", range(3000))
        store.close()

    try:
        for number in range(15):
            with Child(lambda say, number=number: child(say, number)) as forked:
                forked.wait()
                assert forked.status == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    store.close()
    assert wrong == []
    with DiskStore(tmp_path) as again:
        assert have(again, "c", range(15)) == set(range(15))


@needs_fork
def test_a_child_that_is_killed_takes_nothing_along(tmp_path):
    """What the parent put before and after a forked child died is all there."""
    with DiskStore(tmp_path) as store:
        put(store, "a", range(10))
        child = Child(lambda say: (put(store, "a", range(50, 90)), say("put"), time.sleep(60)))
        with child:
            child.hear()
            child.kill()
        put(store, "a", range(10, 20))
    with DiskStore(tmp_path) as again:
        assert have(again, "a", range(20)) == set(range(20))


def fill_and_end(directory: str, numbers: list[int]) -> None:
    put(DiskStore(directory), "a", numbers)  # neither flushed nor closed


@FORKS
@needs_fork
def test_children_of_multiprocessing_flush(tmp_path):
    """A child of multiprocessing that just ends has written what it put, whoever made the store."""
    context = multiprocessing.get_context("fork")
    store = DiskStore(tmp_path)
    put(store, "b", [1])
    children = [context.Process(target=fill_and_end, args=(str(tmp_path), [n, n + 100])) for n in range(3)]
    children.append(context.Process(target=put, args=(store, "a", [50])))
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    numbers = [0, 1, 2, 50, 100, 101, 102]
    assert have(store, "a", numbers) == set(numbers)
    store.close()


def test_spawned_children_flush(tmp_path):
    """The same with a child that starts from nothing."""
    child = multiprocessing.get_context("spawn").Process(target=fill_and_end, args=(str(tmp_path), [1, 2]))
    child.start()
    with DiskStore(tmp_path) as store:
        put(store, "a", [7])
        store.flush()
        child.join(120)
        assert child.exitcode == 0
        assert have(store, "a", [1, 2, 7]) == {1, 2, 7}


# --- at once --------------------------------------------------------------------------------------------


@needs_fork
@pytest.mark.parametrize("layout", LAYOUTS_ON_DISK.values(), ids=LAYOUTS_ON_DISK)
def test_commits_of_others_are_seen(tmp_path, layout):
    """What another process flushed is found by the next call that misses, whether or not anything was there before."""

    def other(say):
        store = DiskStore(tmp_path)
        for number in range(1, 6):
            put(store, "a", [number], layout)
            store.flush()
            say(number)
            assert Path(tmp_path, "go").exists() or wait_for(tmp_path / f"seen{number}")
        store.delete("a", [key_of(1)])
        put(store, "b", [9], layout)
        store.flush()
        say("changed")
        store.close()

    with DiskStore(tmp_path) as store, quiet(0):
        assert have(store, "a", [1], layout) == set()
        with Child(other) as child:
            for number in range(1, 6):
                assert child.hear() == number
                assert have(store, "a", [number], layout) == {number}
                (tmp_path / f"seen{number}").touch()
            assert child.hear() == "changed"
            assert have(store, "b", [9], layout) == {9}
            assert have(store, "a", [77], layout) == set()  # a miss looks at what others did
            assert have(store, "a", [1, 2], layout) == {2}
            assert sorted(store.namespaces()) == ["a", "b"]
            assert store.stats().rows == 5
            child.wait()
            assert child.status == 0


def wait_for(path: Path) -> bool:
    end = time.monotonic() + 120
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.001)
    return path.exists()


@needs_fork
def test_writers_and_readers_at_once(tmp_path):
    """Four writers of the same and of their own rows, and two readers: each row right, and all there in the end."""
    layouts = list(LAYOUTS_ON_DISK.items())

    def writer(say, seed):
        random = torch.Generator().manual_seed(seed)
        store = DiskStore(tmp_path)
        for step in range(60):
            name, layout = layouts[step % 4]
            count = 2 if layout.row_bytes > 1000 else 20
            shared = torch.randint(0, 50, (count,), generator=random).tolist()
            own = range(1000 * (seed + 1) + step * count, 1000 * (seed + 1) + (step + 1) * count)
            put(store, name, shared, layout)
            put(store, name, list(own), layout)
            assert have(store, name, [*own, *shared], layout) == {*own, *shared}
        store.close()

    def reader(say, seed):
        store = DiskStore(tmp_path)
        most, done = 0, False
        while not done:
            done = (tmp_path / "done").exists()  # and one look more
            for name, layout in layouts:
                most = max(most, len(have(store, name, range(50), layout)))
        store.close()
        return most

    readers = [Child(lambda say, seed=seed: reader(say, seed)) for seed in range(2)]
    writers = [Child(lambda say, seed=seed: writer(say, seed)) for seed in range(4)]
    try:
        for child in writers:
            child.wait()
            assert child.status == 0
        (tmp_path / "done").touch()
        for child in readers:
            assert child.wait()[-1] > 30, "a reader saw next to nothing"
    finally:
        for child in [*readers, *writers]:
            child.__exit__()
    with DiskStore(tmp_path) as store:
        for name, layout in layouts:
            count = 2 if layout.row_bytes > 1000 else 20
            steps = [step for step in range(60) if layouts[step % 4][0] == name]
            own = [1000 * (w + 1) + step * count + i for w in range(4) for step in steps for i in range(count)]
            for start in range(0, len(own), 400):
                part = own[start : start + 400]
                assert have(store, name, part, layout) == set(part)


@needs_fork
def test_rows_deleted_elsewhere_do_not_come_back(tmp_path):
    """A namespace that one process drops while another writes to it goes on with what is written afterwards."""
    with DiskStore(tmp_path) as store:
        put(store, "a", range(10))
        store.flush()
        assert fork(lambda say: DiskStore(tmp_path).delete("a")) == [10]
        put(store, "a", [3, 50])
        store.flush()
        with DiskStore(tmp_path) as other:
            assert have(other, "a", [*range(10), 50]) == {3, 50}
        assert have(store, "a", [77, 3, 50]) == {3, 50}
        assert have(store, "a", range(10)) == {3}


# --- workers that wrap for themselves -------------------------------------------------------------------


class Encoded(Dataset):
    """Encodes its items itself, with a module that each worker wraps when it first needs it."""

    def __init__(self, directory: Path, early: bool) -> None:
        self.directory = str(directory)
        self.module = cached(directory) if early else None

    def __len__(self) -> int:
        return len(BATCH)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self.module is None:
            torch.set_num_threads(1)
            self.module = cached(Path(self.directory))
        before = self.module.calls
        with torch.no_grad():
            out = self.module(BATCH[index : index + 1])[0]
        return out.clone(), self.module.calls - before


@FORKS
@needs_fork
@pytest.mark.parametrize("early", [False, True], ids=["in the worker", "before the fork"])
def test_workers_of_a_data_loader(tmp_path, early):
    """Workers that encode in the loader fill the directory; in the next epoch's fresh workers nothing is computed."""
    plain = encoder()(BATCH)
    dataset = Encoded(tmp_path, early)
    computed = []
    for _ in range(2):
        loader = DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context="fork")
        rows, calls = zip(*loader, strict=True)
        assert torch.allclose(torch.cat(rows), plain)
        computed.append(int(torch.cat(calls).sum()))
    assert computed[0] >= 8
    assert computed[1] <= 4  # rows that were stored one by one are run once more with their first batch
    if dataset.module is not None:
        closed(dataset.module)
    with DiskStore(tmp_path) as store:
        assert store.stats().rows == 8


@pytest.mark.soak
def test_workers_that_are_spawned(tmp_path):
    """The same with a worker that starts from nothing, to which the dataset is sent with its module."""
    dataset = Encoded(tmp_path, early=True)
    loader = DataLoader(dataset, batch_size=4, num_workers=1, multiprocessing_context="spawn")
    rows, _ = zip(*loader, strict=True)
    assert torch.allclose(torch.cat(rows), encoder()(BATCH))
    closed(dataset.module)
    with DiskStore(tmp_path) as store:
        assert store.stats().rows == 8


def test_nothing_of_the_directory_is_opened_for_others(tmp_path):
    """What a process makes is private to its user."""
    module = cached(tmp_path / "cache")
    module(BATCH)
    closed(module)
    assert sizes_in(tmp_path) > 0
    for path in [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path
