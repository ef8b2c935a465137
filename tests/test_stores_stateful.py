"""Stores against a dict, step by step, with bounds so tiny that rows come and go all the time."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from modcache.stores import MemoryStore, TieredStore, columns
from modcache.stores.index import KeyIndex
from tests.contracts import PAIR, VECTOR, answers, expected, key, rows_of

KEYS = [key(number) for number in range(24)]
names = st.sampled_from(["a", "b", "c"])
wanted = st.lists(st.integers(0, len(KEYS) - 1), min_size=1, max_size=9)
layouts = st.sampled_from([VECTOR, VECTOR, PAIR])


class StoreMachine(RuleBasedStateMachine):
    """A store with all abilities, and what a list of rows in the order of their use says of it."""

    eviction = "none"
    one_layout = False

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[tuple[str, int], tuple[object, int]] = {}  # from the least recently used on
        self.retired: list[str] = []
        self.value = 0

    @initialize(bound=st.integers(1, 20), newest=st.sampled_from([1, 4, 1000]))
    def make(self, bound, newest):
        self.bound = bound * VECTOR.row_bytes
        original = KeyIndex.__init__
        # The index merges its newest keys after a few, not after thousands.
        KeyIndex.__init__ = lambda index, _=0: original(index, newest)
        self.restore = lambda: setattr(KeyIndex, "__init__", original)
        self.store = self.make_store()

    def make_store(self):
        return MemoryStore(self.bound, eviction=self.eviction)

    def teardown(self):
        if hasattr(self, "restore"):
            self.restore()

    def held(self) -> int:
        return sum(layout.row_bytes for layout, _ in self.rows.values())

    def use(self, name: str) -> None:
        if name in self.retired:
            self.retired.remove(name)

    def drop(self, row) -> None:
        self.rows.pop(row)

    def admit(self, row, layout, value) -> bool:
        """What the store does with one new row."""
        if layout.row_bytes > self.bound:
            return False
        while self.held() + layout.row_bytes > self.bound and self.retired:
            # Which rows of a retired namespace go is left to the store: ask it.
            name = self.retired[0]
            here = [n for n in self.rows if n[0] == name]
            gone = [n for n in here if not self.store.contains(name, [KEYS[n[1]]])[0]]
            for n in gone:
                self.drop(n)
            if len(gone) < len(here):
                break
            self.retired.pop(0)
        while self.held() + layout.row_bytes > self.bound:
            if self.eviction == "none":
                return False
            self.drop(next(iter(self.rows)))
        self.rows[row] = (layout, value)
        return True

    @rule(name=names, numbers=wanted, layout=layouts)
    def put(self, name, numbers, layout):
        layout = VECTOR if self.one_layout else layout
        values = list(range(self.value, self.value + len(numbers)))
        self.value += len(numbers)
        self.use(name)
        count = self.store.put(name, [KEYS[n] for n in numbers], rows_of(values, layout))
        last = dict(zip(numbers, values, strict=True))
        if self.eviction == "none":
            last = {n: last[n] for n in sorted(last, key=lambda n: last[n])}
            new = [n for n in last if self.rows.get((name, n), (None,))[0] != layout]
            for n in last:
                if n in new:
                    self.rows.pop((name, n), None)
                else:
                    self.rows[name, n] = (layout, last[n])
            admitted = [n for n in new if self.admit((name, n), layout, last[n])]
            assert count == len(last) - len(new) + len(admitted)
        else:
            for n, value in zip(numbers, values, strict=True):
                self.rows.pop((name, n), None)
                self.admit((name, n), layout, value)

    @rule(name=names, numbers=wanted)
    def get(self, name, numbers):
        self.use(name)
        found = answers(self.store.get(name, [KEYS[n] for n in numbers]))
        want = {}
        for position, n in enumerate(numbers):
            if (name, n) in self.rows:
                layout, value = self.rows[name, n]
                want |= expected({position: value}, layout)
                self.rows[name, n] = self.rows.pop((name, n))
        assert found == want

    @rule(name=names, numbers=wanted)
    def delete(self, name, numbers):
        here = {n for n in numbers if (name, n) in self.rows}
        assert self.store.delete(name, [KEYS[n] for n in numbers]) == len(here)
        for n in here:
            self.drop((name, n))

    @rule(name=names)
    def delete_namespace(self, name):
        here = [row for row in self.rows if row[0] == name]
        assert self.store.delete(name) == len(here)
        for row in here:
            self.drop(row)

    @rule(old=names, new=names)
    def rename(self, old, new):
        self.store.rename(old, new)
        moved = [row for row in self.rows if row[0] == old]
        if old == new or not moved:
            return
        self.use(old)
        merging = any(row[0] == new for row in self.rows)
        self.use(new)
        if merging:
            for _, n in moved:
                self.rows.pop((new, n), None)
                self.rows[new, n] = self.rows.pop((old, n))
        else:
            self.rows = {(new if name == old else name, n): row for (name, n), row in self.rows.items()}

    @invariant()
    def same_rows(self):
        if not hasattr(self, "store"):
            return
        for name in "abc":
            here = [n for other, n in self.rows if other == name]
            assert sorted(self.store.row_keys(name)) == sorted(KEYS[n] for n in here)
            assert self.store.contains(name, KEYS).tolist() == [n in here for n in range(len(KEYS))]
        assert sorted(self.store.namespaces()) == sorted({name for name, _ in self.rows})
        self.retired = [name for name in self.retired if name in self.store.namespaces()]

    @invariant()
    def bound_holds(self):
        if hasattr(self, "store"):
            stats = self.store.stats()
            assert stats.bytes <= stats.max_bytes
            assert stats.bytes == self.held()
            assert stats.rows == len(self.rows)


class Retiring(StoreMachine):
    """The same, with namespaces that retire."""

    @rule(name=names)
    def retire(self, name):
        self.store.retire(name)
        if name not in self.retired and any(row[0] == name for row in self.rows):
            self.retired.append(name)


class LeastRecentlyUsed(StoreMachine):
    """The same, where the least recently used rows go, and exactly these."""

    eviction = "lru"
    one_layout = True


class Grown(Retiring):
    """The same in memory that is grown, not reserved."""

    def make_store(self):
        reserve, columns.reserve = columns.reserve, lambda size, huge_from: None
        restore = self.restore
        self.restore = lambda: (restore(), setattr(columns, "reserve", reserve))
        return MemoryStore(self.bound)


class Tiers(StoreMachine):
    """Two tiers together, with a front that loses rows: nobody notices."""

    one_layout = True

    def make_store(self):
        return TieredStore(MemoryStore(5 * VECTOR.row_bytes, eviction="lru"), MemoryStore())

    def admit(self, row, layout, value) -> bool:
        self.rows[row] = (layout, value)
        return True

    @invariant()
    def bound_holds(self):
        if hasattr(self, "store"):
            assert self.store.front.stats().bytes <= 5 * VECTOR.row_bytes
            assert self.store.stats().rows == len(self.rows)


@pytest.mark.parametrize("machine", [StoreMachine, Retiring, LeastRecentlyUsed, Grown, Tiers])
def test_store_is_a_bounded_dict(machine):
    """Whatever is put, got, deleted, renamed and retired, a store is a dict that keeps its bound."""
    case = machine.TestCase
    case.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
    case().runTest()
