"""MemoryStore: the bound, eviction, memory that comes and goes, threads, forks, and a budget for all."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from modcache.errors import UsageError, UsageTypeError
from modcache.rows import Layout, Rows
from modcache.stores import MemoryStore, budget, columns
from modcache.stores.account import Account
from modcache.stores.budget import Budget, cgroup_limit, processes_here, shared_budget, usable_memory
from modcache.stores.columns import DeviceColumn, HostColumn
from modcache.stores.shelf import Shelf
from tests.contracts import PAIR, VECTOR, LendingContract, answers, expected, key, keys, rows_of

ROW = VECTOR.row_bytes  # 12
ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def as_device(dtype, shape, most):
    """A column as a device has it, on the CPU."""
    return DeviceColumn(dtype, shape, most, device=torch.device("cpu"))


class TestMemoryStore(LendingContract):
    """The contract, with the budget that all default stores share."""

    @pytest.fixture
    def store(self):
        return MemoryStore()


class TestLeastRecentlyUsed(LendingContract):
    """The contract, with eviction."""

    @pytest.fixture
    def store(self):
        return MemoryStore(1 << 20, eviction="lru")


class TestWithoutReservation(LendingContract):
    """The contract, where the system reserves no memory."""

    @pytest.fixture
    def store(self, monkeypatch):
        monkeypatch.setattr(columns, "reserve", lambda size, huge_from: None)
        return MemoryStore(1 << 20)


class TestDevice(LendingContract):
    """The contract, with rows kept as on a device."""

    lends = False

    @pytest.fixture
    def store(self, monkeypatch):
        monkeypatch.setattr(columns, "HostColumn", as_device)
        return MemoryStore(1 << 20)


@pytest.mark.gpu
@ON_CUDA
class TestCuda(LendingContract):
    """The contract, with rows on an accelerator."""

    lends = False

    @pytest.fixture
    def store(self):
        return MemoryStore(device="cuda:0")

    def test_stays_there(self, store):
        """Rows are got where they are kept."""
        store.put("a", keys(1), rows_of([1]))
        assert store.get("a", keys(1))[0].rows.tensors[0].device.type == "cuda"


@pytest.mark.gpu
@ON_CUDA
class TestPinned(LendingContract):
    """The contract, with rows in pinned memory of the host."""

    lends = False

    @pytest.fixture
    def store(self):
        return MemoryStore(device="pinned")

    def test_gives_pinned_rows(self, store):
        """What is got can be copied to the accelerator without waiting."""
        store.put("a", keys(1), rows_of([1]))
        assert store.get("a", keys(1))[0].rows.tensors[0].is_pinned()


def test_get_in_inference_mode_stays_private():
    """In inference mode a result is still private memory."""
    store = MemoryStore()
    store.put("a", keys(1), rows_of([1]))
    with torch.inference_mode():
        store.get("a", keys(1))[0].rows.tensors[0].fill_(9)
    assert answers(store.get("a", keys(1))) == expected({0: 1})


def test_none_admits_until_full():
    """A full store keeps what came first, and counts what it refuses."""
    store = MemoryStore(5 * ROW)
    assert store.put("a", keys(0, 1, 2), rows_of([0, 1, 2])) == 3
    assert store.put("b", keys(3, 4, 5, 6), rows_of([3, 4, 5, 6])) == 2
    assert store.put("c", keys(7), rows_of([7])) == 0
    assert store.namespaces() == ["a", "b"]
    assert answers(store.get("b", keys(3, 4, 5, 6))) == expected({0: 3, 1: 4})
    assert (store.stats().rows, store.stats().bytes, store.stats().refused) == (5, 5 * ROW, 3)


def test_full_store_still_overwrites():
    """Rows that are there are overwritten also when no row more fits."""
    store = MemoryStore(2 * ROW)
    store.put("a", keys(0, 1), rows_of([0, 1]))
    assert store.put("a", keys(5, 1, 0), rows_of([5, 11, 10])) == 2
    assert answers(store.get("a", keys(0, 1, 5))) == expected({0: 10, 1: 11})


def test_refused_row_of_another_layout_is_gone():
    """When a new value is refused for its size, the old one is not served any more."""
    store = MemoryStore(ROW)
    store.put("a", keys(1), rows_of([1]))
    assert store.put("a", keys(1), rows_of([2], PAIR)) == 0
    assert store.get("a", keys(1)) == ()
    assert store.namespaces() == []


@pytest.mark.parametrize("eviction", ["none", "lru"])
def test_large_rows_pass_through(eviction):
    """A row larger than the bound is refused, and nothing is dropped for it."""
    store = MemoryStore(3 * ROW, eviction=eviction)
    store.put("a", keys(1, 2), rows_of([1, 2]))
    store.put("old", keys(3), rows_of([3]))
    store.retire("old")
    large = Layout("*", ((torch.float32, (100,)),))
    assert store.put("b", keys(1, 2), rows_of([1, 2], large)) == 0
    assert store.stats().rows == 3
    assert (store.stats().refused, store.stats().evicted) == (2, 0)


def test_lru_drops_what_was_not_used_for_longest():
    """A get counts as use; only as many rows go as are needed."""
    store = MemoryStore(4 * ROW, eviction="lru")
    store.put("a", keys(0, 1), rows_of([0, 1]))
    store.put("b", keys(2, 3), rows_of([2, 3]))
    store.get("a", keys(0))
    store.contains("a", keys(1))
    store.lend("a", keys(0, 9), len)
    assert store.put("c", keys(4, 5), rows_of([4, 5])) == 2
    assert store.row_keys("a") == keys(0)
    assert store.row_keys("b") == keys(3)
    assert store.stats().evicted == 2


def test_lending_counts_as_use():
    """Rows that were lent stay longer than those that were not."""
    store = MemoryStore(4 * ROW, eviction="lru")
    store.put("a", keys(0, 1, 2, 3), rows_of([0, 1, 2, 3]))
    assert store.lend("a", keys(1, 0), len) == 1
    store.retire("a")
    store.lend("a", keys(0), len)
    assert store.retired_since() is None
    store.put("a", keys(4, 5), rows_of([4, 5]))
    assert sorted(store.row_keys("a")) == sorted(keys(0, 1, 4, 5))


def test_lru_with_rows_of_several_sizes():
    """For a large row several small ones go, for a small one a single large one."""
    large = Layout("*", ((torch.float32, (6,)),))
    store = MemoryStore(4 * ROW, eviction="lru")
    store.put("a", keys(0, 1, 2, 3), rows_of([0, 1, 2, 3]))
    store.put("a", keys(4), rows_of([4], large))
    assert sorted(store.row_keys("a")) == sorted(keys(2, 3, 4))
    store.get("a", keys(2, 3))
    store.put("b", keys(5), rows_of([5]))
    assert sorted(store.row_keys("a")) == sorted(keys(2, 3))


def test_lru_batch_larger_than_the_store():
    """Of a batch that does not fit, the end stays, as if its rows came one by one."""
    store = MemoryStore(3 * ROW, eviction="lru")
    store.put("a", keys(0, 1), rows_of([0, 1]))
    assert store.put("a", keys(1, 2, 3, 0, 4), rows_of([11, 12, 13, 10, 14])) == 3
    assert answers(store.get("a", keys(0, 1, 2, 3, 4))) == expected({0: 10, 3: 13, 4: 14})


def test_lru_over_a_long_queue():
    """Far more rows than a queue holds go in exactly the order of their use."""
    store = MemoryStore(Account(4000, 4000 * ROW).held_bytes, eviction="lru")
    order = np.random.default_rng(0).permutation(4000).tolist()
    every = [key(n) for n in range(8000)]
    for start in range(0, 4000, 500):
        batch = range(start, start + 500)
        store.put("ab"[start % 1000 // 500], every[batch.start : batch.stop], rows_of(batch))
    for n in order:
        store.get("ab"[n % 1000 // 500], [every[n]])
    for start in range(0, 4000, 800):
        batch = range(4000 + start, 4800 + start)
        store.put("c", every[batch.start : batch.stop], rows_of(batch))
        left = set(store.row_keys("a")) | set(store.row_keys("b"))
        assert left == {every[n] for n in order[start + 800 :]}


def test_zero_byte_rows_are_bounded_by_their_index():
    """Rows without a byte cost what finding them costs, so their number is bounded, too."""
    empty = Layout("*", ((torch.float32, (0,)),))
    store = MemoryStore(64)
    numbers = range(1100)
    assert store.put("a", keys(*numbers), rows_of(numbers, empty)) == ((64 << 10) + 64) // 80
    store.retire("a")
    assert store.put("b", keys(*range(10)), rows_of(range(10), empty)) == 10
    assert store.stats().bytes <= 64


def test_index_counts_from_the_820th_row():
    """A tiny bound holds what its user reckons, a large one counts the index."""
    store = MemoryStore(2048 * ROW)
    numbers = range(2048)
    assert store.put("a", keys(*numbers), rows_of(numbers)) == (2048 * ROW + (64 << 10)) // (ROW + 80)
    assert store.stats().bytes <= 2048 * ROW


@pytest.mark.parametrize("eviction", ["none", "lru"])
def test_retired_rows_go_first(eviction):
    """Room is made from the longest retired namespace, and no more than needed."""
    store = MemoryStore(6 * ROW, eviction=eviction)
    for number, name in enumerate("abc"):
        store.put(name, keys(number, number + 10), rows_of([number, number + 10]))
    store.retire("b")
    store.retire("c")
    assert store.put("d", keys(5, 6, 7), rows_of([5, 6, 7])) == 3
    assert store.namespaces() == ["a", "c", "d"]
    assert len(store.row_keys("c")) == 1
    assert store.stats().evicted == 3


def test_use_undoes_retiring():
    """A get, even of nothing, or a put takes a namespace back from retirement."""
    store = MemoryStore(2 * ROW)
    store.put("a", keys(1), rows_of([1]))
    store.put("b", keys(2), rows_of([2]))
    for use in (lambda: store.get("a", []), lambda: store.put("a", keys(1), rows_of([1]))):
        store.retire("a")
        use()
        assert store.put("c", keys(3), rows_of([3])) == 0


def test_renaming_undoes_retiring():
    """A namespace that got a new name is in use."""
    store = MemoryStore(ROW)
    store.put("a", keys(1), rows_of([1]))
    store.retire("a")
    store.rename("a", "b")
    assert store.put("c", keys(3), rows_of([3])) == 0


def test_bound_over_layouts_and_namespaces():
    """All layouts and namespaces count together."""
    store = MemoryStore(ROW + PAIR.row_bytes)
    store.put("a", keys(1), rows_of([1]))
    store.put("a", keys(2), rows_of([2], PAIR))
    assert store.put("b", keys(3), rows_of([3])) == 0
    store.delete("a", keys(2))
    assert store.put("b", keys(3), rows_of([3])) == 1


@pytest.mark.parametrize("huge_from", [1 << 16, 1 << 30])
def test_memory_comes_back_within_a_slab(monkeypatch, huge_from):
    """Deleted rows give their pages back, and the rows that stay keep their values."""
    monkeypatch.setattr(columns, "_HUGE_FROM", huge_from)
    store = MemoryStore(1 << 30)
    wide = Layout("*", ((torch.float32, (25_000,)),))
    before = resident()
    store.put("a", keys(*range(400)), rows_of(range(400), wide))
    assert resident() - before > 35e6
    store.delete("a", keys(*range(390)))
    assert resident() - before < 8e6
    assert answers(store.get("a", keys(395, 1))) == expected({0: 395}, wide)
    store.put("a", keys(*range(50)), rows_of(range(50), wide))
    assert answers(store.get("a", keys(49, 395))) == expected({0: 49, 1: 395}, wide)


@pytest.mark.parametrize("make", ["close", "delete", "collect", "lru"])
def test_memory_comes_back(make):
    """Closing, deleting a namespace, and the end of a store give all memory back."""
    gc.collect()
    before = resident()
    store = MemoryStore(1 << 26, eviction="lru")
    wide = Layout("*", ((torch.float32, (25_000,)),))
    store.put("a", keys(*range(400)), rows_of(range(400), wide))
    assert resident() - before > 35e6
    if make == "close":
        store.close()
    elif make == "delete":
        store.delete("a")
    elif make == "lru":
        small = Layout("*", ((torch.uint8, ((1 << 26) - 1000,)),))
        store.put("b", keys(1), Rows(small, (torch.zeros(1, (1 << 26) - 1000, dtype=torch.uint8),)))
        store.delete("b")
    else:
        del store
        gc.collect()
    assert resident() - before < 8e6


def resident() -> int:
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later is not held by the store
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


BOUND = """
import ctypes, os, sys, torch
from modcache.rows import Layout, Rows
from modcache.stores import MemoryStore
def resident():
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later is not held by the store
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
width, bound, eviction = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
layout = Layout("*", ((torch.float32, (width,)),))
batch = Rows(layout, (torch.randn(256, width),))
warm = MemoryStore(1 << 20)
warm.put("a", [os.urandom(16) for _ in range(256)], batch); warm.close()
store = MemoryStore(bound, eviction=eviction)
before = resident()
while store.stats().bytes < 0.98 * bound or store.stats().refused + store.stats().evicted < 5000:
    store.put("a", [os.urandom(16) for _ in range(256)], batch)
print((resident() - before) / bound)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("eviction", ["none", "lru"])
@pytest.mark.parametrize("width", [768, 30])
def test_bound_is_what_is_resident(width, eviction):
    """A full store holds its bound in resident memory, within five per cent."""
    command = [sys.executable, "-c", BOUND, str(width), str(100_000_000), eviction]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert 0.93 < float(done.stdout) < 1.05


def test_options_that_cannot_be_right():
    """Each wrong option says what was given and what to do."""
    with pytest.raises(UsageError, match=r"max_bytes=0 leaves no room"):
        MemoryStore(0)
    with pytest.raises(UsageError, match=r"max_bytes=-1 leaves no room"):
        MemoryStore(-1)
    for wrong in ("1GB", 1e9, True):
        with pytest.raises(UsageTypeError, match="is a number of bytes"):
            MemoryStore(wrong)
    with pytest.raises(UsageError, match="eviction='fifo' is not known"):
        MemoryStore(eviction="fifo")
    with pytest.raises(UsageError, match='device="nonsense" cannot be used here'):
        MemoryStore(device="nonsense")
    with pytest.raises(UsageError, match='device="meta" holds no values'):
        MemoryStore(device="meta")
    with pytest.raises(UsageTypeError, match='device is "cpu"'):
        MemoryStore(device=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where CUDA is missing")
def test_devices_that_are_not_there():
    """Without CUDA, pinned memory and CUDA devices are refused when the store is made."""
    with pytest.raises(UsageError, match="needs CUDA"):
        MemoryStore(device="pinned")
    with pytest.raises(UsageError, match='device="cuda:0" cannot be used here'):
        MemoryStore(device=torch.device("cuda:0"))


def test_pinned_columns_ask_for_pinned_memory(monkeypatch):
    """Where CUDA is there, `device="pinned"` makes pinned columns; a GPU has its own budget."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    where, make = columns.columns_on("pinned")
    assert where == torch.device("cpu")
    assert make.keywords == {"device": torch.device("cpu"), "pinned": True}
    properties = type("Properties", (), {"total_memory": 8000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(budget, "_shared", {})
    assert shared_budget(torch.device("cuda:0")).max_bytes == 2000


def test_device_column_shrinks():
    """A device gets its memory back when more than half of the rows are gone."""
    column = as_device(torch.float32, (2,), 1000)
    column.fit(10)
    column.append(0, torch.arange(20.0).reshape(10, 2), np.arange(10))
    column.trim(9)
    assert len(column._bytes) == 10
    column.trim(2)
    assert len(column._bytes) == 2
    assert column.take(np.array([1, 0])).tolist() == [[2.0, 3.0], [0.0, 1.0]]


def test_device_column_is_no_inference_tensor():
    """Memory that a device gave in inference mode can be written to outside of it."""
    with torch.inference_mode():
        column = as_device(torch.float32, (2,), 1000)
        column.fit(4)
        column.append(0, torch.zeros(4, 2), np.arange(4))
    column.overwrite(np.array([2]), torch.ones(1, 2), np.arange(1))
    column.move(np.array([0]), np.array([2]))
    with torch.inference_mode():
        column.overwrite(np.array([1]), torch.full((1, 2), 3.0), np.arange(1))
    taken = column.take(np.array([0, 1, 3]))
    assert not taken.is_inference()
    assert taken.tolist() == [[1.0, 1.0], [3.0, 3.0], [0.0, 0.0]]


def test_reservation_that_is_refused_grows():
    """Where a reservation is refused, a slab grows with its rows, and shrinks with them."""
    store = MemoryStore(1 << 62)
    store.put("a", keys(*range(100)), rows_of(range(100)))
    assert answers(store.get("a", keys(99))) == expected({0: 99})
    column = HostColumn(torch.float32, (100_000,), 1 << 50)
    column.fit(10)
    column.append(0, torch.ones(10, 100_000), np.arange(10))
    column.trim(2)
    assert len(column._bytes) == 2
    assert column.take(np.array([1])).sum() == 100_000


def test_more_rows_than_were_reserved():
    """A column outgrows its reservation rather than fail."""
    column = HostColumn(torch.float32, (2,), 2)
    column.fit(2)
    column.append(0, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), np.arange(2))
    column.fit(3)
    column.append(2, torch.tensor([[5.0, 6.0]]), np.arange(1))
    column.trim(3)
    assert column.take(np.array([2, 0])).tolist() == [[5.0, 6.0], [1.0, 2.0]]


def test_copies_are_empty():
    """A pickle and a deepcopy are empty stores with the same options."""
    store = MemoryStore(1000, eviction="lru")
    store.put("a", keys(1), rows_of([1]))
    for other in (pickle.loads(pickle.dumps(store)), copy.deepcopy(store), copy.copy(store)):
        assert repr(other) == repr(store) == "MemoryStore(1000, device='cpu', eviction='lru')"
        assert other.stats().rows == 0
        assert other._budget is not store._budget
    assert copy.deepcopy(MemoryStore())._budget is MemoryStore()._budget


def test_stores_can_be_collected():
    """Nothing keeps a store alive, not even until the next collection, and its bound dies with it."""
    gc.collect()
    gc.disable()
    try:
        store = MemoryStore(5 * ROW, eviction="lru")
        for number in range(10):
            store.put("a", keys(number, number + 1), rows_of([number, number + 1]))
        seen = weakref.ref(store), weakref.ref(store._budget), weakref.ref(store._shelves["a"])
        del store
        assert [ref() for ref in seen] == [None, None, None]
    finally:
        gc.enable()
    assert all(ref() is not None for ref in budget._budgets)


@pytest.fixture
def small_budget(monkeypatch):
    """All default stores of the test share four rows."""
    monkeypatch.setattr(budget, "_shared", {torch.device("cpu"): Budget(4 * ROW)})


def test_default_stores_share_a_budget(small_budget):
    """Rows of one default store take the room of another; a collected store gives its room back."""
    one, other = MemoryStore(), MemoryStore()
    assert one.put("a", keys(1, 2, 3), rows_of([1, 2, 3])) == 3
    assert other.put("a", keys(1, 2), rows_of([1, 2])) == 1
    assert one.stats().max_bytes == 4 * ROW
    assert MemoryStore(10 * ROW).put("a", keys(1, 2, 3, 4, 5), rows_of(range(5))) == 5
    del one
    gc.collect()
    assert other.put("a", keys(3, 4, 5), rows_of([3, 4, 5])) == 3


def test_retired_rows_of_another_store_go_first(small_budget):
    """Retired rows of any default store make room for another one."""
    one, other = MemoryStore(), MemoryStore(eviction="lru")
    one.put("a", keys(1, 2, 3), rows_of([1, 2, 3]))
    one.retire("a")
    assert other.put("b", keys(4, 5, 6), rows_of([4, 5, 6])) == 3
    assert (one.stats().rows, one.stats().evicted) == (1, 2)
    one.get("a", [])
    assert other.put("b", keys(7), rows_of([7])) == 1
    assert other.stats().evicted == 1


def test_lru_store_in_a_budget_that_others_fill(small_budget):
    """A store evicts its own rows only: when others fill the budget, it refuses."""
    one, other = MemoryStore(), MemoryStore(eviction="lru")
    one.put("a", keys(1, 2, 3, 4), rows_of([1, 2, 3, 4]))
    assert other.put("b", keys(5), rows_of([5])) == 0
    assert other.stats().refused == 1
    assert one.stats().rows == 4


def test_share_of_the_memory(monkeypatch):
    """The shared budget is a quarter of the memory, divided by the processes on the machine."""
    monkeypatch.setattr(budget, "_shared", {})
    monkeypatch.setattr(budget, "_read_text", {"/proc/self/cgroup": "0::/"}.get)
    monkeypatch.setattr(budget, "_physical_memory", lambda: 64_000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert MemoryStore().stats().max_bytes == 4_000


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/memory.max": "max\n"}, None),
        ({"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/memory.max": "500\n"}, 500),
        (
            {
                "/proc/self/cgroup": "0::/a/b\n",
                "/sys/fs/cgroup/a/b/memory.max": "500\n",
                "/sys/fs/cgroup/a/memory.max": "300\n",
            },
            300,
        ),
        ({"/proc/self/cgroup": "0::/gone\n", "/sys/fs/cgroup/memory.max": "700\n"}, 700),
        (
            {
                "/proc/self/cgroup": "9:cpu,cpuacct:/x\n4:memory:/c\n0::/\n",
                "/sys/fs/cgroup/memory/c/memory.limit_in_bytes": "800\n",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            800,
        ),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/unified/memory.max": "900\n"}, 900),
    ],
    ids=["nothing", "max", "own", "parent", "container", "version 1", "hybrid"],
)
def test_cgroup_limit(files, limit):
    """The tightest limit counts, of both versions, up to the root of what is mounted."""
    assert cgroup_limit(files.get) == limit


def test_usable_memory():
    """The limit of the control group or all there is; something sensible when nobody tells."""
    files = {"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": "100"}
    assert usable_memory(files.get, 1000) == 100
    assert usable_memory(files.get, 50) == 50
    assert usable_memory({}.get, 1000) == 1000
    assert usable_memory({}.get, None) == 4 << 30


def test_what_the_system_says(monkeypatch):
    """This machine has memory; a system that does not say how much is no error."""
    assert budget._physical_memory() > 1 << 28
    assert budget._read_text("/nowhere/at/all") is None

    def fails(name):
        raise ValueError(name)

    monkeypatch.setattr(os, "sysconf", fails)
    assert budget._physical_memory() is None


@pytest.mark.parametrize(("text", "count"), [("", 1), ("8", 8), ("0", 1), ("many", 1)])
def test_processes_here(text, count):
    """Without a sensible number of processes it is one."""
    assert processes_here({"LOCAL_WORLD_SIZE": text}) == count
    assert processes_here({}) == 1


def test_account():
    """The account says what fits and what has to go, with the index counted."""
    account = Account(800, 9_600)
    for limit in (9_600, 9_700, 9_900, 12_000, 20_000):
        fits = account.fitting(12, limit)
        assert account.plus(fits, 12).held_bytes <= limit
        assert account.plus(fits + 1, 12).held_bytes > limit
    full = Account(1100, 13_200)
    assert full.held_bytes == 13_200 + 1100 * 80 - (64 << 10)
    sizes = np.full(1100, 12)
    gone = full.drops_until(sizes, 14_000)
    assert full.plus(-gone, 12).held_bytes <= 14_000 < full.plus(1 - gone, 12).held_bytes
    assert full.drops_until(sizes[:3], 14_000) == 3


def test_interrupt_in_a_change(monkeypatch):
    """An exception in the middle of a change drops that namespace, and never leaves a wrong row."""
    store = MemoryStore(100 * ROW)
    store.put("a", keys(*range(10)), rows_of(range(10)))
    store.put("b", keys(1), rows_of([1]))

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HostColumn, "move", interrupted)
        store.delete("a", keys(1))
    assert store.get("a", keys(*range(10))) == ()
    assert not store.contains("a", keys(5)).any()
    assert store.row_keys("a") == []
    assert store.put("a", keys(3), rows_of([3])) == 1
    assert answers(store.get("a", keys(*range(10)))) == expected({3: 3})
    assert answers(store.get("b", keys(1))) == expected({0: 1})
    assert (store.stats().rows, store.stats().bytes) == (2, 2 * ROW)


def test_interrupt_in_another_store(small_budget, monkeypatch):
    """Retired rows that an exception left in disorder are dropped as a whole when room is needed again."""
    one, other = MemoryStore(), MemoryStore()
    one.put("a", keys(1, 2, 3, 4), rows_of([1, 2, 3, 4]))
    one.retire("a")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("modcache.stores.slab.Slab.remove", interrupted)
        other.put("b", keys(1), rows_of([1]))
    assert other.put("b", keys(1, 2), rows_of([1, 2])) == 2
    assert one.stats().rows == 0


def test_a_finaliser_in_the_middle_of_a_change(monkeypatch):
    """What uses the store while it is changed (a finaliser, a signal) finds it closed, and harms nothing."""
    store = MemoryStore(100 * ROW)
    store.put("a", keys(1, 2, 3), rows_of([1, 2, 3]))
    answered = []
    original = HostColumn.move

    def move(self, *places):
        answered.append(store.get("a", keys(1)))
        answered.append(store.put("b", keys(1), rows_of([1])))
        answered.append(store.delete("a"))
        store.rename("a", "c")
        original(self, *places)

    monkeypatch.setattr(HostColumn, "move", move)
    assert store.delete("a", keys(1)) == 1
    assert answered == [(), 0, 0]
    assert answers(store.get("a", keys(1, 2, 3))) == expected({1: 2, 2: 3})

    monkeypatch.setattr(HostColumn, "move", lambda *_: store.close())
    store.delete("a", keys(3))
    assert store.put("a", keys(1), rows_of([1])) == 0


def test_threads_under_a_tiny_bound():
    """Threads that push each other's rows out see each row right or not at all; the bound holds."""
    store = MemoryStore(20 * ROW, eviction="lru")
    wrong = []

    def work(seed):
        random = np.random.default_rng(seed)
        for _ in range(150):
            numbers = random.integers(0, 60, 12).tolist()
            try:
                store.put("ab"[seed % 2], keys(*numbers), rows_of(numbers))
                for part in store.get("ab"[seed % 2], keys(*numbers)):
                    want = [numbers[i] for i in part.positions.tolist()]
                    if part.rows.tensors[0][:, 0].tolist() != want:
                        wrong.append(want)
                if store.stats().bytes > 20 * ROW:
                    wrong.append(store.stats())
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_while_threads_use_the_store():
    """A child never inherits a lock that is held: it can use the store at once, and apart from its parent."""
    store = MemoryStore(1000 * ROW)
    store.put("a", keys(*range(50)), rows_of(range(50)))
    stop = threading.Event()

    def work():
        while not stop.is_set():
            store.put("a", keys(1, 2), rows_of([1, 2]))
            store.get("a", keys(*range(20)))
            MemoryStore(5)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                right = answers(store.get("a", keys(7))) == expected({0: 7})
                store.put("b", keys(1), rows_of([1]))
                os._exit(0 if right and MemoryStore(10) else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert store.namespaces() == ["a"]


def test_a_full_child_budget_is_free_again_in_the_next_store():
    """The order of locks at a fork survives a fork in the middle of a call."""
    store = MemoryStore(100)
    with store._budget.lock:
        budget._before_fork()
        budget._after_fork_in_parent()
        budget._before_fork()
        lock = store._budget.lock
        budget._after_fork_in_child()
        assert store._budget.lock is not lock
    assert store.put("a", keys(1), rows_of([1])) == 1


def test_shelf_counts_itself():
    """A shelf can tell what it holds without the store's account."""
    store = MemoryStore(1000)
    store.put("a", keys(1, 2), rows_of([1, 2]))
    store.put("a", keys(3), rows_of([3], PAIR))
    shelf: Shelf = store._shelves["a"]
    assert shelf.counted() == store._account == Account(3, 2 * ROW + PAIR.row_bytes)


def test_namespace_bytes():
    """The bytes of a namespace are those of its rows, and none where there is no such namespace."""
    store = MemoryStore(1 << 20)
    store.put("a", keys(1, 2), rows_of([1, 2]))
    store.put("b", keys(1), rows_of([1]))
    assert [store.namespace_bytes(name) for name in ("a", "b", "c")] == [24, 12, 0]


def test_closed_at_the_end_of_a_block():
    """A store is a context manager: at the end of the block it is closed."""
    with MemoryStore(1 << 20) as store:
        assert store.put("a", keys(1), rows_of([1])) == 1
    assert store.put("a", keys(1), rows_of([1])) == 0
