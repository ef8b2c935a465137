"""What all calls of one module share: verdicts, a store that may fail, and what was said."""

import threading
import warnings

import pytest
import torch

from modcache import CacheWarning, MemoryStore, cache_of, cached_module
from modcache.memo import Bypass, Memo, Options
from modcache.outputs import rows_of

from .models import encoder

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
FORM, OTHER = (("x",),), (("y",),)
KEYS = [bytes([number]) * 16 for number in range(4)]


def memo(store=None):
    return Memo("Encoder", Options(), MemoryStore() if store is None else store)


def put(to, keys=KEYS, namespace="n"):
    to.put(namespace, keys, rows_of(torch.zeros(len(keys), 2), len(keys), torch.device("cpu")))


def stored(to, namespace="n"):
    return sorted(to.store.row_keys(namespace))


def test_a_verdict_is_about_a_form_and_a_namespace():
    """What passed, passed for calls of one form in one namespace."""
    one = memo()
    one.let_pass("n", FORM, ((),))
    assert one.findings.passed("n", FORM) == ((),)
    assert one.findings.passed("n", OTHER) is None
    assert one.findings.passed("m", FORM) is None
    assert one.findings.blocked(FORM) is None


def test_a_blocked_form_is_blocked_everywhere():
    """A form that was blocked is bypassed in all namespaces, also where it had passed."""
    one = memo()
    one.let_pass("n", FORM, ((),))
    one.block(FORM, "random")
    assert one.findings.blocked(FORM) == "random"
    assert one.findings.blocked(OTHER) is None
    assert one.findings.passed("n", FORM) is None


def test_rows_that_were_stored_unchecked_go_when_a_check_fails():
    """A failing check drops what was stored before there was one; a passing check keeps it."""
    one = memo()
    put(one)
    one.findings.note_unchecked("n", FORM, KEYS[:2])
    one.findings.note_unchecked("n", OTHER, KEYS[2:3])
    one.block(FORM, "random")
    assert stored(one) == KEYS[2:]
    one.let_pass("n", OTHER, ((),))
    one.block(OTHER, "random")
    assert stored(one) == KEYS[2:]


def test_rows_since_a_look_can_be_dropped():
    """Rows that rely on a look at the weights, or a later one, are dropped when it turns out to have been wrong."""
    one = memo()
    put(one)
    for turn, key in enumerate(KEYS):
        one.note_put(turn, "n", [key])
    assert one.drop_since(2) == 2
    assert stored(one) == KEYS[:2]
    assert one.drop_since(0) == 0


def test_weights_that_move():
    """The third move in a row is one too many; a forward that leaves them alone starts anew."""
    one = memo()
    assert [one.note_moved() for _ in range(2)] == [False, False]
    one.note_still()
    assert [one.note_moved() for _ in range(3)] == [False, False, True]


def test_verdicts_are_shared_with_copies_through_the_store():
    """A copy of a module shares its store, and what passed there."""
    store = MemoryStore()
    memo(store).let_pass("n", FORM, ((),))
    assert memo(store).findings.passed("n", FORM) == ((),)
    assert memo().findings.passed("n", FORM) is None


class Exploding(MemoryStore):
    """A store whose methods raise once they are told to."""

    broken = frozenset()

    def get(self, *args):
        return self._do("get", *args)

    def put(self, *args):
        return self._do("put", *args)

    def delete(self, *args):
        return self._do("delete", *args)

    def _do(self, name, *args):
        if name in self.broken:
            raise OSError("the disk is gone")
        return getattr(MemoryStore, name)(self, *args)


class Unhashable:
    """A store of the user's own that cannot be a key."""

    __hash__ = None

    def __init__(self):
        inner = MemoryStore()
        for name in ("get", "put", "delete", "row_keys", "namespaces", "stats", "flush", "close"):
            setattr(self, name, getattr(inner, name))


@pytest.mark.parametrize(("method", "doing"), [("get", "reading"), ("put", "writing")])
def test_a_failing_store_does_not_break_the_loop(method, doing):
    """Rows are computed, right, and one warning says what happened."""
    store = Exploding()
    module = cached_module(encoder(), freeze=True, store=store)
    module(X[:2])
    store.broken = {method}
    with pytest.warns(CacheWarning, match=f"its store raised OSError while {doing} rows .the disk is gone."):
        found = module(X)
    torch.testing.assert_close(found, encoder()(X))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(module(X + 1), encoder()(X + 1))


def test_a_store_that_fails_deleting():
    """Dropping rows is not worth an error either."""
    store = Exploding()
    one = memo(store)
    store.broken = {"delete"}
    with pytest.warns(CacheWarning, match="while deleting rows"):
        one.delete("n", KEYS)


def test_a_store_without_a_hash():
    """A user's store need not be hashable."""
    module = cached_module(encoder(), freeze=True, store=Unhashable())
    for _ in range(2):
        assert torch.equal(module(X), encoder()(X))
    assert cache_of(module).stats.hits == 4


def test_things_are_said_once():
    """One warning per reason and module."""
    one = memo()
    with pytest.warns(CacheWarning, match="modcache, Encoder: this and that"):
        one.say("reason", "this and that")
    one.say("reason", "this and that")
    with pytest.warns(CacheWarning, match="something else"):
        one.say("another", "something else")
    with pytest.warns(CacheWarning, match="this and that"):
        memo().say("reason", "this and that")


def test_said_once_from_many_threads():
    """Threads that find out the same thing at the same time say it once."""
    one = memo()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        workers = [threading.Thread(target=one.say, args=("reason", "advice")) for _ in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert len(caught) == 1


def test_a_bypass_may_have_an_output():
    """Whether the module ran already is told apart from what it returned, which may be None."""
    assert not Bypass("reason").ran
    assert Bypass("reason", None, None).ran
    assert Bypass("reason", "advice").advice == "advice"
    assert str(Bypass("reason")) == "reason"


class Silent(MemoryStore):
    """Its numbers and its lists cannot be had."""

    def stats(self):
        raise OSError("no numbers")

    def contains(self, namespace, row_keys):
        raise OSError("no list")


def test_a_store_without_numbers_still_has_statistics():
    """`stats`, `contains` and `explain` answer although the store fails, and say so once."""
    cached = cached_module(encoder(), freeze=True, store=Silent())
    cached(X)
    with pytest.warns(CacheWarning, match="raised OSError while listing rows") as told:
        assert cache_of(cached).stats.computed == 4
        assert cache_of(cached).contains(X) == [True] * 4
        assert all(answer.hit for answer in cache_of(cached).explain(X))
    assert len(told) == 1


def test_single_rows_are_not_remembered_for_ever(monkeypatch):
    """Beyond a number of rows that were stored unchecked, a failing check drops the namespace as a whole."""
    monkeypatch.setattr("modcache.findings._MOST_UNCHECKED", 2)
    one = memo()
    put(one)
    for number, key in enumerate(KEYS):
        one.findings.note_unchecked("n", FORM, [key])
        assert len(one.findings._unchecked["n", FORM] or ()) == (number + 1 if number < 2 else 0)
    put(one, namespace="m")
    one.findings.note_unchecked("m", OTHER, KEYS[:1])
    one.block(FORM, "random")
    assert stored(one) == []
    assert stored(one, "m") == KEYS


@pytest.mark.parametrize("own_bound", [False, True])
def test_a_full_store_is_told_once(own_bound, monkeypatch):
    """Rows that found no room are counted; what to do is said once, unless the user chose the bound."""
    cached = cached_module(encoder(), freeze=True, store=MemoryStore(300))
    monkeypatch.setattr(cache_of(cached).store, "_max_bytes", 300 if own_bound else None)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for number in range(20):
            cached(X + number)
    assert [" share 300 bytes" in str(warning.message) for warning in told] == [True] * (not own_bound)
    stats = cache_of(cached).stats
    assert 0 < stats.refused == stats.computed - cache_of(cached).store.stats().rows
    assert f"{stats.refused} not stored" in str(stats)
