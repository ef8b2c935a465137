"""TieredStore: one store in front of another."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import threading

import numpy as np
import pytest
import torch

from modcache.errors import UsageTypeError
from modcache.rows import SINGLE, Layout, Rows
from modcache.stores import Found, MemoryStore, StoreStats, TieredStore
from tests.contracts import LAYOUTS, PAIR, LendingContract, answers, expected, keys, rows_of


class TestTieredStore(LendingContract):
    """Two memory stores keep the contract together."""

    @pytest.fixture
    def store(self):
        with_room = TieredStore(MemoryStore(1 << 20), MemoryStore(1 << 20))
        yield with_room
        with_room.close()


class TestTinyFront(LendingContract):
    """The contract holds, too, when the front drops nearly everything."""

    lends = False

    @pytest.fixture
    def store(self):
        return TieredStore(MemoryStore(40, eviction="lru"), MemoryStore(1 << 20))


class TestDeviceFront(LendingContract):
    """The contract holds with a front that keeps its rows as a device does."""

    lends = False

    @pytest.fixture
    def store(self, monkeypatch):
        monkeypatch.setattr("modcache.stores.columns.HostColumn", device_column)
        front = MemoryStore(1 << 20)
        monkeypatch.undo()
        return TieredStore(front, MemoryStore(1 << 20))


def device_column(dtype, shape, most):
    from modcache.stores.columns import DeviceColumn

    return DeviceColumn(dtype, shape, most, device=torch.device("cpu"))


class PlainStore:
    """A store of the protocol alone, without further abilities; it says when it is asked."""

    def __init__(self) -> None:
        self.inner = MemoryStore()
        self.calls: list[str] = []

    def get(self, namespace, row_keys) -> tuple[Found, ...]:
        self.calls.append("get")
        return self.inner.get(namespace, row_keys)

    def put(self, namespace, row_keys, rows: Rows) -> int:
        return self.inner.put(namespace, row_keys, rows)

    def delete(self, namespace, row_keys=None) -> int:
        return self.inner.delete(namespace, row_keys)

    def row_keys(self, namespace) -> list[bytes]:
        return self.inner.row_keys(namespace)

    def namespaces(self) -> list[str]:
        return self.inner.namespaces()

    def stats(self) -> StoreStats:
        return self.inner.stats()

    def flush(self) -> None:
        self.calls.append("flush")

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def back() -> PlainStore:
    return PlainStore()


@pytest.fixture
def store(back) -> TieredStore:
    return TieredStore(MemoryStore(), back)


def test_front_answers_alone(store, back):
    """When the front has all rows, the back is not asked."""
    store.put("a", keys(1, 2), rows_of([1, 2]))
    store.get("a", keys(2, 1))
    assert back.calls == []


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_of_both_tiers_are_one_found(store, layout):
    """Rows of one layout from front and back come as one Found in the order of the keys."""
    store.put("a", keys(*range(9)), rows_of(range(9), layout))
    store.front.delete("a", keys(1, 4, 8, 0))
    wanted = [8, 3, 1, 77, 8, 4, 0, 2]
    want = expected({i: n for i, n in enumerate(wanted) if n != 77}, layout)
    found = store.get("a", keys(*wanted))
    assert len(found) == 1
    assert answers(found) == want


def test_promotes(store, back):
    """What came from the back is in front afterwards, also when it was asked for twice."""
    back.put("a", keys(1, 2), rows_of([1, 2]))
    back.put("a", keys(3), rows_of([3], PAIR))
    want = expected({0: 1, 1: 2, 2: 1}) | expected({3: 3}, PAIR)
    assert answers(store.get("a", keys(1, 2, 1, 3))) == want
    assert answers(store.front.get("a", keys(1, 2, 1, 3))) == want


def test_layouts_differ_between_tiers(store, back):
    """A layout that only the back has comes as a Found of its own."""
    back.put("a", keys(1), rows_of([1], PAIR))
    store.front.put("a", keys(2), rows_of([2]))
    assert answers(store.get("a", keys(1, 2))) == expected({0: 1}, PAIR) | expected({1: 2})


def test_results_of_a_promotion_are_private(store, back):
    """A row on its way from back to front is not shared with the caller."""
    back.put("a", keys(1), rows_of([1]))
    store.get("a", keys(1))[0].rows.tensors[0].fill_(99)
    assert answers(store.get("a", keys(1))) == expected({0: 1})


def test_a_full_front(back):
    """Rows that the front refuses are served by the back, and count as admitted."""
    store = TieredStore(MemoryStore(12), back)
    assert store.put("a", keys(1, 2, 3), rows_of([1, 2, 3])) == 3
    assert answers(store.get("a", keys(3, 1))) == expected({0: 3, 1: 1})
    assert store.stats().refused == 0


def test_stats():
    """Rows are those of the fuller tier, bytes those of both, refused what neither took."""
    store = TieredStore(MemoryStore(24, eviction="lru"), MemoryStore(36))
    store.put("a", keys(1, 2, 3, 4), rows_of([1, 2, 3, 4]))
    assert store.stats() == StoreStats(rows=3, bytes=60, max_bytes=36, namespaces=1, refused=1, evicted=0)
    store.back.delete("a")
    assert store.stats().rows == 2
    assert store.stats().max_bytes == 24


def test_abilities_where_a_tier_has_none(store, back):
    """Without `contains` the back is asked for rows; without `rename` it forgets them."""
    store.put("a", keys(1, 2), rows_of([1, 2]))
    store.front.delete("a", keys(1))
    assert store.contains("a", keys(1, 2, 3)).tolist() == [True, True, False]
    store.retire("a")
    store.rename("a", "b")
    assert answers(store.get("b", keys(1, 2))) == expected({1: 2})
    assert back.namespaces() == []


def test_use_of_a_retired_namespace_reaches_the_back():
    """A namespace that the front alone can serve is not retired in the back any more once it is used."""
    store = TieredStore(MemoryStore(), MemoryStore(24))
    store.put("a", keys(1), rows_of([1]))
    store.retire("a")
    assert store.lend("a", keys(1), len) is None
    store.get("a", keys(1))
    assert store.lend("a", keys(1), len) == 1
    store.back.put("b", keys(2, 3), rows_of([2, 3]))
    assert store.back.contains("a", keys(1)).all()


def test_retired_rows_go_first_in_the_back():
    """`retire` is passed on to both tiers."""
    store = TieredStore(MemoryStore(24), MemoryStore(24))
    store.put("a", keys(1, 2), rows_of([1, 2]))
    store.retire("a")
    assert store.put("b", keys(3, 4), rows_of([3, 4])) == 2
    assert store.namespaces() == ["b"]


def test_flush_and_close_reach_the_back(store, back):
    """Both tiers are flushed and closed."""
    store.flush()
    store.close()
    assert back.calls == ["flush", "close"]


def test_copies_are_empty():
    """A pickle and a deepcopy of two memory stores are two empty ones."""
    store = TieredStore(MemoryStore(100), MemoryStore(200))
    store.put("a", keys(1), rows_of([1]))
    for other in (pickle.loads(pickle.dumps(store)), copy.deepcopy(store)):
        assert other.stats().rows == 0
        assert other.back.stats().max_bytes == 200


@pytest.mark.parametrize("place", ["front", "back"])
def test_not_a_store(place):
    """What is not a store is refused by name."""
    tiers = {"front": MemoryStore(), "back": MemoryStore(), place: "cache/"}
    with pytest.raises(UsageTypeError, match=f"The {place} of a TieredStore is a store, but 'cache/'"):
        TieredStore(**tiers)


def test_results_are_not_views(store, back):
    """Joined rows can be changed in place by something that requires grad."""
    store.front.put("a", keys(1), rows_of([1], PAIR))
    back.put("a", keys(2), rows_of([2], PAIR))
    with torch.no_grad():
        (found,) = store.get("a", keys(1, 2))
    out = found.rows.tensors[0]
    out += torch.ones((), dtype=out.dtype, requires_grad=True)
    assert out.requires_grad


class SlowBack(PlainStore):
    """A back that lets something happen between its reading of rows and its answer."""

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile = lambda: None

    def get(self, namespace, row_keys) -> tuple[Found, ...]:
        found = super().get(namespace, row_keys)
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        in_thread(meanwhile)
        return found


def in_thread(work) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


CHANGES = {
    "put": (lambda store: store.put("a", keys(1), rows_of([11])), expected({0: 11, 1: 2})),
    "delete": (lambda store: store.delete("a", keys(1)), expected({1: 2})),
    "delete all": (lambda store: store.delete("a"), {}),
    "rename": (lambda store: store.rename("a", "b"), {}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_during_a_promotion_wins(name):
    """Rows that another thread changes while they are on their way to the front do not come back."""
    change, want = CHANGES[name]
    store = TieredStore(MemoryStore(), SlowBack())
    store.back.inner = MemoryStore()
    store.back.put("a", keys(1, 2), rows_of([1, 2]))
    store.back.rename = store.back.inner.rename
    store.back.meanwhile = lambda: change(store)
    assert answers(store.get("a", keys(1, 2))) == expected({0: 1, 1: 2})
    assert answers(store.get("a", keys(1, 2))) == want
    assert answers(store.get("a", keys(1, 2))) == want


def test_a_get_in_the_middle_of_a_put_promotes_nothing():
    """A get that begins when only the front has the new row does not put the old one over it."""
    store = TieredStore(MemoryStore(), SlowBack())
    store.back.put("a", keys(1, 2), rows_of([1, 2]))
    really = store.front.put

    def interrupted(*args):
        store.front.put = really
        in_thread(lambda: store.get("a", keys(1, 2)))
        return really(*args)

    store.front.put = interrupted
    store.put("a", keys(1), rows_of([11]))
    assert answers(store.get("a", keys(1, 2))) == expected({0: 11, 1: 2})
    assert answers(store.front.get("a", keys(1, 2))) == expected({0: 11, 1: 2})


def test_a_failed_put_does_not_end_promotions(store, back):
    """After a put that raised, rows are promoted as before."""
    with pytest.raises(ValueError, match="2 row keys"):
        store.put("a", keys(1, 2), rows_of([1]))
    back.put("a", keys(1), rows_of([1]))
    store.get("a", keys(1))
    assert answers(store.front.get("a", keys(1))) == expected({0: 1})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_promotes(store, back):
    """A child that was forked in the middle of another thread's put or promotion begins anew."""
    back.put("a", keys(1), rows_of([1]))
    holding, done = threading.Event(), threading.Event()

    def hold():
        with store._changes.change(), store._changes._locked():
            holding.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait()
    pid = os.fork()
    if pid == 0:
        signal.alarm(120)
        store.get("a", keys(1))
        os._exit(0 if answers(store.front.get("a", keys(1))) == expected({0: 1}) else 1)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_repr_names_both_tiers(store, back):
    """A tiered store shows what it is made of, front first."""
    assert repr(store) == f"TieredStore({store.front!r}, {back!r})"


def test_namespace_bytes():
    """The bytes of a namespace are those of the back where it counts them, else those in front."""
    both, front_only = TieredStore(MemoryStore(), MemoryStore()), TieredStore(MemoryStore(), PlainStore())
    for store in (both, front_only):
        store.put("a", keys(1, 2), rows_of([1, 2]))
    both.front.delete("a")
    assert (both.namespace_bytes("a"), both.namespace_bytes("b")) == (24, 0)
    assert front_only.namespace_bytes("a") == 24
    assert TieredStore(PlainStore(), PlainStore()).namespace_bytes("a") == 0


def test_one_value_with_a_stride_comes_from_the_back(store, back, monkeypatch):
    """A store of the user's may give a row of one value that is cut out of others; it is joined with the front's."""
    layout = Layout(SINGLE, ((torch.float32, (1,)),))
    store.front.put("a", keys(1), Rows(layout, (torch.ones(1, 1),)))
    cut = torch.full((4, 2), 7.0)[:1, ::2]
    assert cut.is_contiguous()
    assert cut.stride(-1) > 1
    monkeypatch.setattr(back, "get", lambda *_: (Found(np.array([0]), Rows(layout, (cut,))),))
    (found,) = store.get("a", keys(1, 2))
    assert found.rows.tensors[0].tolist() == [[1.0], [7.0]]


def test_closed_at_the_end_of_a_block():
    """A store is a context manager: at the end of the block both tiers are closed."""
    with TieredStore(MemoryStore(1 << 20), MemoryStore(1 << 20)) as store:
        assert store.put("a", keys(1), rows_of([1])) == 1
    assert (store.front.put("a", keys(1), rows_of([1])), store.back.put("a", keys(1), rows_of([1]))) == (0, 0)
