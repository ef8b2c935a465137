"""Decorated classes whose methods say ``super(Name, self)``, as older code does, work like others."""

import pickle

import pytest
import torch
from torch import nn

from modcache import cache_of, cached_module, is_cached, uncached


@cached_module(freeze=True)
class Older(nn.Linear):
    """Says its own name, which once decorated means the cached class, wherever newer code says nothing."""

    def __init__(self, inputs=3):
        super(Older, self).__init__(inputs, 2)  # noqa: UP008
        self.order = ["Older"]

    @torch.no_grad()
    def forward(self, x):
        parts = [super(Older, self).forward(row) for row in x]
        return torch.stack(parts)

    @classmethod
    def of(cls, inputs):
        return cls(inputs)

    @property
    def said(self):
        return super(Older, self).extra_repr()  # noqa: UP008

    def extra_repr(self):
        return "older, " + super(Older, self).extra_repr()  # noqa: UP008

    def train(self, mode=True):
        self.order.append(mode)
        return super(Older, self).train(mode)  # noqa: UP008


class Younger(Older):
    """Derived of a decorated class, and says its name as well."""

    def __init__(self):
        super(Younger, self).__init__()  # noqa: UP008
        self.order.append("Younger")

    def extra_repr(self):
        return "younger, " + super(Younger, self).extra_repr()  # noqa: UP008


MADE = {
    "as it is": Older,
    "by a class method": lambda: Older.of(3),
    "derived": Younger,
    "out of a pickle": lambda: pickle.loads(pickle.dumps(Older())),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())
def test_each_method_reaches_what_is_behind_its_class(make):
    """So do those of a class derived of it; rows are cached, and the module stays in the mode that it was frozen in."""
    module = make()
    expected = (module.weight + module.bias[:, None]).T
    for _ in range(2):
        assert torch.allclose(module(torch.eye(3)), expected)
    assert cache_of(module).stats.hits == 3
    assert module.order[0] == "Older"
    assert module.extra_repr().endswith("older, in_features=3, out_features=2, bias=True")
    assert module.said == "in_features=3, out_features=2, bias=True"
    assert module.train().training is False
    assert isinstance(module, Older)


def test_undone():
    """What is left runs its own forward, once for each row."""
    module = uncached(Older())
    assert module(torch.eye(3)).shape == (3, 2)
    assert isinstance(module, Older)
    assert not is_cached(module)


def test_within_a_function():
    """A name that is no global, but one around the class, means the cached class as well."""

    @cached_module(freeze=True)
    class Local(nn.Linear):
        def __init__(self):
            super(Local, self).__init__(3, 2)  # noqa: UP008

    assert Local()(torch.eye(3)).shape == (3, 2)


class Library(nn.Linear):
    def __init__(self):
        super(Library, self).__init__(3, 2)  # noqa: UP008


def test_a_name_that_goes_on_to_mean_the_plain_class(monkeypatch):
    """A class of a library may be cached under another name, and bound to its own name later."""
    cached = cached_module(freeze=True)(Library)
    assert cached()(torch.eye(3)).shape == (3, 2)
    monkeypatch.setitem(globals(), "Library", cached)
    assert cached()(torch.eye(3)).shape == (3, 2)


def test_nothing_behind():
    """What no class behind it has is missed as Python says it."""

    @cached_module(freeze=True)
    class Lonely(nn.Linear):
        def extra(self):
            return super(Lonely, self).extra()  # noqa: UP008

    with pytest.raises(AttributeError, match="'super' object has no attribute 'extra'"):
        Lonely(3, 2).extra()


def test_the_same_rows_as_a_plain_class(tmp_path):
    """A class that is decorated in one run and wrapped in another has the same rows in a directory."""
    plain = Library()
    decorated = cached_module(freeze=True, store=tmp_path)(Library)()
    decorated.load_state_dict(plain.state_dict())
    decorated(torch.eye(3))
    cache_of(decorated).close()
    cached_module(plain, freeze=True, store=tmp_path)
    plain(torch.eye(3))
    assert cache_of(plain).stats.hits == 3
