"""DiskStore: the contract, and what a directory adds to it: other processes, reopening, limits, damage."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from modcache import CacheWarning
from modcache.errors import FormatVersionError, UsageError, UsageTypeError
from modcache.rows import Layout, Rows
from modcache.stores import Describes, MemoryStore, TieredStore
from modcache.stores.disk import DiskStore, group, open_directory
from modcache.stores.disk import store as disk_store
from modcache.stores.disk.catalogue import Catalogue
from modcache.stores.disk.descriptors import Descriptors
from modcache.stores.disk.names import CATALOGUE, folder_of
from modcache.stores.disk.segment import Segment
from modcache.stores.disk.statements import Statements
from tests.contracts import LAYOUTS, PAIR, VECTOR, AbilitiesContract, answers, expected, key, keys, rows_of

LARGE = Layout("*", ((torch.float32, (20_000,)),))
LARGE_PAIR = Layout("*", ((torch.float32, (20_000,)), (torch.int64, (3,)), (torch.float32, (0,))))


class TestDiskStore(AbilitiesContract):
    """The contract, with rows mapped where they are small."""

    @pytest.fixture
    def store(self, tmp_path):
        with DiskStore(tmp_path / "cache") as store:
            yield store


class TestWithoutMaps(AbilitiesContract):
    """The contract, with all rows read."""

    @pytest.fixture
    def store(self, tmp_path):
        with DiskStore(tmp_path / "cache", mmap=False) as store:
            yield store


class Flushed(DiskStore):
    """Everything that was put is in files before it is got."""

    def put(self, namespace, row_keys, rows):
        admitted = super().put(namespace, row_keys, rows)
        self.flush()
        return admitted


class TestFlushed(AbilitiesContract):
    """The contract, with no row in memory."""

    @pytest.fixture
    def store(self, tmp_path):
        with Flushed(tmp_path / "cache") as store:
            yield store


class TestFlushedWithoutMaps(AbilitiesContract):
    """The contract, with no row in memory, and all rows read."""

    @pytest.fixture
    def store(self, tmp_path):
        with Flushed(tmp_path / "cache", mmap=False) as store:
            yield store


class ByAnother(DiskStore):
    """What is put here is written by another store, as if by another process."""

    def __init__(self, path):
        super().__init__(path)
        self.other = Flushed(path)

    def put(self, namespace, row_keys, rows):
        return self.other.put(namespace, row_keys, rows)

    def get(self, namespace, row_keys):
        self.row_keys(namespace)  # looks around; by itself, a store does that when it misses a row
        return super().get(namespace, row_keys)

    def close(self):
        super().close()
        self.other.close()


class TestOfAnother(AbilitiesContract):
    """The contract, where one store writes and another one reads and deletes."""

    @pytest.fixture
    def store(self, tmp_path):
        with ByAnother(tmp_path / "cache") as store:
            yield store


# --- one directory, many stores -------------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("layout", [*LAYOUTS.values(), LARGE, LARGE_PAIR], ids=[*LAYOUTS, "large", "large pair"])
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_rows_last(tmp_path, layout, mmap):
    """What one store wrote, the next one reads bit for bit, on the first and on later reads."""
    with DiskStore(tmp_path, mmap=mmap) as store:
        store.put("a", keys(*range(20)), rows_of(range(20), layout))
        store.put("a", keys(5), rows_of([55], layout))
        store.delete("a", keys(7))
    with DiskStore(tmp_path, mmap=mmap) as store:
        wanted = [5, 7, 19, 3, 4, 5]
        for _ in range(2):
            have = expected({0: 55, 2: 19, 3: 3, 4: 4, 5: 55}, layout)
            assert answers(store.get("a", keys(*wanted))) == have
        assert store.stats().rows == 19
        assert store.namespaces() == ["a"]


def test_another_store_sees_what_was_committed_at_its_next_miss(tmp_path):
    """Rows of another writer are found as soon as one is missed, new segments and old ones alike."""
    with DiskStore(tmp_path) as mine, DiskStore(tmp_path) as other:
        assert mine.get("a", keys(1)) == ()
        for number in range(5):
            other.put("a", keys(number), rows_of([number], VECTOR if number < 3 else PAIR))
            other.flush()
            assert mine.contains("a", keys(number)).all()
        assert answers(mine.get("a", keys(0, 2))) == expected({0: 0, 1: 2})
        other.delete("a", keys(0))
        other.flush()
        assert sorted(mine.row_keys("a")) == sorted(keys(1, 2, 3, 4))
        assert other.delete("a") == 4
        assert mine.row_keys("a") == []
        mine.put("a", keys(9), rows_of([9]))
        mine.flush()
        assert answers(other.get("a", keys(9))) == expected({0: 9})


def test_a_segment_of_each_writer_and_layout(tmp_path):
    """Rows of many segments and layouts are answered together, whoever wrote them."""
    layouts = [Layout("*", ((torch.int32, (n,)),)) for n in range(1, 30)]
    for writer in range(3):
        with DiskStore(tmp_path) as store:
            for n, layout in enumerate(layouts):
                store.put("a", keys(100 * writer + n), rows_of([100 * writer + n], layout))
    with DiskStore(tmp_path) as store:
        numbers = [100 * writer + n for n in range(29) for writer in range(3)]
        want = {i: expected({i: number}, layouts[number % 100])[i] for i, number in enumerate(numbers)}
        assert answers(store.get("a", keys(*numbers))) == want


def test_few_files_are_open(tmp_path, monkeypatch):
    """However many segments there are, only so many of their files are open at once."""
    opened, most = [], 0
    real = Segment.open_rows

    def open_rows(segment, directory):
        opened.append(segment.name)
        return real(segment, directory)

    monkeypatch.setattr(Segment, "open_rows", open_rows)
    monkeypatch.setattr(Descriptors, "__init__", lambda self, most=4: _initialise(self, most))
    layouts = [Layout("*", ((torch.int32, (n,)),)) for n in range(1, 60)]
    with DiskStore(tmp_path) as store:
        for n, layout in enumerate(layouts):
            store.put("a", keys(n), rows_of([n], layout))
        store.flush()
        before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
        for n, layout in enumerate(layouts):
            assert answers(store.get("a", keys(n))) == expected({0: n}, layout)
            most = max(most, len(store._descriptors._files))
        assert most == 4
        assert len(opened) == 59
        if before:
            assert len(list(Path("/proc/self/fd").iterdir())) - before <= 8


def _initialise(files, most):
    from collections import OrderedDict

    files.most, files._files = most, OrderedDict()


def test_small_batches_join(tmp_path):
    """Rows of many small puts lie in one segment, and no byte lies between them."""
    with DiskStore(tmp_path) as store:
        for number in range(50):
            store.put("a", keys(number), rows_of([number]))
    (path,) = (tmp_path / "rows" / folder_of("a")).glob("*.rows")
    assert path.stat().st_size == 64 + 50 * VECTOR.row_bytes


def test_segments_end_at_a_size(tmp_path, monkeypatch):
    """A segment that is full is followed by another one; a batch is never parted."""
    monkeypatch.setattr("modcache.stores.disk.segment._MOST_BYTES", 10 * VECTOR.row_bytes)
    with DiskStore(tmp_path) as store:
        for start in range(0, 40, 4):
            store.put("a", keys(*range(start, start + 4)), rows_of(range(start, start + 4)))
        store.put("a", keys(*range(40, 70)), rows_of(range(40, 70)))
        assert answers(store.get("a", keys(*range(70)))) == expected({n: n for n in range(70)})
    sizes = sorted(path.stat().st_size - 64 for path in (tmp_path / "rows" / folder_of("a")).glob("*.rows"))
    assert sizes == [8 * VECTOR.row_bytes] * 5 + [30 * VECTOR.row_bytes]
    with DiskStore(tmp_path) as store:
        assert answers(store.get("a", keys(*range(70)))) == expected({n: n for n in range(70)})


def test_rows_that_wait_and_rows_that_are_written(tmp_path):
    """Rows in memory and rows in files are answered together, in the order of the question."""
    with DiskStore(tmp_path) as store:
        store.put("a", keys(*range(10)), rows_of(range(10)))
        store.flush()
        held = threading.Event()
        real = store._writing._write
        store._writing._write = lambda puts: (held.wait(10), real(puts))
        store.put("a", keys(*range(8, 20)), rows_of(range(108, 120)))
        wanted = [19, 0, 8, 7, 8, 30]
        have = expected({0: 119, 1: 0, 2: 108, 3: 7, 4: 108})
        assert answers(store.get("a", keys(*wanted))) == have
        held.set()
        store.flush()
        assert answers(store.get("a", keys(*wanted))) == have


def test_clock_that_jumps_back(tmp_path, monkeypatch):
    """Later puts win and deleted rows stay away also when the clock goes backwards."""
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now)
    with DiskStore(tmp_path) as store:
        store.put("a", keys(1, 2), rows_of([1, 2]))
    monkeypatch.setattr(time, "time_ns", lambda: now - 3600 * 10**9)
    with DiskStore(tmp_path) as store:
        store.put("a", keys(1), rows_of([11]))
        store.delete("a", keys(2))
    with DiskStore(tmp_path) as store:
        assert answers(store.get("a", keys(1, 2))) == expected({0: 11})


# --- what a store is ------------------------------------------------------------------------------------


def test_options_that_cannot_be_right(tmp_path):
    """Each wrong option says what was given and what to do."""
    tmp_path.joinpath("file").write_text("text")
    with pytest.raises(UsageError, match="is a file"):
        DiskStore(tmp_path / "file")
    for wrong in (0, -1):
        with pytest.raises(UsageError, match=f"max_bytes={wrong} cannot be kept"):
            DiskStore(tmp_path, max_bytes=wrong)
    with pytest.raises(UsageError, match="keep_free=-1"):
        DiskStore(tmp_path, keep_free=-1)
    for wrong in ("1GB", 1e9, True):
        with pytest.raises(UsageTypeError, match="max_bytes is a number of bytes"):
            DiskStore(tmp_path, max_bytes=wrong)
    with pytest.raises(UsageTypeError, match="mmap is True or False, but 'no' was given"):
        DiskStore(tmp_path, mmap="no")
    for wrong in (None, 3, ""):
        with pytest.raises(UsageTypeError, match="path of a cache directory"):
            DiskStore(wrong)
    with pytest.raises(UsageError, match=r"null character in 'no.*such'"):
        DiskStore("no\0such")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_looking_makes_nothing(tmp_path):
    """A store that only looks for rows makes no directory, and starts no thread."""
    threads = threading.active_count()
    with DiskStore(tmp_path / "cache") as store:
        assert store.get("a", keys(1)) == ()
        assert store.stats().rows == 0
        assert store.manifests() == {}
        store.delete("a")
        store.delete("a", keys(1))
        store.flush()
        assert threading.active_count() == threads
    assert list(tmp_path.iterdir()) == []


def test_a_newer_format(tmp_path):
    """A directory of a newer format is refused when it is opened."""
    tmp_path.joinpath("modcache.json").write_text('{"format": 99}')
    with pytest.raises(FormatVersionError, match="format 99"):
        DiskStore(tmp_path)
    with pytest.raises(FormatVersionError, match="format 99"):
        open_directory(tmp_path)


def test_copies_and_pickles(tmp_path):
    """A copy is the same store; a pickle opens the same directory with the same options."""
    with DiskStore(tmp_path / "cache", max_bytes=1 << 30, mmap=False, keep_free=7) as store:
        assert copy.copy(store) is copy.deepcopy(store) is store
        store.put("a", keys(1), rows_of([1]))
        store.flush()
        with pickle.loads(pickle.dumps(store)) as again:
            assert repr(again) == repr(store)
            assert again.options == {"max_bytes": 1 << 30, "mmap": False, "keep_free": 7}
            assert answers(again.get("a", keys(1))) == expected({0: 1})
        tiered = copy.deepcopy(TieredStore(MemoryStore(), store))
        assert tiered.back is store


def test_one_store_for_a_directory(tmp_path):
    """All who ask for a directory share a store, also by a pickle, until it is closed or nobody holds it."""
    tmp_path.joinpath("link").symlink_to(tmp_path / "cache")
    store = open_directory(tmp_path / "cache")
    assert open_directory(str(tmp_path / "link")) is store
    assert pickle.loads(pickle.dumps(store)) is store
    assert DiskStore(tmp_path / "cache") is not store
    store.close()
    other = open_directory(tmp_path / "cache")
    assert other is not store
    del other
    gc.collect()
    assert not open_directory(tmp_path / "cache").closed


def test_a_store_that_nobody_holds(tmp_path):
    """A store that was dropped without a word writes what it has, and lets everything go."""
    store = DiskStore(tmp_path)
    store.put("a", keys(*range(100)), rows_of(range(100)))
    thread = store._writing._thread
    del store
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()
    assert list((tmp_path / "writers").iterdir()) == []
    with DiskStore(tmp_path) as store:
        assert store.stats().rows == 100


ENDS = """
import sys
from multiprocessing import get_context
from tests.contracts import keys, rows_of
from modcache.stores.disk import DiskStore
def fill(path, number):
    DiskStore(path).put("a", keys(*range(number, number + 50)), rows_of(range(number, number + 50)))
if __name__ == "__main__":
    fill(sys.argv[1], 0)
    for number, how in enumerate(["fork", "spawn"], 1):
        child = get_context(how).Process(target=fill, args=(sys.argv[1], number * 100))
        child.start()
        child.join()
"""


def test_the_end_of_a_process(tmp_path):
    """What was put is written when the interpreter ends, and when a child of multiprocessing does."""
    script = tmp_path / "ends.py"
    script.write_text(ENDS)
    environ = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, str(script), str(tmp_path / "cache")]
    subprocess.run(command, check=True, cwd=Path.cwd(), env=environ)
    with DiskStore(tmp_path / "cache") as store:
        numbers = [start + n for start in (0, 100, 200) for n in range(50)]
        assert sorted(store.row_keys("a")) == sorted(keys(*numbers))


UNHEARD = """
import sys
from tests.contracts import keys, rows_of
from modcache.stores.disk import DiskStore
from modcache.stores.disk.directory import Directory

def prepare(self, prepared=Directory.prepare):
    if self.path.name == "full":
        raise OSError("No space left on device")
    prepared(self)

Directory.prepare = prepare
stores = [DiskStore(path) for path in sys.argv[1:]]
for store in stores:
    store.put("a", keys(1), rows_of([1]))
"""


@pytest.mark.parametrize("filters", ["default", "error"])
def test_the_end_of_a_process_tells_what_nobody_heard_of(tmp_path, filters):
    """A script that ends before its next call is told that nothing was written, and what can be written is."""
    places = [str(tmp_path / "full"), str(tmp_path / "cache")]
    done = subprocess.run(
        [sys.executable, "-W", filters, "-c", UNHEARD, *places],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path.cwd(),
    )
    assert done.stderr.count("CacheWarning: no rows are written to the cache directory") == 1, done.stderr
    with DiskStore(places[1]) as store:
        assert store.row_keys("a") == keys(1)


def test_a_closed_store_describes_nothing(tmp_path):
    """After close, no ability answers with anything, and none raises."""
    store = DiskStore(tmp_path)
    store.put("a", keys(1), rows_of([1]))
    store.close()
    assert store.closed
    assert store.contains("a", keys(1)).tolist() == [False]
    assert store.row_keys("a") == store.namespaces() == []
    assert store.namespace_bytes("a") == 0
    store.describe("a", {"class": "x"})
    store.rename("a", "b")
    store.retire("a")
    assert store.manifest("a") is None


# --- manifests ------------------------------------------------------------------------------------------


def test_manifests(tmp_path):
    """Facts are kept beside the rows, readable at once, merged over calls and processes."""
    with DiskStore(tmp_path) as store:
        assert store.manifest("a/b") is None
        store.describe("a/b", {"class": "Encoder", "checked": {"f1": [[]]}})
        store.describe("a/b", {"key": "text", "checked": {"f2": [[1]]}})
        checked = {"f1": [[]], "f2": [[1]]}
        facts = {"namespace": "a/b", "class": "Encoder", "key": "text", "checked": checked}
        assert store.manifest("a/b") == facts
        assert store.manifests() == {"a/b": facts}
    with DiskStore(tmp_path) as store:
        assert store.manifest("a/b") == facts
        store.describe("a/b", {"class": "Other"})
        store.flush()
        assert store.manifests() == {"a/b": {**facts, "class": "Other"}}
        assert store.namespaces() == []


def test_tiers_describe_where_one_of_them_does(tmp_path):
    """A tiered store describes namespaces in the tier that lasts, and does not claim to without one."""
    assert not isinstance(TieredStore(MemoryStore(), MemoryStore()), Describes)
    with DiskStore(tmp_path) as store:
        for tiered in (TieredStore(MemoryStore(), store), TieredStore(store, MemoryStore())):
            assert isinstance(tiered, Describes)
            tiered.describe("a", {"class": "x"})
            assert tiered.manifest("a") == store.manifest("a")
            assert tiered.manifests().keys() == {"a"}


# --- what can go wrong ----------------------------------------------------------------------------------


def rows_files(directory, namespace="a"):
    return sorted((directory / "rows" / folder_of(namespace)).glob("*.rows"))


@pytest.mark.parametrize("layout", [VECTOR, PAIR, LARGE, LARGE_PAIR], ids=["mapped", "pair", "read", "large pair"])
def test_a_damaged_row_is_a_miss_and_repaired(tmp_path, layout):
    """A row that was changed on the disk is not served; the others are; one warning; what is put anew counts."""
    with DiskStore(tmp_path) as store:
        store.put("a", keys(*range(5)), rows_of(range(5), layout))
    (path,) = rows_files(tmp_path)
    with path.open("r+b") as file:
        for number in (1, 3):
            file.seek(64 + number * layout.row_bytes + layout.row_bytes // 2)
            file.write(b"\xab")
    with DiskStore(tmp_path) as store:
        with pytest.warns(CacheWarning, match=r"2 stored row\(s\) .* checksum"):
            found = store.get("a", keys(*range(5)))
        assert answers(found) == expected({0: 0, 2: 2, 4: 4}, layout)
        assert answers(store.get("a", keys(*range(5)))) == expected({0: 0, 2: 2, 4: 4}, layout)
        store.put("a", keys(1), rows_of([1], layout))
    with DiskStore(tmp_path) as store:
        assert answers(store.get("a", keys(0, 1, 2))) == expected({0: 0, 1: 1, 2: 2}, layout)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("layout", [VECTOR, LARGE], ids=["small", "large"])
def test_a_file_cut_short_beneath_an_open_store(tmp_path, layout, mmap):
    """Rows beyond the end of a file are missing, the rest is served, and the process lives."""
    with DiskStore(tmp_path) as writer, DiskStore(tmp_path, mmap=mmap) as store:
        writer.put("a", keys(*range(9)), rows_of(range(9), layout))
        writer.put("b", keys(1), rows_of([1]))
        writer.flush()
        writer.put("a", keys(*range(9, 2000)), rows_of(range(9, 2000), VECTOR)) if layout is VECTOR else None
        writer.flush()
        assert len(answers(store.get("a", keys(*range(9))))) == 9
        (path,) = rows_files(tmp_path)
        os.truncate(path, 64 + 9 * layout.row_bytes - 1 if layout is LARGE else 64 + 9 * layout.row_bytes)
        there = answers(store.get("a", keys(*range(9))))
        assert there == (expected({n: n for n in range(9)}, layout) if layout is VECTOR else {})
        assert store.get("a", keys(1500)) == ()
        assert answers(store.get("b", keys(1))) == expected({0: 1})


def test_an_unlinked_segment_is_gone(tmp_path, monkeypatch):
    """When somebody removes the files of a segment, its rows are missing from then on."""
    monkeypatch.setattr(group, "_LINKED", 0.0)
    with DiskStore(tmp_path) as store:
        for layout in (VECTOR, PAIR):
            store.put("a", keys(layout.row_bytes), rows_of([1], layout))
        store.flush()
        assert len(store.get("a", keys(VECTOR.row_bytes, PAIR.row_bytes))) == 2
        for path in rows_files(tmp_path):
            if path.stat().st_size == 64 + VECTOR.row_bytes:
                path.unlink()
        (found,) = store.get("a", keys(VECTOR.row_bytes, PAIR.row_bytes))
        assert found.positions.tolist() == [1]
        assert store.stats().rows == 1


def test_an_interrupt_while_rows_get_their_place(tmp_path, monkeypatch):
    """Rows whose put was interrupted are lost or kept, and later rows are right."""
    with DiskStore(tmp_path) as store:
        store.put("a", keys(0), rows_of([0]))
        store.flush()
        with monkeypatch.context() as patch:
            patch.setattr(store._writing, "push", lambda task: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                store.put("a", keys(1, 2), rows_of([1, 2]))
        store.put("a", keys(3), rows_of([3]))
        store.flush()
        store.put("a", keys(4), rows_of([4]))
        store.flush()
        have = answers(store.get("a", keys(0, 1, 2, 3, 4)))
        assert have.items() <= expected({n: n for n in range(5)}).items()
        assert {0, 4} <= have.keys()
    with DiskStore(tmp_path) as store:
        have = answers(store.get("a", keys(0, 1, 2, 3, 4)))
        assert {0, 4} <= have.keys()


def test_a_million_keys_take_little_room(tmp_path):
    """Many rows of no bytes are found again, and a put of many is one commit of bounded frames."""
    empty = Layout("*", ((torch.float32, (0,)),))
    random = np.random.default_rng(0)
    joined = random.bytes(16 * 200_000)
    many = [joined[i : i + 16] for i in range(0, len(joined), 16)]
    with DiskStore(tmp_path) as store:
        assert store.put("a", many, Rows(empty, (torch.empty(200_000, 0),))) == 200_000
    with DiskStore(tmp_path) as store:
        assert store.contains("a", [many[0], many[-1], key(1)]).tolist() == [True, True, False]
        assert store.stats().rows == 200_000


def test_an_interrupt_leaves_nothing_locked(tmp_path, monkeypatch):
    """Who calls a store takes bare locks alone: an interrupt within `Condition.__enter__` would lock it for good.

    The thread that writes may: signals are never handled there.
    """
    monkeypatch.setattr(disk_store, "_QUEUE_BYTES", 1000)
    real, caller = threading.Condition.__enter__, threading.current_thread()

    def entered(self):
        assert threading.current_thread() is not caller, "an interrupt here would leave the condition locked"
        return real(self)

    with DiskStore(tmp_path) as store:
        store.put("a", keys(1), rows_of([1]))  # starts the thread
        store.flush()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Condition, "__enter__", entered)
            for number in range(2, 60):
                store.put("a", [key(number)] * 2, rows_of([number] * 2))
            store.flush()
            assert len(answers(store.get("a", keys(*range(1, 60))))) == 59
            store.describe("a", {"class": "tests.Interrupted"})
            store.delete("a", keys(5))
            store.flush()
        assert len(store.row_keys("a")) == 58


def test_what_others_dropped_need_not_last(tmp_path):
    """A flush after somebody dropped the namespace has nothing to wait for, and rows are written on without a word."""
    with DiskStore(tmp_path) as store:
        store.put("a", keys(1), rows_of([1]))
        while store._writing.queued:
            time.sleep(0.001)
        with DiskStore(tmp_path) as other:
            assert other.delete("a") == 1
        store.flush()
        store.put("a", keys(2), rows_of([2]))
        store.flush()
    with DiskStore(tmp_path) as again:
        assert again.row_keys("a") == keys(2)


def test_what_was_asked_for_first_is_in_the_catalogue(tmp_path):
    """Who asks for rows, finds none and puts them, as a loop does, leaves a catalogue that knows of them."""
    directory = tmp_path / "cache"
    with DiskStore(directory) as store:
        assert store.get("a", keys(1, 2)) == ()
        store.put("a", keys(1, 2), rows_of([1, 2]))
    (entry,) = Catalogue(directory / CATALOGUE, writable=False).entries().values()
    assert (entry.rows, abs(entry.last_used - time.time()) < 60) == (2, True)


def test_rows_that_nobody_asked_for_yet_are_sorted_in_behind_the_loop(tmp_path):
    """What was put goes into the index when there is nothing to write, so that who asks later finds it done."""
    with DiskStore(tmp_path / "cache") as store:
        store.put("a", keys(1, 2), rows_of([1, 2]))
        with mock.patch.object(Statements, "settle", autospec=True, side_effect=Statements.settle) as settle:
            store.put("a", keys(3), rows_of([3]))
            end = time.monotonic() + 60
            while mock.call(mock.ANY, least=0) not in settle.mock_calls and time.monotonic() < end:
                time.sleep(0.01)
        assert mock.call(mock.ANY, least=0) in settle.mock_calls
        assert sorted(store.row_keys("a")) == sorted(keys(1, 2, 3))
