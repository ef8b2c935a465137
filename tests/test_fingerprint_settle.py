"""What a forward leaves behind."""

import copy

import pytest
import torch
from torch import nn

from modcache import cache_of, cached_module

from .hazards import agree, frozen, pair

X = torch.arange(8.0).reshape(2, 4)


class WritesWhatIsThere(nn.Module):
    """Masks its weight at each call, which is masked already."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))
        self.register_buffer("mask", torch.eye(4))

    def forward(self, x):
        self.weight.data = self.weight.data * self.mask
        return x @ self.weight


def test_a_forward_that_puts_equal_weights_in_the_place_of_its_own_gives_rows():
    """What such a forward computed is stored: its weights are the same afterwards."""
    cached, plain = pair(frozen(WritesWhatIsThere()))
    agree(cached, plain, X)
    assert cache_of(cached).stats.bypassed == 0


class Toggles(nn.Module):
    """Writes one element of a large buffer, by which its next call will go."""

    def __init__(self):
        super().__init__()
        self.register_buffer("state", torch.ones(300, 304))

    def forward(self, x):
        self.state[155, 77] = 1 - self.state[155, 77]
        return x * self.state[155, 77]


@pytest.mark.filterwarnings("ignore::modcache.CacheWarning")
def test_a_forward_that_writes_a_little_into_a_large_buffer_is_seen():
    """A write that goes past every probe is told by its counter, so nothing is stored and the module not run again."""
    plain = frozen(Toggles())
    cached = cached_module(copy.deepcopy(plain))
    for _ in range(3):
        assert torch.equal(cached(X), plain(X))
    assert cache_of(cached).stats.bypassed == 3 * len(X)


GATHERED = []


class Recording:
    """An object of the user's, that nothing names which a forward reads."""

    def __init__(self, value):
        self.value = value


class Gathers(nn.Module):
    """Keeps what it was called with."""

    def forward(self, rows):
        GATHERED.append(rows)
        return torch.tensor([[float(row.value)] for row in rows])


def test_a_forward_that_gathers_objects_of_a_new_class_is_cached():
    """What it gathers brings a class along that was not met before; that is bookkeeping, and no reason to bypass."""
    GATHERED.clear()
    cached = cached_module(Gathers(), freeze=True)
    rows = [Recording(1), Recording(2), Recording(3)]
    for _ in range(3):
        assert cached(rows, cache_keys=[1, 2, 3]).flatten().tolist() == [1.0, 2.0, 3.0]
    assert (cache_of(cached).stats.computed, cache_of(cached).stats.hits) == (3, 6)
