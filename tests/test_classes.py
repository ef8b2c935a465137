"""The class of a cached module is the user's own, as far as anyone can tell."""

import copy
import inspect
import pickle
from abc import ABC
from typing import Generic, Protocol, TypeVar

import pytest
import torch
from torch import nn

from modcache import CacheWarning, NotCachedError, cache_of, cached_module, is_cached, uncached

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


class Flattening(nn.Module):
    """Makes itself anew from its own state when it is copied, as the layers of einops do."""

    def __init__(self, start):
        super().__init__()
        self.start = start

    def forward(self, x):
        return x.flatten(self.start)

    def __getstate__(self):
        return {"start": self.start}

    def __setstate__(self, state):
        self.__init__(state["start"])


def flattened(dropped=False):
    torch.manual_seed(0)
    module = cached_module(nn.Sequential(Flattening(1), nn.Dropout(0.5), nn.Linear(4, 2)), freeze=True)
    module[1].train(dropped)
    return module


def copies(module):
    return copy.deepcopy(module), pickle.loads(pickle.dumps(module))


def test_a_copy_of_a_frozen_module_is_in_eval_mode():
    """A layer that makes itself anew when it is copied comes out in training mode, which would bypass every call."""
    x = torch.randn(3, 2, 2)
    module = flattened()
    module(x)
    for other in (*copies(module), *copies(nn.Sequential(module))):
        assert not any(child.training for child in (other if is_cached(other) else other[0]).modules())
    other, loaded = copies(module)
    assert torch.equal(other(x), module(x))
    assert cache_of(other).stats.hits == 3
    loaded(x)
    assert cache_of(loaded).stats.computed == 3


def test_a_copy_keeps_a_layer_in_training_mode_that_was_put_there():
    """Dropout that somebody switched on in a frozen module stays on in its copies, whose calls are bypassed, too."""
    for other in copies(flattened(dropped=True)):
        assert [child.training for child in other] == [False, True, False]


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


class Static(nn.Module):
    @staticmethod
    def forward(x, scale=2):
        return x * scale


class OfTheClass(nn.Module):
    rate = 3

    @classmethod
    def forward(cls, x):
        return x * cls.rate


class Chosen(nn.Module):
    @property
    def forward(self):
        return self.scaled

    def scaled(self, x):
        return x * 5


@pytest.mark.parametrize("decorated", [False, True], ids=["instance", "class"])
@pytest.mark.parametrize("cls", [Static, OfTheClass, Chosen])
def test_a_forward_may_be_any_kind_of_attribute(cls, decorated):
    """What runs as a plain module runs as a cached one."""
    module = cached_module(freeze=True)(cls)() if decorated else cached_module(cls(), freeze=True)
    batch = torch.eye(3)
    for _ in range(2):
        assert torch.equal(module(batch), cls()(batch))
    assert cache_of(module).stats.hits == 3
    assert torch.equal(uncached(module)(batch), cls()(batch))


def test_wrapping_registers_no_subclass():
    """A class that keeps book of its subclasses hears nothing of those that are made here, nor what it asks of them."""
    known = {}

    class Registered(nn.Linear):
        def __init_subclass__(cls, *, name, **more):
            super().__init_subclass__(**more)
            known[name] = cls

    class Own(Registered, name="own"):
        pass

    for module in (cached_module(Own(3, 2), freeze=True), cached_module(freeze=True)(Own)(3, 2)):
        assert module(torch.eye(3)).shape == (3, 2)
        assert isinstance(module, Own)
        assert type(module).__mro__[1] is Own
    assert known == {"own": Own}


T = TypeVar("T")


class Wide(Protocol):
    """What a class of the user's says that it has."""

    width: int


class Plugin:
    """A base without attributes of its own, as ABC and Generic are."""

    __slots__ = ()


@pytest.mark.parametrize("base", [ABC, Generic[T], Wide, Plugin], ids=["ABC", "Generic", "Protocol", "slots"])
def test_a_base_without_attributes_may_come_first(base):
    """Its layout is another one than that of a class that begins with `nn.Module`; no registry hears of it either."""
    known = []

    class First(base, nn.Module):
        def __init_subclass__(cls, **more):
            super().__init_subclass__(**more)
            known.append(cls)

    class Doubled(First):
        def __init__(self):
            nn.Module.__init__(self)  # a protocol's own one calls no other
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(x) * 2

    batch = torch.eye(3)
    for module in (cached_module(Doubled(), freeze=True), cached_module(freeze=True)(Doubled)()):
        first = module(batch)
        assert torch.equal(module(batch), first)
        assert cache_of(module).stats.hits == 3
        assert type(module).__mro__[1] is Doubled
        assert torch.equal(uncached(module)(batch), first)
    assert known == [Doubled]


def test_a_module_that_takes_no_attributes():
    """Its class is changed all the same, and back."""

    class Closed(nn.Linear):
        def __setattr__(self, name, value):
            if vars(self).get("closed"):
                raise AttributeError(name)
            super().__setattr__(name, value)

    module = Closed(3, 2).requires_grad_(False).eval()
    module.closed = True
    cached_module(module)
    module(torch.eye(3))
    module(torch.eye(3))
    assert cache_of(module).stats.hits == 3
    assert type(uncached(module)) is Closed


@cached_module(freeze=True)
class Cast(nn.Module):
    """Casts itself while it is made."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.double()

    def forward(self, x):
        return self.layer(x)


def test_a_decorated_class_that_casts_itself_while_it_is_made():
    """What is not complete yet can be cast, and is cached once it is."""
    module, batch = Cast(), torch.eye(3, dtype=torch.float64)
    assert torch.equal(module(batch), module(batch))
    assert cache_of(module).stats.hits == 3


def test_an_instance_of_a_decorated_class_that_was_not_made_by_its_init():
    """It is readied when it is first asked for: some loaders fill what ``__new__`` gives."""
    made = Cast()
    other = Cast.__new__(Cast)
    other.__dict__.update({name: value for name, value in vars(made).items() if name != "_modcache"})
    batch = torch.eye(3, dtype=torch.float64)
    assert torch.equal(other(batch), made(batch))
    assert cache_of(other).stats.computed == 3


def rebuilt(width):
    return Rebuilt(width)


class Rebuilt(nn.Linear):
    """Pickles by what it was made of."""

    def __init__(self, width):
        super().__init__(3, width)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def __reduce__(self):
        return rebuilt, (self.out_features,)


def test_a_class_that_pickles_in_its_own_way_keeps_it():
    """What it gives back is what it says itself: a plain module."""
    module = cached_module(Rebuilt(2), freeze=True)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is Rebuilt
        assert torch.equal(other(torch.eye(3)), module(torch.eye(3)))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_class_derived_of_the_class_of_a_cached_instance(compiled):
    """Its instances are plain modules: nobody has asked for them to be cached."""
    cached = cached_module(nn.Linear(3, 2), freeze=True)
    cls = type(cached)

    class Derived(cls):
        """As somebody may derive of whatever class a module has."""

    module = Derived(3, 2)
    assert not is_cached(module)
    called = torch.compile(module, backend="eager") if compiled else module
    assert torch.equal(called(torch.eye(3)), (module.weight + module.bias[:, None]).T)
    with pytest.raises(NotCachedError, match="is not cached"):
        cache_of(module)
