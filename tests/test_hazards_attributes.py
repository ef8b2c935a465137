"""Whatever a forward may read from its module, and however that is changed, no row of before is served."""

from __future__ import annotations

import array
import collections
import contextvars
import copy
import dataclasses
import enum
import functools
import importlib
import operator
import sys
import threading
import time
import timeit
import types
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from modcache import MemoryStore, cache_of, cached_module, uncached
from tests.hazards import Quiet, agree, computed, frozen, hits

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Module):
    """Multiplies by what it reads from its only attribute."""

    def __init__(self, held, read):
        super().__init__()
        self.held, self.read = held, read

    def forward(self, x):
        return x * self.read(self.held)


class Slotted:
    __slots__ = ("__hidden", "late", "scale")

    def __init__(self, scale):
        self.scale = self.__hidden = scale

    @property
    def hidden(self):
        return self.__hidden

    def hide(self, value):
        self.__hidden = value


@dataclasses.dataclass(slots=True)
class Config:
    scale: float


class Rule:
    def __init__(self, scale):
        self.scale = scale


class Dict(dict):
    pass


class List(list):
    pass


class Float(float):
    pass


class Kind(enum.Enum):
    SOFT = (2.0,)
    LISTED = [2.0]


class Tokenizer:
    """Counts by its class: a library's object."""

    def __init__(self, scale):
        self.scale = scale


Tokenizer.__module__ = "logging"


def marked(made, **fields):
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def local(scale):
    return marked(threading.local(), scale=scale)


def nested(value, depth=40):
    for _ in range(depth):
        value = [value]
    return value


def innermost(value):
    while isinstance(value, list) and isinstance(value[0], list):
        value = value[0]
    return value


def put(name, value):
    return lambda module: setattr(module.held, name, value)


def item(key, value):
    return lambda module: operator.setitem(module.held, key, value)


def instead(make):
    return lambda module: setattr(module, "held", make())


def scripted(scale: float):
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def triple(x: torch.Tensor) -> torch.Tensor:
        return x * 3

    return torch.jit.script(double if scale == 2 else triple)


_SHARED = {"scale": 2.0}
_variable = contextvars.ContextVar("scale", default=2.0)

CASES = {
    "a slot": (lambda: Slotted(2.0), put("scale", 3.0), lambda held: held.scale),
    "a private slot": (lambda: Slotted(2.0), lambda module: module.held.hide(3.0), lambda held: held.hidden),
    "an empty slot": (lambda: Slotted(2.0), put("late", 3.0), lambda held: getattr(held, "late", 2.0)),
    "a dataclass with slots": (lambda: [Config(2.0)], lambda m: put("scale", 3.0)(Scaled(m.held[0], None)),
                               lambda held: held[0].scale),
    "an attribute of a dict": (lambda: marked(Dict(a=1), scale=2.0), put("scale", 3.0), lambda held: held.scale),
    "an attribute of a list": (lambda: marked(List([1]), scale=2.0), put("scale", 3.0), lambda held: held.scale),
    "an attribute of a float": (lambda: marked(Float(1), scale=2.0), instead(lambda: marked(Float(1), scale=3.0)),
                                lambda held: held.scale),
    "a default factory": (lambda: collections.defaultdict(lambda: 2.0), put("default_factory", lambda: 3.0),
                          lambda held: held.default_factory()),
    "a UserList": (lambda: collections.UserList([2.0]), item(0, 3.0), lambda held: held[0]),
    "a read-only view of a dict": (lambda: types.MappingProxyType(_SHARED), lambda _: _SHARED.update(scale=3.0),
                                   lambda held: held["scale"]),
    "an array of objects": (lambda: np.array([2.0, None], dtype=object), item(0, 3.0), lambda held: held[0]),
    "an array of the standard library": (lambda: array.array("d", [2.0]), item(0, 3.0), lambda held: held[0]),
    "a memoryview": (lambda: memoryview(bytearray(b"\2")), item(0, 3), lambda held: float(held[0])),
    "a list of many": (lambda: [2.0] * 5000, item(4000, 3.0), lambda held: held[4000]),
    "a dict of many": (lambda: dict.fromkeys(range(5000), 2.0), item(4000, 3.0), lambda held: held[4000]),
    "another list of many": (lambda: [2.0] * 5000, instead(lambda: [3.0] * 5000), lambda held: held[7]),
    "another dict of many": (lambda: dict.fromkeys(range(5000), 2.0),
                             instead(lambda: dict.fromkeys(range(5000), 3.0)), lambda held: held[7]),
    "another set of many": (lambda: set(range(5000)), instead(lambda: set(range(1, 5001))),
                            lambda held: 2.0 + (0 in held)),
    "one of many objects": (lambda: [Rule(2.0) for _ in range(400)], lambda m: setattr(m.held[350], "scale", 3.0),
                            lambda held: held[350].scale),
    "a list in a list in a list": (lambda: nested(2.0), lambda m: operator.setitem(innermost(m.held), 0, 3.0),
                                   lambda held: innermost(held)[0]),
    "a context variable": (lambda: _variable, lambda _: _variable.set(3.0), lambda held: held.get()),
    "something of a thread": (lambda: local(2.0), put("scale", 3.0), lambda held: held.scale),
    "what an enum's member holds": (lambda: Kind.LISTED, lambda _: operator.setitem(Kind.LISTED.value, 0, 3.0),
                                    lambda held: held.value[0]),
    "a getter of items": (lambda: operator.itemgetter(0), instead(lambda: operator.itemgetter(1)),
                          lambda held: held([2.0, 3.0])),
    "a caller of methods": (lambda: operator.methodcaller("get", "a", 2.0),
                            instead(lambda: operator.methodcaller("get", "a", 3.0)), lambda held: held({})),
    "a method of a number": (lambda: (2.0).__add__, instead(lambda: (3.0).__add__), lambda held: held(1.0)),
    "a ufunc": (lambda: np.sin, instead(lambda: np.exp), lambda held: float(held(1.0))),
    "a vectorized function": (lambda: np.vectorize(lambda x: x * 2), instead(lambda: np.vectorize(lambda x: x * 3)),
                              lambda held: float(held(1.0))),
    "an operator": (lambda: torch.ops.aten.sin.default, instead(lambda: torch.ops.aten.exp.default),
                    lambda held: held(torch.tensor(1.0))),
    "a scripted function": (lambda: scripted(2), instead(lambda: scripted(3)), lambda held: held(torch.tensor(1.0))),
    "a distribution": (lambda: torch.distributions.Normal(0.0, 2.0), put("scale", torch.tensor(3.0)),
                       lambda held: held.scale),
    "an object without content": (lambda: Tokenizer(2.0), instead(lambda: Tokenizer(3.0)), lambda held: held.scale),
}  # fmt: skip


@pytest.mark.parametrize("what", CASES)
def test_what_is_read_from_an_attribute(what):
    """Rows are hits while nothing changed; after the change the module answers as it is now, at once."""
    make, change, read = CASES[what]
    module = cached_module(frozen(Scaled(make(), read)))
    with torch.no_grad():
        assert torch.equal(module(X), X * read(module.held))
        assert torch.equal(module(X), X * read(module.held))
        assert hits(module) == len(X)
        before = float(read(module.held))
        change(module)
        assert float(read(module.held)) != before
        for _ in range(2):
            assert torch.equal(module(X), X * read(module.held))
    _SHARED["scale"], Kind.LISTED.value[0] = 2.0, 2.0
    _variable.set(2.0)


def test_very_many_items_are_looked_at_in_turn():
    """A vocabulary of 100,000 entries costs a check little; an entry that changes is noticed within 64 calls."""
    module = cached_module(frozen(Scaled(dict.fromkeys(range(100_000), 2.0), operator.itemgetter(99_999))))
    module(X)
    module.held[99_999] = 3.0
    with pytest.warns(match="behind autograd's back"):
        for _ in range(64):
            module(X)
    assert torch.equal(module(X), X * 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: {f"word {number}": number for number in range(30_000)},
        lambda: [[number, number] for number in range(20_000)],
        lambda: list(range(1_000_000)),
    ],
    ids=["a vocabulary", "many small lists", "a long list"],
)
def test_large_containers_cost_a_check_little(make):
    """They are not compared whole at each call."""
    plain = cached_module(frozen(Scaled(2.0, lambda held: held)))
    large = cached_module(frozen(Scaled(make(), lambda held: 2.0)))
    checks = []
    for module in (plain, large):
        identity = module._modcache.identity
        first = identity.check(module, False)
        assert identity.check(module, False) is first
        check = functools.partial(identity.check, module, False)
        checks.append(min(timeit.repeat(check, timer=time.process_time, number=64, repeat=5)) / 64)
    assert checks[1] - checks[0] < 1.5e-3, "each entry at each call would take three milliseconds or more"


def test_another_thread_has_its_own():
    """What is kept for each thread counts as the calling thread sees it."""
    module = cached_module(frozen(Scaled(local(2.0), lambda held: getattr(held, "scale", 5.0))))
    module(X)
    found = []
    thread = threading.Thread(target=lambda: found.append(module(X)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], X * 5)
    assert torch.equal(module(X), X * 2)


def test_an_object_without_content_comes_back():
    """Of two objects that count by their class, each has rows of its own for as long as the module lives."""
    first, second = Tokenizer(2.0), Tokenizer(3.0)
    module = cached_module(frozen(Scaled(first, operator.attrgetter("scale"))))
    for held in (first, second, first, second):
        module.held = held
        assert torch.equal(module(X), X * held.scale)
    assert computed(module) == 2 * len(X)


def test_what_a_forward_puts_in_the_place_of_another_is_bookkeeping():
    """An iterator that each forward makes anew does not make rows miss."""

    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.held = {"pieces": iter(())}

        def forward(self, x):
            self.held["pieces"] = iter(x)
            return torch.stack([row * 2 for row in self.held["pieces"]])

    module = cached_module(frozen(Draws()))
    for number in range(4):
        module(torch.cat([X, torch.full((1, 3), float(number))]))
    assert hits(module) == 3 * len(X)


class Counts(nn.Module):
    """Counts its calls."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(3, 2), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x)


def assert_one_state(module):
    """The module is in one state from here on: rows stay when it is rechecked."""
    before = cache_of(module).namespace
    module(X)
    assert not cache_of(module).recheck()
    module(X)
    assert (computed(module), hits(module)) == (len(X), len(X))
    assert cache_of(module).namespace == before


@pytest.mark.parametrize("wrong", [torch.ones(4, 7), torch.arange(28.0).reshape(4, 7)], ids=["twins", "distinct"])
def test_what_a_forward_that_fails_notes_is_bookkeeping(wrong):
    """A counter that moved in a call that raised is no other state."""
    module = cached_module(frozen(Counts()))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        module(wrong)
    assert_one_state(module)


@pytest.mark.parametrize("x", [X[:0], X.clone().requires_grad_()], ids=["empty", "needs grad"])
def test_what_a_bypassed_forward_notes_is_bookkeeping(x):
    """A counter that moved in a call that was run as if uncached is no other state."""
    module = cached_module(frozen(Counts()))
    with Quiet():
        module(x)
    assert_one_state(module)


def test_slots_that_a_forward_writes_are_bookkeeping():
    """A counter in a slot is like one in an attribute."""

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = Slotted(2.0)

        def forward(self, x):
            self.config.scale += 1
            return x * 2

    module = cached_module(frozen(Counts()))
    for number in range(4):
        assert torch.equal(module(torch.cat([X, torch.full((1, 3), float(number))]))[:4], X * 2)
    assert hits(module) >= 2 * len(X)


@pytest.mark.parametrize("field", ["prepare", "key"])
def test_functions_of_a_cached_module_within(field):
    """What prepares the inputs of an inner cached module is part of the outer one's rows."""
    store = MemoryStore()

    def outer(factor):
        function = {"prepare": lambda x: x * factor, "key": lambda row: float(row.sum()) * factor}[field]
        inner = cached_module(frozen(nn.Linear(3, 3)), **{field: function})
        return cached_module(frozen(nn.Sequential(inner)), store=store)

    first, second = outer(2.0), outer(3.0)
    second.load_state_dict(first.state_dict())
    first(X)
    second(X)
    assert computed(second) == len(X)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_quantized_layers_count_by_their_packed_weights():
    """Weights that lie in an object of compiled code are read there."""
    torch.backends.quantized.engine = torch.backends.quantized.supported_engines[-1]
    store = MemoryStore()

    def made(seed):
        torch.manual_seed(seed)
        plain = frozen(torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 3)), {nn.Linear}))
        return cached_module(copy.deepcopy(plain), store=store), plain

    for seed in (0, 1):
        cached, plain = made(seed)
        for row in X:
            agree(cached, plain, row[None])


# --- what code reads from elsewhere ---------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A package of the user's own with a constant in a module, as ``own.conf.SCALE``."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").write_text("")
    (tmp_path / "own" / "conf.py").write_text("SCALE = 2.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield types.SimpleNamespace(set=lambda value: setattr(importlib.import_module("own.conf"), "SCALE", value))
    for name in ("own", "own.conf"):
        sys.modules.pop(name, None)


BODIES = {
    "from a module": "from own.conf import SCALE; return x * SCALE",
    "a module": "import own.conf; return x * own.conf.SCALE",
    "a module of a package": "from own import conf; return x * conf.SCALE",
}


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("what", BODIES)
def test_imports_within_a_forward(what, loaded, elsewhere):
    """What a forward imports when it runs is followed, whether or not it had been imported before."""
    namespace = {"__name__": "mine", "nn": nn}
    exec(f"class Late(nn.Module):\n    def forward(self, x):\n        {BODIES[what]}\n", namespace)
    if loaded:
        elsewhere.set(2.0)
    module = cached_module(namespace["Late"]().eval())
    for _ in range(3):
        assert torch.equal(module(X), X * 2)
    assert hits(module) >= len(X)
    elsewhere.set(3.0)
    for _ in range(2):
        assert torch.equal(module(X), X * 3)


def test_a_module_within_a_package(elsewhere):
    """``package.module.NAME`` is followed through the package."""
    elsewhere.set(2.0)
    namespace = {"__name__": "mine", "nn": nn, "own": sys.modules["own"]}
    exec("class Deep(nn.Module):\n    def forward(self, x):\n        return x * own.conf.SCALE\n", namespace)
    module = cached_module(namespace["Deep"]().eval())
    module(X)
    elsewhere.set(3.0)
    assert torch.equal(module(X), X * 3)


def test_a_module_of_python_that_is_an_attribute(elsewhere):
    """All of a Python module of the user's own counts where it is held by name, whatever the forward reads of it."""
    elsewhere.set(2.0)

    class Configured(nn.Module):
        def __init__(self):
            super().__init__()
            self.settings = sys.modules["own.conf"]

        def forward(self, x):
            return x * vars(self.settings)["SCALE"]

    module = cached_module(Configured().eval())
    assert torch.equal(module(X), X * 2)
    elsewhere.set(3.0)
    assert torch.equal(module(X), X * 3)


@pytest.mark.parametrize("name", ["own.conf", "colorsys"])
def test_an_import_that_changes_nothing(name, elsewhere, monkeypatch):
    """A Python module that is imported by the first forward, and of which it reads nothing, costs no row."""
    monkeypatch.delitem(sys.modules, name, raising=False)
    namespace = {"__name__": "mine", "nn": nn}
    exec(f"class Late(nn.Module):\n    def forward(self, x):\n        import {name}; return x + 1\n", namespace)
    module = cached_module(namespace["Late"]().eval())
    for _ in range(3):
        assert torch.equal(module(X), X + 1)
    assert (computed(module), hits(module)) == (len(X), 2 * len(X))


@pytest.mark.parametrize("layer", [nn.GELU(), Scaled(1.0, lambda held: held)])
def test_a_function_of_torch_that_is_replaced(layer, monkeypatch):
    """Some libraries tell their users to put their own function into `torch.nn.functional`; mostly before any call."""
    functional = nn.functional
    before = cached_module(copy.deepcopy(layer), freeze=True)
    with monkeypatch.context() as first:
        first.setattr(functional, "gelu", lambda x, approximate="none": x * 7)
        agree(before, frozen(copy.deepcopy(layer)), X)

    class Activated(nn.Module):
        def forward(self, x):
            return functional.gelu(x)

    plain = frozen(nn.Sequential(layer, Activated()))
    module = cached_module(copy.deepcopy(plain))
    agree(module, plain, X)
    monkeypatch.setattr(functional, "gelu", lambda x, approximate="none": x * 100)
    with Quiet():  # it is looked at in turn, so it may be noticed late
        for _ in range(16):
            module(X)
    agree(module, plain, X)


def test_partial_methods_and_metaclasses_count():
    """Code that a class has from a partial method or from the class of its class is read."""
    store, answers = MemoryStore(), []
    source = """
class Meta(type):
    @property
    def scale(cls): return {0}
class Config(metaclass=Meta): pass
class Made(nn.Module):
    def by(self, x, factor): return x * factor * Config.scale
    twice = functools.partialmethod(by, factor={1})
    def forward(self, x): return self.twice(x)
"""
    for scale, factor in ((2.0, 1.0), (3.0, 1.0), (2.0, 5.0)):
        namespace = {"__name__": "mine", "nn": nn, "functools": functools}
        exec(source.format(scale, factor), namespace)
        module = cached_module(namespace["Made"]().eval(), store=store)
        answers.append(torch.equal(module(X), X * scale * factor))
    assert answers == [True] * 3


def test_a_graph_module_that_is_compiled_anew():
    """torch.fx writes a new forward onto the class of a graph module; the cached one follows."""
    plain = torch.fx.symbolic_trace(frozen(nn.Sequential(nn.Linear(3, 3), nn.ReLU())))
    module = cached_module(copy.deepcopy(plain))
    agree(module, plain, X)
    for graph in (plain, module):
        node = next(node for node in graph.graph.nodes if node.target == "1")
        with graph.graph.inserting_after(node):
            negated = graph.graph.call_function(torch.neg, (node,))
        node.replace_all_uses_with(negated, delete_user_cb=lambda user, negated=negated: user is not negated)
        graph.recompile()
    agree(module, plain, X)
    assert hits(module) == 2 * len(X)


def test_pruned_layers_are_served():
    """Pruning computes a layer's weight anew before each forward, from what is kept."""
    module, plain = (frozen(nn.Sequential(nn.Linear(3, 3), nn.ReLU())) for _ in range(2))
    plain.load_state_dict(module.state_dict())
    for own in (module, plain):
        prune.l1_unstructured(own[0], "weight", 0.5)
        frozen(own)
    cached_module(module)
    agree(module, plain, X, times=4)
    assert hits(module) >= 2 * len(X)
    with torch.no_grad():
        for own in (module, plain):
            own[0].weight_mask.fill_(1)
    agree(module, plain, X)


def test_a_scripted_part_that_is_replaced():
    """version= stands for what cannot be read, but not for whatever takes its place."""

    class Times(nn.Module):
        def __init__(self, factor: float):
            super().__init__()
            self.factor = factor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.factor

    module = cached_module(frozen(nn.Sequential(torch.jit.script(Times(2.0)))), version="1")
    module(X)
    module[0] = torch.jit.script(Times(3.0)).eval()
    assert torch.equal(module(X), X * 3)
    assert cache_of(module).stats.bypassed == 0


class InSlots(nn.Module):
    """Keeps in slots what others keep in their ``__dict__``."""

    __slots__ = ("calls", "late", "scale")

    def __init__(self, scale=2.0):
        super().__init__()
        self.scale, self.calls = scale, 0

    def forward(self, x):
        self.calls += 1
        return x * self.scale + getattr(self, "late", 0.0)


@pytest.mark.parametrize("make", [InSlots, lambda: nn.Sequential(InSlots())], ids=["itself", "inside"])
def test_slots_of_a_module(make):
    """A module's attributes may lie in slots: one that is set counts, one that a forward changes is bookkeeping."""
    plain, cached = frozen(make()), cached_module(frozen(make()))
    namespaces = {cache_of(cached).namespace}
    for name, value in [("scale", 3.0), ("late", 1.0)]:
        for _ in range(2):
            agree(cached, plain, X)
        namespaces.add(cache_of(cached).namespace)
        for module in (cached, plain):
            setattr(module[0] if isinstance(module, nn.Sequential) else module, name, value)
    agree(cached, plain, X)
    assert (computed(cached), hits(cached)) == (12, 28)
    assert len(namespaces | {cache_of(cached).namespace}) == 3
    known = weakref.ref(cached)
    uncached(cached)
    del cached
    module = None
    assert known() is None, module
