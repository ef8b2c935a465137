"""A directory against a dict, step by step: several stores and processes on it, reopened, damaged, and full."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from modcache import DiskStore
from modcache.rows import Layout, Rows
from tests.contracts import PAIR, VECTOR, answers, expected, rows_of
from tests.directories import IN_MEMORY, SOAK, files_in, fork, key_of, needs_fork, quiet, sizes_in

KEYS = [key_of(number) for number in range(16)]
HEX = "0123456789abcdef0123456789abcdef"
names = st.sampled_from([HEX, "b", "../c"])
wanted = st.lists(st.integers(0, len(KEYS) - 1), min_size=1, max_size=6)
layouts = st.sampled_from([VECTOR, VECTOR, PAIR])
FD = Path("/proc/self/fd")


class DirectoryMachine(RuleBasedStateMachine):
    """Two stores of this process and passing ones of other processes, all on one directory."""

    mmap = True

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[tuple[str, int], tuple[Layout, int]] = {}
        self.told: dict[str, dict[str, object]] = {}
        self.value = 0
        self.before = self._held()
        self.place = Path(tempfile.mkdtemp(prefix="modcache-test-", dir=IN_MEMORY))
        self.directory = self.place / "cache"
        self.open_stores = contextlib.ExitStack()
        self.mine: DiskStore | None = None
        self.other: DiskStore | None = None

    @staticmethod
    def _held() -> tuple[set[threading.Thread], int]:
        return set(threading.enumerate()), len(os.listdir(FD)) if FD.exists() else 0

    @initialize()
    def make(self):
        self.mine = self.made()

    def made(self) -> DiskStore:
        return DiskStore(self.directory, mmap=self.mmap, keep_free=0)

    def teardown(self):
        for store in (self.mine, self.other):
            if store is not None:
                store.close()
        shutil.rmtree(self.place)
        assert self._held() == self.before, "threads or descriptors are left"

    # --- what every store does

    @rule(name=names, numbers=wanted, layout=layouts)
    def put(self, name, numbers, layout):
        values = self.values(len(numbers))
        assert self.mine.put(name, [KEYS[n] for n in numbers], rows_of(values, layout)) == len(set(numbers))
        self.note(name, numbers, values, layout)

    def values(self, count: int) -> list[int]:
        self.value += count
        return [value % 120 for value in range(self.value - count, self.value)]

    def note(self, name, numbers, values, layout):
        self.rows |= {(name, n): (layout, value) for n, value in zip(numbers, values, strict=True)}

    @rule(name=names, numbers=wanted)
    def get(self, name, numbers):
        self.same(self.mine, name, numbers)

    def same(self, store, name, numbers) -> None:
        found = answers(store.get(name, [KEYS[n] for n in numbers]))
        want = {}
        for position, n in enumerate(numbers):
            if (name, n) in self.rows:
                layout, value = self.rows[name, n]
                want |= expected({position: value}, layout)
        assert found == want

    @rule(name=names, numbers=wanted)
    def delete(self, name, numbers):
        here = {n for n in numbers if (name, n) in self.rows}
        assert self.mine.delete(name, [KEYS[n] for n in numbers]) == len(here)
        for n in here:
            self.rows.pop((name, n))

    @rule(name=names)
    def delete_namespace(self, name):
        here = [row for row in self.rows if row[0] == name]
        assert self.mine.delete(name) == len(here)
        self.forget(name)

    def forget(self, name):
        self.rows = {row: value for row, value in self.rows.items() if row[0] != name}
        self.told.pop(name, None)

    @rule()
    def flush(self):
        self.mine.flush()

    @rule(name=names, fact=st.sampled_from(["class", "made"]), text=st.text(max_size=3))
    def describe(self, name, fact, text):
        if any(row[0] == name for row in self.rows):
            self.mine.flush()
            self.mine.describe(name, {fact: text, "checked": {text.encode().hex(): [[1]]}})
            facts = self.told.setdefault(name, {})
            checked = {**facts.get("checked", {}), text.encode().hex(): [[1]]}
            facts |= {fact: text, "checked": checked}
            self.mine.flush()

    # --- what only a directory does

    @rule()
    def reopen(self):
        self.mine.close()
        self.mine = self.made()

    @rule()
    def second(self):
        """Another store on the directory takes over, and the first one stays open."""
        self.mine.flush()
        if self.other is None:
            self.other = self.made()
        self.mine, self.other = self.other, self.mine
        for name in (HEX, "b", "../c"):
            self.mine.get(name, [bytes(16)])  # a miss looks at what others did

    @rule(name=names, numbers=wanted, layout=layouts, gone=wanted)
    def another_process(self, name, numbers, layout, gone):
        values = self.values(len(numbers))
        self.mine.flush()

        def child(say):
            with self.made() as store:
                store.delete(name, [KEYS[n] for n in gone])
                store.put(name, [KEYS[n] for n in numbers], rows_of(values, layout))

        fork(child)
        for n in gone:
            self.rows.pop((name, n), None)
        self.note(name, numbers, values, layout)
        self.mine.get(name, [bytes(16)])

    @rule(name=names)
    def another_process_drops_a_namespace(self, name):
        self.mine.flush()
        fork(lambda say: self.made().delete(name))
        self.forget(name)
        self.mine.get(name, [bytes(16)])

    @rule(number=st.integers(0, 7))
    def inherited_by_a_fork(self, number):
        """A forked child writes through the very store of its parent, with whatever waits there."""
        values = self.values(1)

        def child(say):
            self.mine.put("b", [KEYS[number]], rows_of(values))
            self.mine.close()

        self.mine.flush()
        fork(child)
        self.note("b", [number], values, VECTOR)
        self.mine.get("b", [bytes(16)])

    @precondition(lambda self: self.other is None)
    @rule(pick=st.integers(0, 1 << 20))
    def corrupt(self, pick):
        """One byte of one row changes on the disk: that row is gone, no other, and it can be put again."""
        self.mine.close()
        files = [path for path in files_in(self.directory) if path.suffix == ".rows" and path.stat().st_size > 64]
        if files:
            path = files[pick % len(files)]
            content = bytearray(path.read_bytes())
            place = 64 + pick % (len(content) - 64)
            content[place] ^= 1 + pick % 255
            path.write_bytes(content)
        with quiet(1):
            self.mine = self.made()
            lost = []
            for name in (HEX, "b", "../c"):
                found = answers(self.mine.get(name, KEYS))
                here = {n for other, n in self.rows if other == name}
                assert set(found) <= here
                lost += [(name, n) for n in here - set(found)]
            for name in (HEX, "b", "../c"):
                self.same(self.mine, name, [n for n in range(len(KEYS)) if (name, n) not in lost])
        assert len(lost) <= 1
        for name, n in lost:
            layout, value = self.rows[name, n]
            self.mine.put(name, [KEYS[n]], rows_of([value], layout))

    @rule(name=names)
    def fill_up(self, name):
        """A store with no room left refuses new rows, and has all others."""
        self.mine.flush()
        with quiet(1), DiskStore(self.directory, max_bytes=max(1, sizes_in(self.directory)), keep_free=0) as full:
            layout = Layout("*", ((VECTOR.leaves[0][0], (1000,)),))
            before = set(full.row_keys(name))
            full.put(name, [b"\xaa" * 16], rows_of([1], layout))
            full.flush()
            assert set(full.row_keys(name)) == before
            assert full.stats().refused == 1
            self.same(full, name, range(len(KEYS)))

    @rule(name=names, numbers=wanted)
    def ask_the_other(self, name, numbers):
        """The store that was left behind sees, after a miss, what the one in use has committed."""
        if self.other is not None:
            self.mine.flush()
            self.other.get(name, [bytes(16)])
            self.same(self.other, name, numbers)

    # --- what always holds

    @invariant()
    def same_rows(self):
        if self.mine is None:
            return
        here = {HEX: set(), "b": set(), "../c": set()}
        for name, n in self.rows:
            here[name].add(n)
        for name, numbers in here.items():
            assert sorted(self.mine.row_keys(name)) == sorted(KEYS[n] for n in numbers)
            assert self.mine.contains(name, KEYS).tolist() == [n in numbers for n in range(len(KEYS))]
            facts = self.mine.manifest(name)
            if name in self.told and numbers:
                assert facts is not None
                told = dict(self.told[name])
                # What a store told before others dropped the namespace is still true, and it may tell it again.
                assert told.pop("checked").items() <= facts["checked"].items()
                assert told.items() <= facts.items()
        assert sorted(self.mine.namespaces()) == sorted(name for name in here if here[name])
        stats = self.mine.stats()
        assert stats.rows == len(self.rows)
        assert stats.namespaces == len(self.mine.namespaces())


class WithoutMaps(DirectoryMachine):
    """The same, where rows are read from the files."""

    mmap = False


@needs_fork
@pytest.mark.parametrize("machine", [DirectoryMachine, WithoutMaps])
def test_a_directory_is_a_dict_that_lasts(machine):
    """Whatever stores and processes do with a directory, it is a dict; what lasts is what was put last."""
    case = machine.TestCase
    case.settings = settings(max_examples=150 if SOAK else 8, stateful_step_count=30, deadline=None)
    case().runTest()


def test_rows_of_a_closed_store(tmp_path):
    """A closed store finds nothing and admits nothing; the directory keeps what it had."""
    store = DiskStore(tmp_path)
    store.put("a", KEYS[:2], Rows(VECTOR, rows_of([1, 2]).tensors))
    store.close()
    assert store.get("a", KEYS[:2]) == ()
    assert store.put("a", KEYS[:2], rows_of([1, 2])) == 0
    with DiskStore(tmp_path) as again:
        assert answers(again.get("a", KEYS[:2])) == expected({0: 1, 1: 2})
