"""Calls of one outline share a recipe, and no more than that."""

import pytest
import torch
from torch import nn

from modcache import CacheWarning, cache_of, cached_module, hit, keys_for
from modcache.outputs import UnknownClassError
from modcache.recipe import outline_of


class Weighted(nn.Module):
    """Rows times the sum of something that all rows share."""

    def forward(self, x, shared):
        return x * (len(shared[0]) if isinstance(shared, list) else shared.sum())


X = torch.arange(8.0).reshape(4, 2)


@pytest.mark.parametrize("given", [{}, {"cache_keys": [1, 2, 3, 4]}], ids=["digests", "cache_keys"])
@pytest.mark.parametrize(
    "make",
    [lambda n: torch.full((3,), float(n)), lambda n: torch.tensor(float(n)), lambda n: ["a" * n]],
    ids=["vector", "0-d", "texts"],
)
def test_a_shared_argument_is_part_of_the_key_on_every_call(make, given):
    """Calls that differ in the content of a shared tensor or list alone never serve each other's rows."""
    plain, cached = Weighted(), cached_module(Weighted(), freeze=True)
    for number in (1, 2, 3, 2):
        for _ in range(2):
            assert torch.equal(plain(X, make(number)), cached(X, make(number), **given))
    assert cache_of(cached).stats.computed == 3 * len(X)


class Scaled(nn.Module):
    """Rows times a plain number."""

    def forward(self, x, scale=1):
        return x * (2 if scale is True else 3 if scale is None else scale)


@pytest.mark.parametrize("values", [(1, True, None, 2, 0.0, -0.0, False, 0)], ids=str)
def test_flags_of_different_type_have_recipes_of_their_own(values):
    """1, True, 1.0 and None as a shared argument are different calls, however often each was made."""
    plain, cached = Scaled(), cached_module(Scaled(), freeze=True)
    for value in values * 2:
        assert torch.equal(plain(X, value).view(torch.int32), cached(X, value).view(torch.int32))


def test_positional_and_keyword_calls_share_rows():
    """`m(x, 2)` and `m(x=x, scale=2)` have two outlines and one key."""
    cached = cached_module(Scaled(), freeze=True)
    cached(X, 2)
    cached(x=X, scale=2)
    cached(scale=2, x=X)
    assert cache_of(cached).stats.computed == len(X)


class Sum(nn.Module):
    """Adds two tensors after scaling one."""

    def forward(self, a, b):
        return a + 10 * b


def test_one_tensor_given_twice():
    """A call with one tensor for two arguments says nothing about calls with two tensors."""
    plain, cached = Sum(), cached_module(Sum(), freeze=True)
    other = X + 1
    for a, b in ((X, X), (X, other), (other, X), (other, other), (X, X)):
        for _ in range(2):
            assert torch.equal(plain(a, b), cached(a, b))


def test_calls_with_given_keys_know_their_number():
    """The second call inside one `keys_for` is not the first, on every round."""
    cached = cached_module(Scaled(), freeze=True)
    for _ in range(3):
        with keys_for([1, 2, 3, 4]):
            assert torch.equal(X, cached(X))
            assert torch.equal(X + 1, cached(X + 1))
    assert cache_of(cached).stats.computed == 2 * len(X)


def test_outlines():
    """Types, dtypes, shapes, lengths and flags tell outlines apart; anything else has none."""
    same = [outline_of((X,), {"t": ["a"]}, False), outline_of((X + 1,), {"t": ["b"]}, False)]
    assert same[0] == same[1]
    others = [
        outline_of(args, kwargs, False)
        for args, kwargs in [
            ((X,), {}),
            ((), {"x": X}),
            ((X.double(),), {}),
            ((X[:2],), {}),
            ((X, 1), {}),
            ((X, True), {}),
            ((X, "1"), {}),
            ((X, None), {}),
            ((["a", "b"],), {}),
            ((["a"],), {}),
        ]
    ]
    assert len(set(others)) == len(others)
    assert outline_of((X, 1.0), {}, False) is None
    assert outline_of(([],), {}, False) is None
    assert outline_of(({"x": X},), {}, False) is None
    assert outline_of((["a", b"b"],), {}, False) is None
    wanting = X.clone().requires_grad_()
    assert outline_of((wanting,), {}, True) is None
    assert outline_of((wanting,), {}, False) == outline_of((X,), {}, True)


def strided(x):
    return torch.stack([x, x], 2)[..., 0]


OTHERWISE = {
    "strided": strided,
    "transposed": lambda x: x.t().contiguous().t(),
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "expanded": lambda x: x[:1].expand(4, 2),
    "negated": lambda x: torch.complex(x, x).conj().imag,
    "inference": lambda x: inferred(x),  # noqa: PLW0108 - defined below
    "parameter": lambda x: nn.Parameter(x, requires_grad=False),
}


@torch.inference_mode()
def inferred(x):
    return x.clone()


@pytest.mark.parametrize("kind", OTHERWISE)
@pytest.mark.parametrize("first", ["plain", "other"])
def test_tensors_of_one_outline_may_lie_otherwise_in_memory(kind, first):
    """Strides, offsets and lazy negation are no part of an outline, so a recipe does not rely on them."""
    plain, cached = Scaled(), cached_module(Scaled(), freeze=True)
    calls = [X, OTHERWISE[kind](X), X + 1, OTHERWISE[kind](X + 1)]
    calls = calls if first == "plain" else calls[::-1]
    for x in calls * 2:
        assert torch.equal(plain(x), cached(x))


def test_a_bare_text_is_never_its_characters():
    """A text and a list of its characters have recipes of their own, in any order, however often."""
    plain, cached = Lengths(), cached_module(Lengths(), freeze=True)
    for texts in ("ab", ["a", "b"], "cd", ["ab"], "ab", ["cd"], ["a", "b"]):
        assert torch.equal(plain(texts), cached(texts))
    assert cache_of(cached).stats.bypassed == 0


class Lengths(nn.Module):
    """The length of each text; a bare text is one."""

    def forward(self, texts):
        return torch.tensor([[len(text)] for text in ([texts] if isinstance(texts, str) else texts)])


class Joined(nn.Module):
    """Texts beside numbers."""

    def forward(self, texts, x):
        return torch.stack([row + len(text) for text, row in zip(texts, x, strict=True)])


def test_texts_beside_tensors():
    """A call of texts and tensors has a recipe, and its rows are told apart by both."""
    plain, cached = Joined(), cached_module(Joined(), freeze=True)
    for texts in (["a", "bb", "c", "d"], ["a", "bb", "ccc", "d"], ["a", "b", "ccc", "d"]):
        for x in (X, X + 1, X):
            assert torch.equal(plain(texts, x), cached(texts, x))


def test_a_stored_output_that_cannot_be_read_is_computed(monkeypatch):
    """When a hit cannot be put together, the row counts as missing and the output is right."""
    plain, cached = Scaled(), cached_module(Scaled(), freeze=True)
    cached(X)

    def unreadable(*_, **__):
        raise UnknownClassError("not here")

    monkeypatch.setattr(hit, "tree_of", unreadable)
    assert torch.equal(plain(X), cached(X))


def test_a_tensor_that_can_no_longer_be_read_is_bypassed():
    """A tensor of a known outline whose values are gone is not looked at."""
    cached = cached_module(Shapes(), freeze=True)
    cached(X)
    freed = X.clone()
    freed.untyped_storage().resize_(0)
    with pytest.warns(CacheWarning, match="no readable values"):
        assert cached(freed).shape == (4, 1)
    assert dict(cache_of(cached).stats.reasons) == {"no key": 4}


class Shapes(nn.Module):
    """Reads no values."""

    def forward(self, x):
        return torch.zeros(len(x), 1)
