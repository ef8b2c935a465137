"""What a self-check could not see, because its rows did not differ in it, is checked when rows differ in it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modcache import CacheWarning, MemoryStore, cache_of, cached_module, mode
from modcache.batch import split
from modcache.keys.registry import is_row
from modcache.sameness import differ, sameness

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
    assert differ(batch, frozenset({"x"})) == expected


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
    assert differ(batch, frozenset({"len(x)"}))
    assert not differ(batch, frozenset({"len(y)", "x.y", "z"}))


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
    with pytest.warns(CacheWarning, match="did not give the same rows"):
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


def calls(module):
    """The sizes of the batches that were computed, of eight rows or four, and where a check followed."""
    return [size if size in (4, 8) else "check" for size in module.encoder.seen.sizes]


def test_arguments_that_seldom_differ_cost_no_hits():
    """An argument that is always the same is no reason to compute again; one that starts to differ is checked once."""
    cached, plain = pair(Masked())
    ones, kind = torch.ones(4, 3), torch.zeros(4)
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    agree(cached, plain, X[:4], ones, kind)
    agree(cached, plain, X[4:], ones, kind)
    assert calls(cached) == [4, "check", 4]
    agree(cached, plain, X[:4], mask, kind)
    assert calls(cached) == [4, "check", 4, 4, "check"]  # two of its rows are stored: all are computed, once
    agree(cached, plain, X[4:], mask / 2, kind)
    agree(cached, plain, X[:4], ones, kind)
    assert calls(cached) == [4, "check", 4, 4, "check", 4]
    assert bypassed(cached) == 0


def test_what_a_call_lacks_is_told():
    """`explain` says that a call with rows that differ for the first time is computed as a whole."""
    cached = cached_module(Masked(), freeze=True)
    ones, kind = torch.ones(4, 3), torch.zeros(4)
    cached(X[:4], ones, kind)
    cached(X[:4], ones, kind + 1)
    assert all(answer.hit for answer in cache_of(cached).explain(X[:4], ones, kind))
    found = cache_of(cached).explain(X[:4], ones, torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert not any(answer.hit for answer in found)
    assert "not checked yet" in str(found[0])


def test_stored_rows_alone_are_served_unchecked():
    """Mode "require-hit" asks for stored rows and computes nothing, so nothing is checked either."""
    cached = cached_module(Masked(), freeze=True)
    ones = torch.ones(4, 3)
    rows = [cached(X[:4], ones, torch.full((4,), float(number))) for number in range(2)]
    with mode("require-hit"):
        found = cached(X[:4], ones, torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert torch.equal(found[::2], rows[0][::2])
    assert torch.equal(found[1::2], rows[1][1::2])


def test_what_is_known_is_shared_with_copies_through_the_store():
    """Two modules of the same content check an argument that starts to differ once."""
    store, ones, kind = MemoryStore(), torch.ones(4, 3), torch.arange(4.0)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(cached_module(Masked(), freeze=True, store=store))
    one, other = models
    one(X[:4], ones, kind * 0)
    other(X[:4], ones, kind)
    assert calls(other) == [4, "check"]
    one(X[4:], ones, kind)
    assert calls(one) == [4, "check", 4]


def test_the_next_process_knows_what_was_not_tested():
    """Word is left of what a check could not see: what it saw is believed, and what it did not is checked."""
    store, ones, kind = Keeping(), torch.ones(4, 3), torch.zeros(4)
    models = []
    for _ in range(3):
        torch.manual_seed(0)
        models.append(cached_module(Masked(), freeze=True, store=store))
        store = anew(store)
    first, second, third = models
    first(X[:4], ones, kind)
    second(X[:4], ones, kind)
    assert second.encoder.calls == 0
    second(X[:4], torch.arange(12.0).reshape(4, 3), kind)
    assert calls(second) == [4, "check"]
    third(X[4:], torch.arange(12.0).reshape(4, 3), kind)
    assert calls(third) == [4]
    third(X[:4], ones, kind + torch.arange(4.0))
    assert calls(third) == [4, 4, "check"]


@pytest.mark.parametrize("same", [None, 3, [3], {"mask": 1}])
def test_nonsense_for_what_was_not_tested(same):
    """A mark that somebody made up is not believed: the batch is checked again."""
    store, ones, kind = Keeping(), torch.ones(4, 3), torch.zeros(4)
    torch.manual_seed(0)
    cached_module(Masked(), freeze=True, store=store)(X[:4], ones, kind)
    (facts,) = store.told.values()
    ((mark, value),) = facts["checked"].items()
    assert value == {"dims": ((),), "same": ["kind", "mask"]}
    facts["checked"] = {mark: {**value, "same": same}}
    torch.manual_seed(0)
    later = cached_module(Masked(), freeze=True, store=anew(store))
    later(X[:4], ones, kind)
    assert calls(later) == [4, "check"]


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
    with pytest.warns(CacheWarning, match="did not give the same rows"):
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
    assert calls(cached) == [4, "check"]
    agree(cached, plain, ["ee", "ff", "gg", "hh"])
    assert calls(cached) == [4, "check", 4]
    agree(cached, plain, ["a", "b", "ee", "ff"])
    assert calls(cached) == [4, "check", 4, 4, "check"]
    agree(cached, plain, ["c", "d", "gg", "hh"])
    agree(cached, plain, ["ee", "a"])
    assert calls(cached) == [4, "check", 4, 4, "check"]
    assert bypassed(cached) == 0
