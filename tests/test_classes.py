"""The class of a cached module is the user's own, as far as anyone can tell."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from modcache import CacheWarning, cache_of, cached_module, is_cached, uncached

from .models import CountingEncoder, encoder


def test_a_new_instance_of_the_class_of_a_cached_module_is_a_plain_one():
    """`type(module)(...)` makes another module of the user's class, which is not cached and works."""
    module = cached_module(encoder(), freeze=True)
    other = type(module)(3, 5)
    assert type(other) is CountingEncoder
    assert not is_cached(other)
    assert other(torch.eye(3)).shape == (3, 5)
    assert inspect.signature(type(module)) == inspect.signature(CountingEncoder)


def test_copies_stay_cached():
    """A deepcopy and a pickle are cached modules of the same class."""
    module = cached_module(encoder(), freeze=True)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert is_cached(other)
        assert torch.equal(other(torch.eye(3)), encoder()(torch.eye(3)))
        assert type(uncached(other)) is CountingEncoder


@cached_module(freeze=True)
class Decorated(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.layer = nn.Linear(3, width)

    def forward(self, x):
        return self.layer(x)

    @classmethod
    def loaded(cls, weights):
        """As libraries load a checkpoint: into new parameters, once the module was built."""
        made = cls(len(weights["layer.weight"]))
        for name, value in weights.items():
            made.layer.register_parameter(name.removeprefix("layer."), nn.Parameter(value))
        return made


def test_an_instance_of_a_decorated_class_stays_one_when_it_is_uncached():
    """It goes by the name of its class: it is an instance of it, can be pickled, and cached again."""
    module = Decorated()
    batch = torch.eye(3)
    expected = module(batch)
    assert uncached(module) is module
    for plain in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert isinstance(plain, Decorated)
        assert not is_cached(plain)
        assert plain.layer.weight.requires_grad
        assert plain.train().training
        assert plain.to(torch.float64).to(torch.float32)(batch).requires_grad
        assert torch.equal(plain(batch), expected)
    assert is_cached(type(module)(2))
    with pytest.raises(ValueError, match="this Decorated is not cached"):
        uncached(module)
    again = cached_module(module, freeze=True)
    assert type(again) is Decorated
    again(batch)
    again(batch)
    assert cache_of(again).stats.hits == 3
    assert is_cached(pickle.loads(pickle.dumps(again)))


@pytest.mark.parametrize("grad", [True, False])
def test_weights_that_are_loaded_into_an_instance_of_a_decorated_class_are_frozen(grad):
    """freeze=True is about the instance as it is at its first call, also where a class method puts weights into it."""
    weights = nn.Linear(3, 2).state_dict()
    module = Decorated.loaded({f"layer.{name}": value for name, value in weights.items()})
    batch = torch.eye(3)
    with torch.set_grad_enabled(grad):
        module(batch)
    for _ in range(2):
        assert torch.allclose(module(batch), nn.functional.linear(batch, **weights))
    assert cache_of(module).stats.hits == 6
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert all(parameter.requires_grad for parameter in uncached(module).parameters())


def test_what_is_made_trainable_on_purpose_stays_so():
    """What was added to an instance of a frozen class, or switched back on, is trained, and the warning says so."""
    added, switched = Decorated(), Decorated()
    added.more = nn.Linear(3, 3)
    switched.layer.bias.requires_grad_()
    for module, name in ((added, "more.weight"), (switched, "layer.bias")):
        with pytest.warns(CacheWarning, match=f"{name} is trainable .* after freeze=True: call requires_grad_"):
            module(torch.eye(3))
        assert cache_of(module).stats.bypassed == 3
