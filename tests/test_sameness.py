"""What a self-check could not see, because its rows did not differ in it, is checked when rows differ in it."""

import itertools
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modcache import CacheWarning, MemoryStore, cached_module, mode
from modcache.batch import split
from modcache.keys.registry import is_row
from modcache.sameness import differences, sameness, telling_rows

from .hazards import Quiet, agree, bypassed, computed, hits, pair
from .models import CountingEncoder
from .test_manifests import Keeping, anew

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


def rows_of(**arguments):
    return split(list(arguments.items()), frozenset(), is_row)


ROWS = {
    "tensor": (torch.arange(4.0), True),
    "one of many": (torch.tensor([1.0, 2.0, 1.0, 1.0]), True),
    "odd width": (torch.tensor([[1, 2, 3]] * 3 + [[1, 2, 4]], dtype=torch.uint8), True),
    "even width": (torch.ones(4, 6, dtype=torch.uint8), False),
    "bits": (torch.tensor([0.0, -0.0, 0.0, 0.0]), True),
    "nan": (torch.full((4,), torch.nan), False),
    "float8": (torch.ones(4, 2).to(torch.float8_e4m3fn), False),
    "complex": (torch.ones(4, 2, dtype=torch.complex64), False),
    "strided": (torch.arange(4.0).repeat(4, 1).T, True),
    "expanded": (torch.ones(1, 3).expand(4, 3), False),
    "no width": (torch.ones(4, 0), False),
    "array": (np.ones((4, 3))[:, ::2], False),
    "other array": (np.arange(4), True),
    "objects": (np.array(["a", None, "a", "a"], dtype=object), True),
    "texts": (["a", "b", "a", "a"], True),
    "same texts": (("a", "a", "a", "a"), False),
    "numbers": ([1, 1.0, 1, 1], True),
    "same numbers": ([1.5] * 4, False),
    "tensors": ([torch.ones(2) for _ in range(4)], False),
    "structures": ([{"a": [1, torch.ones(2)]} for _ in range(4)], False),
    "other structures": ([{"a": [number]} for number in range(4)], True),
    "without content": ([object() for _ in range(4)], True),
}


@pytest.mark.parametrize("kind", ROWS)
def test_rows_that_are_all_the_same(kind):
    """Rows are the same if their bits and types are, whatever holds them; what cannot be read is taken to differ."""
    value, expected = ROWS[kind]
    batch = rows_of(x=value)
    found = sameness(batch, range(4))
    assert ("x" not in found) == expected
    assert differences(batch, {"x"}) == (("x",) if expected else ())


@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.data())
def test_some_rows(values, data):
    """Only the rows that are asked about count, in tensors as in lists."""
    places = sorted(data.draw(st.sets(st.sampled_from(range(len(values))), min_size=1)))
    batch = rows_of(x=torch.tensor(values), y=list(values), z=np.array(values))
    same = len({values[place] for place in places}) == 1
    assert sameness(batch, places) == ({"x", "y", "z", "len(y)"} if same else {"len(y)"})


def test_lengths():
    """Lists are asked for the lengths of their rows; arguments known to be per row are not asked about."""
    batch = rows_of(x=["a", "bb", "c"], y=["a", "b", "c"])
    assert sameness(batch, range(3)) == {"len(y)"}
    assert sameness(batch, [0, 2], but={"y"}) == {"len(x)"}
    assert differences(batch, {"len(x)", "len(y)", "y", "x.y", "z"}) == ("len(x)", "y")


def test_telling_rows():
    """For each name one row is told that differs in it, and no row twice."""
    batch = rows_of(x=["a", "b", "cc", "a"], y=torch.tensor([1, 1, 1, 2]), z=[0, 1, 0, 0])
    assert telling_rows(batch, {"x", "len(x)", "y"}, 0) == [1, 2, 3]
    assert telling_rows(batch, {"x", "z"}, 0) == [1]
    assert telling_rows(batch, {"x", "y"}, 3) == [1, 0]
    assert telling_rows(batch, (), 0) == []


class Apply(nn.Module):
    """Applies a function to what it is given."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


SHARED = {
    "sum of zeros": (lambda x, w: x * w.sum(), torch.zeros, lambda size: torch.arange(float(size))),
    "mean of ones": (lambda x, w: x * w.mean(), torch.ones, lambda size: torch.arange(float(size))),
    "largest": (lambda x, w: x + w.max(), torch.zeros, lambda size: torch.arange(float(size))),
    "first": (lambda x, w: x * w[0], torch.ones, lambda size: torch.arange(float(size)) + 2),
    "any": (
        lambda x, w: x.masked_fill(w.any(), 0.0),
        lambda size: torch.zeros(size, dtype=torch.bool),
        lambda size: torch.arange(size) == 1,
    ),
    "list": (lambda x, w: x * sum(w) / len(w), lambda size: [1.0] * size, lambda size: [1.0] + [2.0] * (size - 1)),
    "texts": (lambda x, w: x * len(set(w)), lambda size: ["a"] * size, lambda size: ["a", "b"] * (size // 2)),
    "memory": (
        lambda x, w: nn.functional.scaled_dot_product_attention(x, w, w),
        lambda size: torch.zeros(size, 3),
        lambda size: torch.arange(3.0 * size).reshape(size, 3),
    ),
}


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("kind", SHARED)
def test_a_shared_argument_that_is_all_the_same_at_first(kind, size):
    """An argument that all rows share and that was taken for rows is found out when its items differ at last."""
    function, first, later = SHARED[kind]
    cached, plain = pair(Apply(function))
    with Quiet():
        agree(cached, plain, X[:size], first(size))
        agree(cached, plain, X[:size], later(size))
        agree(cached, plain, X[:size].flip(0), later(size))
        agree(cached, plain, X[:size], first(size))


def test_rows_that_were_stored_one_by_one_or_with_equal_values():
    """Stored rows from calls in which an argument was all the same are not served to a call in which it is not."""
    cached, plain = pair(Apply(lambda x, w: x + w.mean()))
    agree(cached, plain, X, torch.zeros(8))
    agree(cached, plain, X, torch.ones(8))
    assert computed(cached) == 16
    assert hits(cached) == 16
    with pytest.warns(CacheWarning, match="came out otherwise among rows of another kind"):
        agree(cached, plain, X, torch.tensor([0.0, 1.0] * 4))
    agree(cached, plain, X, torch.zeros(8))
    assert bypassed(cached) == 32


class Masked(nn.Module):
    """Three arguments per row, as a text model has them; counts its calls."""

    def __init__(self):
        super().__init__()
        self.encoder = CountingEncoder()

    def forward(self, x, mask, kind):
        return self.encoder(x * mask) + kind[:, None]


def runs(module):
    """The sizes of the batches that were computed; 0 for the few rows of a check."""
    return [size if size >= 4 else 0 for size in module.encoder.seen.sizes]


ONES, ZEROS = torch.ones(8, 3), torch.zeros(8)
MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]] * 4)


def test_arguments_that_seldom_differ_cost_no_hits():
    """An argument that is always the same is no reason to compute again; one that starts to differ is checked once."""
    cached, plain = pair(Masked())
    agree(cached, plain, X, ONES, ZEROS)
    agree(cached, plain, -X, ONES, ZEROS)
    assert runs(cached) == [8, 0, 8]
    agree(cached, plain, X, MASK, ZEROS)
    assert runs(cached) == [8, 0, 8, 4, 0]  # every second row is stored
    agree(cached, plain, -X, MASK, ZEROS)
    agree(cached, plain, X * 2, MASK, ZEROS)
    agree(cached, plain, X, ONES, ZEROS)
    assert runs(cached) == [8, 0, 8, 4, 0, 4, 8]
    assert bypassed(cached) == 0


def test_rows_that_are_all_stored_are_served_once_they_are_confirmed():
    """Nothing is computed again but the few rows of a check, where all rows are stored, and only once."""
    cached, plain = pair(Masked())
    for number in range(2):
        agree(cached, plain, X, ONES, ZEROS + number)
    assert runs(cached) == [8, 0, 8]
    agree(cached, plain, X, ONES, torch.tensor([0.0, 1.0] * 4))
    assert runs(cached) == [8, 0, 8, 0]
    agree(cached, plain, X, ONES, torch.tensor([1.0, 0.0] * 4))
    assert runs(cached) == [8, 0, 8, 0]
    assert hits(cached) == 48
    assert computed(cached) == 16


def test_a_batch_of_which_nothing_is_stored_is_checked_as_any():
    """Where rows differ for the first time and none is stored, the batch is checked as the first one was."""
    cached, plain = pair(Apply(lambda x, w: x + w.mean()))
    agree(cached, plain, X, ZEROS)
    with pytest.warns(CacheWarning, match="did not give the same rows"):
        agree(cached, plain, -X, torch.arange(8.0))


class Full(Masked):
    """Has no room for a few rows, while the environment says so."""

    def forward(self, x, mask, kind):
        if len(x) < 4 and os.environ.get("FULL"):
            raise MemoryError
        return super().forward(x, mask, kind)


def test_what_cannot_be_confirmed_now_is_tried_again(monkeypatch):
    """Where the few rows have no room in memory, rows are served, and the next call tries again."""
    cached, plain = pair(Full())
    kinds = torch.tensor([0.0, 1.0] * 4)
    for number in range(2):
        agree(cached, plain, X, ONES, ZEROS + number)
    with monkeypatch.context() as around:
        around.setenv("FULL", "1")
        agree(cached, plain, X, ONES, kinds)
    assert runs(cached) == [8, 0, 8]
    agree(cached, plain, X, ONES, kinds)
    assert runs(cached) == [8, 0, 8, 0]


def test_stored_rows_alone_are_served_unchecked():
    """Mode "require-hit" asks for stored rows and computes nothing, so nothing is checked either."""
    cached = cached_module(Masked(), freeze=True)
    rows = [cached(X, ONES, ZEROS + number) for number in range(2)]
    with mode("require-hit"):
        found = cached(X, ONES, torch.tensor([0.0, 1.0] * 4))
    assert torch.equal(found[::2], rows[0][::2])
    assert torch.equal(found[1::2], rows[1][1::2])
    assert runs(cached) == [8, 0, 8]


def test_keys_that_are_given_are_taken_at_their_word():
    """Rows of which the caller gave the keys are served by these, whatever the arguments are."""
    cached = cached_module(Masked(), freeze=True)
    rows = cached(X, ONES, ZEROS, cache_keys=range(8))
    assert torch.equal(cached(X, MASK, ZEROS, cache_keys=range(8)), rows)
    assert runs(cached) == [8, 0]


def twins(count, stores):
    """Modules of the same content."""
    found = []
    for _, store in zip(range(count), stores, strict=False):
        torch.manual_seed(0)
        found.append(cached_module(Masked(), freeze=True, store=store))
    return found


def test_what_is_known_is_shared_with_copies_through_the_store():
    """Two modules of the same content check an argument that starts to differ once."""
    one, other = twins(2, itertools.repeat(MemoryStore()))
    one(X, ONES, ZEROS)
    other(X, ONES, torch.arange(8.0))
    assert runs(other) == [7, 0]
    one(-X, ONES, torch.arange(8.0))
    assert runs(one) == [8, 0, 8]


def test_the_next_process_knows_what_was_not_tested():
    """Word is left of what a check could not see: what it saw is believed, and what it did not is checked."""
    store = Keeping()
    first, second, third = twins(3, [store, anew(store), anew(store)])
    first(X, ONES, ZEROS)
    second(X, ONES, ZEROS)
    assert runs(second) == []
    second(X, MASK, ZEROS)
    assert runs(second) == [4, 0]
    third(X, MASK, ZEROS)
    third(-X, MASK, ZEROS)
    assert runs(third) == [8]
    third(X, ONES, torch.arange(8.0))
    assert runs(third) == [8, 7, 0]


@pytest.mark.parametrize("same", [None, 3, [3], {"mask": 1}])
def test_nonsense_for_what_was_not_tested(same):
    """A mark that somebody made up is not believed: the batch is checked again."""
    store = Keeping()
    one, other = twins(2, [store, anew(store)])
    one(X, ONES, ZEROS)
    (facts,) = store.told.values()
    ((mark, value),) = facts["checked"].items()
    assert value == {"dims": ((),), "same": ["kind", "mask"]}
    facts["checked"] = {mark: {**value, "same": same}}
    other(X, ONES, ZEROS)
    assert runs(other) == [8, 0]


class Padded(nn.Module):
    """Pads its texts to the longest and takes the mean: a row has its neighbours' length in it."""

    def forward(self, texts):
        longest = max(map(len, texts))
        return torch.tensor([[*map(float, map(ord, text.ljust(longest)))] for text in texts]).mean(1, keepdim=True)


def test_texts_of_one_length_at_first():
    """A module that pads is found out when texts of different lengths come, though the first all had one."""
    cached, plain = pair(Padded(), key="text")
    agree(cached, plain, ["aa", "bb", "cc", "dd"])
    agree(cached, plain, ["aa", "cc"])
    agree(cached, plain, ["eee"])
    assert bypassed(cached) == 0
    with pytest.warns(CacheWarning, match="came out otherwise among rows of another kind"):
        agree(cached, plain, ["aa", "eee"])
    agree(cached, plain, ["aa", "ffffff"])
    assert bypassed(cached) == 8


class Lengths(nn.Module):
    """A number for each text, whatever the others."""

    def __init__(self):
        super().__init__()
        self.encoder = CountingEncoder(1, 1)

    def forward(self, texts):
        return self.encoder(torch.tensor([[float(len(text))] for text in texts]))


def test_texts_of_one_length_cost_no_hits():
    """Texts of one length are served; those that differ in it for the first time are checked once."""
    cached, plain = pair(Lengths(), key="text")
    agree(cached, plain, ["a", "b", "c", "d"])
    agree(cached, plain, ["d", "a"])
    assert runs(cached) == [4, 0]
    agree(cached, plain, ["ee", "ff", "gg", "hh"])
    assert runs(cached) == [4, 0, 4]
    agree(cached, plain, ["a", "b", "ee", "ff"])
    assert runs(cached) == [4, 0, 4, 0]
    agree(cached, plain, ["c", "d", "gg", "hh"])
    agree(cached, plain, ["ee", "a"])
    assert runs(cached) == [4, 0, 4, 0]
    assert computed(cached) == 8
    assert bypassed(cached) == 0
