"""Two runs of one row agree within their precision, or the row depends on more than itself."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modcache import CacheWarning, cache_of, cached_module
from modcache.batch import split
from modcache.keys.registry import is_row
from modcache.outputs import rows_of
from modcache.selfcheck import difference, lengths_of, preserved_randomness, rows_to_check, sizes_of, tolerance_of

from .models import BatchCoupled, Dropout, Noisy, Normalised

CPU = torch.device("cpu")


def rows(output):
    return rows_of(output, 2, CPU)


def test_tolerances():
    """Each precision has its tolerance; whole numbers have none."""
    found = {
        dtype: tolerance_of(dtype)
        for dtype in (
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.float8_e5m2,
            torch.complex64,
            torch.int64,
            torch.bool,
        )
    }
    assert list(found.values()) == [1e-3, 1e-2, 5e-2, 2.5e-1, 1e-3, 0.0, 0.0]


ONE = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
SAME = {
    "equal": (ONE, ONE),
    "noise": (ONE, ONE * (1 + 5e-4)),
    "half": (ONE.half(), ONE.half() * 1.005),
    "bfloat16": (ONE.bfloat16(), ONE.bfloat16() * 1.03),
    "float8": (ONE.to(torch.float8_e4m3fn), (ONE * 1.1).to(torch.float8_e4m3fn)),
    "complex": (torch.complex(ONE, ONE), torch.complex(ONE, ONE * (1 + 5e-4))),
    "infinite and nan": (
        torch.tensor([[1.0, torch.inf], [torch.nan, 2.0]]),
        torch.tensor([[1.0, torch.inf], [torch.nan, 2.0]]),
    ),
    "scalars": (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])),
    "whole numbers": (torch.tensor([1, 2]), torch.tensor([1, 2])),
    "nothing": (torch.zeros(2, 0), torch.zeros(2, 0)),
    "all nan": (torch.full((2, 2), torch.nan), torch.full((2, 2), torch.nan)),
    "trees": ({"a": ONE, "b": (ONE, 1)}, {"a": ONE, "b": (ONE, 1)}),
}
APART = {
    "too far": (ONE, ONE * 1.01, "values differ by up to 0.0"),
    "zeros": (ONE, ONE + torch.tensor([[0.0], [1e-30]]), "values differ"),
    "one of many": (torch.ones(2, 100), torch.ones(2, 100) + torch.eye(100)[:2], "values differ by up to 1 of"),
    "whole numbers": (torch.tensor([1, 2]), torch.tensor([1, 3]), "whole numbers that should be equal differ"),
    "flags": (torch.tensor([True, True]), torch.tensor([True, False]), "whole numbers"),
    "not finite": (ONE, ONE / 0, "not finite"),
    "other infinity": (torch.full((2, 1), torch.inf), torch.full((2, 1), -torch.inf), "not finite"),
    "shapes": (ONE, ONE[:, :1], r"its output rows have shapes \(\(2,\),\) and \(\(1,\),\)"),
    "structure": ((ONE, 1), (ONE, 2), "the structure or a constant of its output differs"),
    "second tensor": ((ONE, ONE), (ONE, -ONE), "output tensor 1: values differ"),
}


@pytest.mark.parametrize("kind", SAME)
def test_agreement(kind):
    """Runs that differ by no more than their precision agree, both ways."""
    one, other = map(rows, SAME[kind])
    assert difference(one, other) is None
    assert difference(other, one) is None


@pytest.mark.parametrize("kind", APART)
def test_difference(kind):
    """Anything more is told in words."""
    one, other, message = APART[kind]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(difference(rows(one), rows(other)))


def test_the_floor_is_that_of_the_least_precise_arithmetic():
    """What was computed in bfloat16 and cast up is compared as bfloat16."""
    assert difference(rows(ONE), rows(ONE * 1.03)) is not None
    assert difference(rows(ONE), rows(ONE * 1.03), 5e-2) is None


@given(st.integers(0, 12), st.booleans(), st.randoms(use_true_random=False))
def test_rows_to_check(count, ragged, chance):
    """At most two rows, half of the batch at most, the first of them from another place; the shortest among them."""
    places = chance.sample(range(100), count)
    sizes = [chance.random() for _ in places]
    lengths = [chance.randrange(1, 5) for _ in places] if ragged else None
    chosen = rows_to_check(places, sizes, lengths)
    assert len(chosen) == min(2, count // 2)
    assert set(chosen) <= set(places)
    assert len(set(chosen)) == len(chosen)
    numbers = [places.index(place) for place in chosen]
    if lengths is None:
        assert 0 not in numbers[:1]
    elif chosen:
        assert min(lengths[number] for number in numbers) == min(lengths)
    if len(numbers) == 2:
        assert numbers[0] > numbers[1]
        assert sum(numbers) != count - 1


def test_sizes_and_lengths():
    """The size of a row is its largest value; its length is told where inputs differ in it."""
    assert sizes_of(rows((torch.tensor([1, 9]), torch.tensor([[1.0, -5.0], [torch.nan, 2.0]])))) == [5.0, 0.0]
    assert sizes_of(rows(torch.tensor([3j, 4 + 3j]))) == [3.0, 5.0]
    assert sizes_of(rows(torch.tensor([1, 9]))) == [0.0, 0.0]

    def found(value):
        return lengths_of(split([("x", value)], frozenset(), is_row), [0, 1])

    assert found(["a", "bcd"]) == [1, 3]
    assert found([torch.zeros(2, 2), torch.zeros(3)]) == [4, 3]
    assert found([np.zeros(2), np.zeros(3)]) == [2, 3]
    assert found(["a", 5]) == [1, 0]
    assert found(["a", "b"]) is None
    assert found(torch.zeros(2, 3)) is None


def test_randomness_is_left_as_it_was():
    """torch, numpy and Python draw the same numbers as if nothing had been drawn in between, also after an error."""

    def draw():
        return random.random(), float(np.random.random()), float(torch.rand(()))

    def seed():
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)

    seed()
    expected = draw()
    seed()
    with pytest.raises(ZeroDivisionError), preserved_randomness():
        draw()
        raise ZeroDivisionError
    assert draw() == expected


def test_randomness_of_accelerators(monkeypatch):
    """The generators of accelerators in use are put back, too."""
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: ["state"])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", seen.append)
    with preserved_randomness():
        assert seen == []
    assert seen == [["state"]]


class NoTensors(nn.Module):
    """Returns nothing that has rows."""

    def forward(self, x):
        return {"kind": "constant", "none": None}


def test_an_output_without_tensors():
    """A module that returns constants alone gives them, on every call."""
    cached = cached_module(NoTensors(), freeze=True)
    for count in (1, 2, 5, 5):
        assert cached(torch.randn(count, 2)) == {"kind": "constant", "none": None}


COUPLED = {"noisy": Noisy, "coupled": BatchCoupled}


@pytest.mark.parametrize("kind", COUPLED)
def test_rows_that_depend_on_more_than_themselves(kind):
    """A module that is random, or whose rows interact, is found out and runs uncached; its outputs are its own."""
    cached, x = cached_module(COUPLED[kind](), freeze=True), torch.randn(6, 3)
    state = torch.get_rng_state()
    with pytest.warns(CacheWarning, match="it did not give the same rows"):
        found = cached(x)
    torch.set_rng_state(state)
    assert torch.equal(found, COUPLED[kind]()(x))
    cached(x)
    assert dict(cache_of(cached).stats.reasons) == {"self-check failed": 12}
    assert cache_of(cached).store.stats().rows == 0


@pytest.mark.parametrize("model", [Dropout, Normalised])
def test_eval_makes_rows_of_their_own(model):
    """Dropout and batch norm are cached in eval, and bypassed in training."""
    plain, cached, x = model().eval(), cached_module(model(), freeze=True), torch.randn(6, 3)
    for _ in range(2):
        torch.testing.assert_close(cached(x), plain(x))
    assert cache_of(cached).stats.hits == 6
    trained = model().requires_grad_(False)
    with pytest.warns(CacheWarning, match="training mode"):
        trained = cached_module(trained)
    with pytest.warns(CacheWarning, match="training mode"):
        trained(x)
    assert dict(cache_of(trained).stats.reasons) == {"training mode": 6}
