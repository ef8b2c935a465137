"""The class of a cached module is the user's own, as far as anyone can tell."""

import copy
import inspect
import pickle

import torch

from modcache import cached_module, is_cached, uncached

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
