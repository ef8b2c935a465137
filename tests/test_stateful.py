"""A machine that does anything to a cached module and the same to a plain one, and compares every answer."""

from __future__ import annotations

import copy
import pickle
import warnings

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule
from torch import nn

from modcache import (
    CacheMissError,
    CacheWarning,
    MemoryStore,
    TieredStore,
    cache_of,
    cached_module,
    is_cached,
    keys_for,
    mode,
    uncached,
)
from tests.hazards import Encoder, assert_same, frozen

POOL = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
PLACES = st.lists(st.integers(0, 23), max_size=7)
STORES = {
    "own": lambda: None,
    "tiny": lambda: MemoryStore(700),
    "tiny lru": lambda: MemoryStore(700, eviction="lru"),
    "tiered": lambda: TieredStore(MemoryStore(300, eviction="lru"), MemoryStore(1 << 20)),
    "large": lambda: MemoryStore(1 << 20),
}


def scaled(m, by):
    with torch.no_grad():
        m.last.weight.mul_(by)


def data(m, by):
    m.first.weight.data.mul_(by)


def numpy(m, by):
    m.last.weight.detach().numpy()[:] *= by


def replaced(m, by):
    m.last.weight = nn.Parameter(m.last.weight.detach() * by, requires_grad=False)


def buffered(m, by):
    m.shift = m.shift + by


def buffered_in_place(m, by):
    m.shift += by


def attribute(m, by):
    m.scale = by


def swapped(m, by):
    m.drop = nn.Identity() if by < 1 else nn.Dropout(0.5).eval()


def loaded(m, by):
    torch.manual_seed(int(by * 8))
    m.load_state_dict({name: torch.randn_like(value) for name, value in m.state_dict().items()})


def assigned(m, by):
    torch.manual_seed(int(by * 8))
    m.load_state_dict({name: torch.randn_like(value) for name, value in m.state_dict().items()}, assign=True)
    m.requires_grad_(False)


def rounded(m, by):
    m.half().float() if by < 1 else m.bfloat16().float()


def hooked(m, by):
    m.norm._forward_hooks.clear()
    if by != 1.0:
        m.norm.register_forward_hook(Times(by))


class Times:
    def __init__(self, by):
        self.by = by

    def __call__(self, module, args, out):
        return out * self.by


EDITS = [
    scaled,
    data,
    numpy,
    replaced,
    buffered,
    buffered_in_place,
    attribute,
    swapped,
    loaded,
    assigned,
    rounded,
    hooked,
]


class CachedAndPlain(RuleBasedStateMachine):
    """The plain module is the oracle."""

    modules = Bundle("modules")

    def __init__(self):
        super().__init__()
        self._catch = warnings.catch_warnings()
        self._catch.__enter__()
        warnings.simplefilter("ignore", CacheWarning)
        self.live: list[nn.Module] = []

    def teardown(self):
        self._catch.__exit__(None, None, None)

    @initialize(target=modules, store=st.sampled_from(sorted(STORES)))
    def make(self, store):
        torch.manual_seed(0)
        module = frozen(Encoder())
        plain = copy.deepcopy(module)
        cached_module(module, store=STORES[store]())
        return self._kept(module, plain)

    def _kept(self, module, plain):
        self.live.append(module)
        return module, plain

    @rule(pair=modules, places=PLACES, twice=st.booleans())
    def call(self, pair, places, twice):
        cached, plain = pair
        x = POOL[places]
        for _ in range(1 + twice):
            found = cached(x)
            assert_same(found, plain(x), 2e-3)
            found.fill_(3)

    @rule(pair=modules, places=PLACES, bias=st.sampled_from([None, 1, 1.0, True, -0.0]))
    def call_with_argument(self, pair, places, bias):
        cached, plain = pair
        assert_same(cached(POOL[places], bias=bias), plain(POOL[places], bias=bias), 2e-3)

    @rule(pair=modules, places=PLACES, which=st.sampled_from(["no_grad", "inference", "autocast"]))
    def call_in_context(self, pair, places, which):
        cached, plain = pair
        contexts = {
            "no_grad": torch.no_grad,
            "inference": torch.inference_mode,
            "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        }
        with contexts[which]():
            assert_same(cached(POOL[places]), plain(POOL[places]), 1e-1 if which == "autocast" else 2e-3)

    @rule(pair=modules, places=st.lists(st.integers(0, 23), min_size=1, max_size=7))
    def call_that_needs_grad(self, pair, places):
        cached, plain = pair
        a, b = POOL[places].clone().requires_grad_(), POOL[places].clone().requires_grad_()
        cached(a).sum().backward()
        plain(b).sum().backward()
        assert_same(a.grad, b.grad, 2e-3)

    @rule(pair=modules, places=st.lists(st.integers(0, 23), min_size=1, max_size=7, unique=True), around=st.booleans())
    def call_with_keys(self, pair, places, around):
        cached, plain = pair
        if around:
            with keys_for(places):
                found = cached(POOL[places])
        else:
            found = cached(POOL[places], cache_keys=places)
        assert_same(found, plain(POOL[places]), 2e-3)

    @rule(pair=modules, edit=st.sampled_from(EDITS), by=st.sampled_from([0.5, 1.0, 1.5]))
    def edit(self, pair, edit, by):
        for module in pair:
            edit(module, by)

    @rule(pair=modules, edit=st.sampled_from(EDITS), places=PLACES)
    def edit_and_undo(self, pair, edit, places):
        cached, plain = pair
        before = copy.deepcopy(plain.state_dict())
        for by in (1.5, 0.5):
            edit(cached, by), edit(plain, by)
            assert_same(cached(POOL[places]), plain(POOL[places]), 2e-3)
        cached.load_state_dict(before), plain.load_state_dict(before)
        assert_same(cached(POOL[places]), plain(POOL[places]), 2e-3)

    @rule(pair=modules, places=PLACES, name=st.sampled_from(["read-only", "refresh", "off", "require-hit"]))
    def call_in_mode(self, pair, places, name):
        cached, plain = pair
        with mode(name):
            try:
                assert_same(cached(POOL[places]), plain(POOL[places]), 2e-3)
            except CacheMissError:
                assert name == "require-hit"
                assert not all(cache_of(cached).contains(POOL[places]))

    @rule(pair=modules, places=PLACES)
    def train_for_a_moment(self, pair, places):
        cached, plain = pair
        cached.train()
        cached(POOL[places])
        cached.eval()
        assert_same(cached(POOL[places]), plain(POOL[places]), 2e-3)

    @rule(target=modules, pair=modules, how=st.sampled_from(["deepcopy", "pickle"]))
    def copied(self, pair, how):
        cached, plain = pair
        other = copy.deepcopy(cached) if how == "deepcopy" else pickle.loads(pickle.dumps(cached))
        assert is_cached(other)
        return self._kept(other, copy.deepcopy(plain))

    @rule(pair=modules)
    def wrapped_anew(self, pair):
        cached, _ = pair
        store = cache_of(cached).store
        cached_module(uncached(cached), store=store)

    @rule(pair=modules, places=PLACES)
    def forget(self, pair, places):
        cached, _ = pair
        if places:
            cache_of(cached).forget(POOL[places])
            assert not any(cache_of(cached).contains(POOL[places]))

    @rule(pair=modules)
    def clear(self, pair):
        cache_of(pair[0]).clear()
        assert not any(cache_of(pair[0]).contains(POOL))

    @rule(pair=modules)
    def recheck(self, pair):
        cache_of(pair[0]).recheck()

    @invariant()
    def counts_add_up(self):
        for module in self.live:
            stats = cache_of(module).stats
            assert stats.rows == stats.hits + stats.computed + stats.bypassed


CachedAndPlain.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestCachedAndPlain = CachedAndPlain.TestCase
TestCachedAndPlain.__doc__ = "Any sequence of calls, edits, copies and switches gives what the plain module gives."
