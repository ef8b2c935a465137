"""What somebody else's store gives is checked before it is served; stores of this package are asked directly."""

import numpy as np
import pytest
import torch

from modcache import CacheWarning, MemoryStore, TieredStore, cache_of, cached_module
from modcache.looking import look_up_in
from modcache.rows import Layout, Rows
from modcache.stores import Found

from .models import encoder

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


class Theirs(MemoryStore):
    """A store that changes what it finds before it gives it."""

    change = staticmethod(lambda found: found)

    def get(self, namespace, row_keys):
        return self.change(super().get(namespace, row_keys))

    def lend(self, *args):
        return None


def changed(**to):
    def change(found):
        return tuple(Found(**{"positions": part.positions, "rows": part.rows, **to}) for part in found)

    return change


def each(function):
    return lambda found: tuple(function(part) for part in found)


def halves(part):
    return Rows(part.rows.layout, tuple(tensor[:2] for tensor in part.rows.tensors))


WRONG = {
    "nothing": lambda found: None,
    "a list": list,
    "a pair": each(lambda part: (part.positions, part.rows)),
    "a text": lambda found: "rows",
    "places in a list": changed(positions=[0, 1, 2, 3]),
    "places that are too short": each(lambda part: Found(part.positions.astype(np.int32), part.rows)),
    "no places": each(lambda part: Found(part.positions[:0], part.rows.take([]))),
    "places that are too many": each(lambda part: Found(part.positions + 2, part.rows)),
    "places below zero": each(lambda part: Found(part.positions - 1, part.rows)),
    "places in another order": each(lambda part: Found(part.positions[::-1], part.rows)),
    "places twice": each(lambda part: Found(part.positions * 0, part.rows)),
    "answers twice": lambda found: found * 2,
    "too few rows": each(lambda part: Found(part.positions, halves(part))),
    "rows of another dtype": each(
        lambda part: Found(part.positions, Rows(part.rows.layout, tuple(row.double() for row in part.rows.tensors)))
    ),
    "rows without tensors": each(lambda part: Found(part.positions, Rows(part.rows.layout, ()))),
    "rows of arrays": each(
        lambda part: Found(part.positions, Rows(part.rows.layout, tuple(row.numpy() for row in part.rows.tensors)))
    ),
    "no rows": changed(rows=None),
}


@pytest.mark.parametrize("grown", [False, True], ids=["all stored", "one missing"])
@pytest.mark.parametrize("kind", WRONG)
def test_a_store_that_gives_something_else_counts_as_failing(kind, grown):
    """Whatever a store gives, the outputs are the module's own; what is wrong is told once."""
    store = Theirs()
    cached, plain = cached_module(encoder(), freeze=True, store=store), encoder()
    cached(X)
    store.change = WRONG[kind]
    x = torch.cat([X, -X[:1]]) if grown else X
    with pytest.warns(CacheWarning, match=r"its store raised (Type|Value)Error while reading rows") as told:
        for _ in range(3):
            torch.testing.assert_close(cached(x), plain(x))
    assert len(told) == 1
    del store.change
    torch.testing.assert_close(cached(x), plain(x))
    assert cache_of(cached).stats.hits >= 4


def test_a_store_that_keeps_to_the_protocol_is_served_from():
    """What was checked and found right is given on as it is."""
    store = Theirs()
    cached = cached_module(encoder(), freeze=True, store=store)
    assert torch.equal(cached(X), cached(X))
    assert cache_of(cached).stats.hits == 4


def test_stores_of_this_package_are_asked_directly():
    """Nothing is checked of our own stores, alone or in tiers; anything in a tier that is not ours is."""
    own, tiers, mixed = MemoryStore(), TieredStore(MemoryStore(), MemoryStore()), TieredStore(MemoryStore(), Theirs())
    assert look_up_in(own) == own.get
    assert look_up_in(tiers) == tiers.get
    assert look_up_in(mixed) != mixed.get
    assert look_up_in(Theirs()).__name__ == "look_up"


def test_an_empty_answer_and_one_of_two_layouts_are_right():
    """A store may find nothing, and rows of several layouts."""
    layouts = [Layout("{}", ((torch.float32, (width,)),)) for width in (1, 2)]
    answer = tuple(
        Found(np.array(places), Rows(layout, (torch.zeros(len(places), *layout.leaves[0][1]),)))
        for places, layout in zip(([0, 2], [1]), layouts, strict=True)
    )
    store = Theirs()
    store.change = lambda found: answer
    assert look_up_in(store)("n", [b"a" * 16, b"b" * 16, b"c" * 16]) is answer
    store.change = lambda found: ()
    assert look_up_in(store)("n", [b"a" * 16]) == ()


def told_otherwise(tree):
    return each(lambda part: Found(part.positions, Rows(Layout(tree, part.rows.layout.leaves), part.rows.tensors)))


@pytest.mark.parametrize("tree", ["nonsense", '["named", "nowhere", "Output", [["a", ["leaf"]]]]'])
@pytest.mark.parametrize("stored", [4, 2], ids=["all rows", "some rows"])
def test_rows_that_cannot_be_put_together_are_computed(tree, stored):
    """An output of a class that is not loaded, say: the whole batch is computed, and the rows are stored anew."""
    store = Theirs()
    module = cached_module(encoder(), store=store, freeze=True)
    expected = module(X).clone()
    if stored < len(X):
        cache_of(module).forget(X[stored:])
    before = cache_of(module).stats.computed
    store.change = told_otherwise(tree)
    for _ in range(2):
        assert torch.allclose(module(X), expected)
        before += len(X)
        assert cache_of(module).stats.computed == before
        if stored < len(X):
            cache_of(module).forget(X[stored:])
    store.change = lambda found: found
    assert torch.allclose(module(X), expected)
