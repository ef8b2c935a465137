"""Computing the missing rows, and what the self-check does where it cannot be done."""

import pytest
import torch
from torch import nn

from modcache import CacheWarning, cache_of, cached_module

X = torch.arange(32.0).reshape(8, 4)


class Of(nn.Module):
    """A function as a module, beside something that it holds."""

    def __init__(self, function, held=None):
        super().__init__()
        self.function = function
        self.held = held

    def forward(self, x):
        return self.function(x)


class Logger:
    """Objects of classes of this name count by their class: they are not looked into."""


def test_something_trainable_that_cannot_be_seen_is_not_cut_off():
    """A gradient flows to what feeds the output, wherever the module has hidden it, and the user is told."""
    hidden = Logger()
    hidden.scale = torch.ones(4, requires_grad=True)
    module = Of(None, hidden).eval()
    module.function = lambda x: x * module.held.scale
    cached = cached_module(module)
    with pytest.warns(CacheWarning, match=r"its output needs grad.*requires_grad_\(False\)"):
        cached(X).sum().backward()
    assert torch.equal(hidden.scale.grad, X.sum(0))
    cached(X).sum().backward()
    assert torch.equal(hidden.scale.grad, 2 * X.sum(0))


def test_prepare_that_fails_on_fewer_rows():
    """A check that cannot have its rows prepared is left to another batch; the user's call goes on."""
    fails = [False]

    def prepare(x):
        if fails[0]:
            raise OSError("gone")
        fails[0] = True
        return x * 2

    module = cached_module(nn.Identity(), prepare=prepare, freeze=True)
    assert torch.equal(module(X), X * 2)
    fails[0] = False
    assert torch.equal(module(X), X * 2)
    assert cache_of(module).stats.bypassed == 0


@pytest.mark.parametrize("count", [1, 8])
def test_a_module_that_draws_and_has_no_room_to_show_that_it_makes_no_use_of_it(count):
    """Its rows are given as they are, and the module is not taken for checked: it is run again with later ones, too."""
    runs = []

    def crowded(x):
        runs.append(len(x))
        if len(runs) > 1 and len(x) == count:
            raise torch.OutOfMemoryError("out of memory")
        return x + 0 * torch.rand(len(x), 1)

    module = cached_module(Of(crowded).eval())
    assert torch.equal(module(X[:count]), X[:count])
    assert cache_of(module).stats.bypassed == 0
    runs.clear()
    assert torch.equal(module(X[-count:]), X[-count:])
    assert len(runs) > 1
