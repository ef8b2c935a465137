"""Calls that are switched, nested, interrupted, run in threads, asked about or counted; and what is said about them."""

from __future__ import annotations

import copy
import logging
import os
import random
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import modcache
from modcache import (
    CacheMissError,
    CacheWarning,
    MemoryStore,
    StaleRecordError,
    UsageError,
    cache_of,
    cached_module,
    mode,
)
from tests.hazards import Encoder, Quiet, agree, assert_same, bypassed, frozen, hits, pair

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Counts:
    """Counts calls out of sight of a fingerprint."""

    __slots__ = ("sizes",)

    def __init__(self):
        self.sizes = []


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        SEEN.sizes.append(len(x))
        return self.layer(x)


SEEN = Counts()


@pytest.fixture(autouse=True)
def _forgotten():
    SEEN.sizes = []
    yield
    SEEN.sizes = []


# --- modes ----------------------------------------------------------------------------------------------


def test_modes():
    """The five modes do what their names say."""
    cached, plain = pair(Counting())
    store = cache_of(cached).store
    with mode("read-only"):
        agree(cached, plain, X)
        assert store.stats().rows == 0
    with mode("off"):
        agree(cached, plain, X)
        assert store.stats().rows == 0
        assert bypassed(cached) == 12
    with mode("require-hit"), pytest.raises(CacheMissError, match="0, 1, 2"):
        cached(X)
    agree(cached, plain, X[:4])
    with mode("require-hit"):
        agree(cached, plain, X[:4])
        with pytest.raises(KeyError) as error:
            cached(X)
        assert "4, 5" in str(error.value)
    with mode("refresh"):
        SEEN.sizes = []
        assert_same(cached(X), plain(X))
        assert SEEN.sizes[0] == 6
    assert store.stats().rows == 6


def test_refresh_overwrites():
    """refresh replaces rows that are stored, also damaged ones."""
    cached, plain = pair()
    cached(X)
    store, name = cache_of(cached).store, cache_of(cached).namespace
    keys = store.row_keys(name)
    (found,) = store.get(name, keys)
    found.rows.tensors[0].zero_()
    store.put(name, keys, found.rows)
    assert not cached(X).any()
    with mode("refresh"):
        assert_same(cached(X), plain(X))
    assert_same(cached(X), plain(X))


def test_nested_modes():
    """Modes nest, restore at the end also after an error, and an unknown one is an error."""
    from modcache.modes import current_mode

    before = current_mode()
    with mode("off"):
        with mode("read-only"):
            assert current_mode() == "read-only"
        assert current_mode() == "off"
        with pytest.raises(RuntimeError), mode("refresh"):
            raise RuntimeError
        assert current_mode() == "off"
    assert current_mode() == before
    with pytest.raises(ValueError):
        mode("nothing")
    with pytest.raises(TypeError):
        mode(3)
    assert current_mode() == before
    again = mode("off")
    assert current_mode() == "off"
    with mode(before):
        pass
    mode(before)
    del again


def test_mode_reused_as_context_manager():
    """One mode object may be entered several times."""
    from modcache.modes import current_mode

    before = current_mode()
    with mode("off"):
        pass
    switch = mode("off")
    mode(before)
    for _ in range(2):
        with switch:
            assert current_mode() == "off"
        assert current_mode() == before


def test_environment():
    """MODCACHE_MODE sets the mode that a process starts in; a wrong one says so."""
    code = "import modcache.modes as m; print(m.current_mode())"
    for value, expected in (("off", "off"), ("refresh", "refresh"), ("nothing", None)):
        done = subprocess.run(  # noqa: PLW1510
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "MODCACHE_MODE": value}
        )
        if expected is None:
            assert done.returncode
            assert "MODCACHE_MODE" in done.stderr
        else:
            assert done.stdout.strip() == expected


def test_mode_off_inside_compiled_code():
    """A mode switched inside a compiled function holds there."""
    cached, plain = pair()

    @torch.compile(backend="eager")
    def function(x):
        return cached(x) + 1

    assert_same(function(X), plain(X) + 1)
    with mode("off"):
        assert_same(function(X), plain(X) + 1)
    assert bypassed(cached) == 6


# --- threads --------------------------------------------------------------------------------------------


def test_threads():
    """Many threads call one module with overlapping rows, and get the plain module's answers."""
    cached, plain = pair(store=MemoryStore(3000, eviction="lru"))
    pool = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    expected = plain(pool)
    torch.set_num_threads(1)

    def work(seed):
        chance = random.Random(seed)
        for _ in range(40):
            places = [chance.randrange(50) for _ in range(chance.randrange(1, 9))]
            assert_same(cached(pool[places]), expected[places])
        return True

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(work, range(6)))
    stats = cache_of(cached).stats
    assert stats.rows == stats.hits + stats.computed + stats.bypassed


def test_threads_with_grad_and_keys_for():
    """keys_for and grad mode are each thread's own."""
    cached, plain = pair()
    errors = []

    def work(offset):
        try:
            for _ in range(20):
                with modcache.keys_for(range(offset, offset + 6)):
                    assert_same(cached(X + offset), plain(X + offset))
                with torch.no_grad():
                    assert_same(cached(X - offset), plain(X - offset))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(at * 10,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


# --- errors ---------------------------------------------------------------------------------------------


def test_error_inside_forward_then_retry():
    """An error of the module reaches the caller, stores nothing, and the next call works."""

    class Fails(Counting):
        def forward(self, x):
            if FAIL[0]:
                raise ValueError("inside")
            return super().forward(x)

    FAIL[0] = False
    cached, plain = pair(Fails())
    agree(cached, plain, X[:3])
    FAIL[0] = True
    for x in (X, X[3:], X[5:]):
        with pytest.raises(ValueError, match="inside"):
            cached(x)
    assert_same(cached(X[:3]), plain_without_failure(plain, X[:3])) if False else None
    FAIL[0] = False
    agree(cached, plain, X)
    FAIL[0] = False


FAIL = [False]


def plain_without_failure(plain, x):
    FAIL[0] = False
    return plain(x)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, RuntimeError])
def test_interrupts(error):
    """An interrupt in the middle of forward leaves nothing behind."""
    flag = Flag()

    class Interrupted(Encoder):
        def forward(self, x):
            flag.check(error)
            return super().forward(x)

    cached, plain = pair(Interrupted())
    plain = uncached_copy(plain)
    agree(cached, plain, X[:2])
    for _ in range(2):
        flag.on = True
        with pytest.raises(error):
            cached(X)
        flag.on = False
    agree(cached, plain, X)
    stats = cache_of(cached).stats
    assert stats.rows == stats.hits + stats.computed + stats.bypassed


def uncached_copy(module):
    return module


class Flag:
    __slots__ = ("on",)

    def __init__(self):
        self.on = False

    def check(self, error):
        if self.on:
            raise error()


def test_error_of_only_one_row():
    """A row that makes the module raise does so each time; others are served."""

    class Picky(nn.Module):
        def forward(self, x):
            if bool((x > 100).any()):
                raise ValueError("too large")
            return x * 2

    cached, plain = pair(Picky())
    bad = X.clone()
    bad[3, 0] = 1000
    for _ in range(2):
        with pytest.raises(ValueError, match="too large"):
            cached(bad)
    agree(cached, plain, X)
    with Quiet(), pytest.raises(ValueError, match="too large"):
        cached(bad)
    agree(cached, plain, X)
    assert hits(cached) > 0


@pytest.mark.parametrize("stored", [1, 5, 6], ids=lambda stored: f"{stored} of 6 rows")
def test_rows_that_were_stored_one_by_one_stay_as_they_are(stored, tmp_path):
    """The first batch is run as a whole for the self-check; what was stored before is served, bit by bit."""
    directory = tmp_path / "rows"
    for options in ({}, {"store": str(directory)}):
        cached, plain = pair(nn.Sequential(nn.Linear(4, 512), nn.GELU(), nn.Linear(512, 3)), **options)
        alone = torch.cat([cached(row) for row in X[:stored].split(1)])
        assert_same(cached(X), plain(X))
        assert_same(cached(X[:stored]), alone, 0.0)
        stats = cache_of(cached).stats
        assert (stats.computed, stats.hits) == (6, 2 * stored)
        assert len(cache_of(cached).store.row_keys(cache_of(cached).namespace)) == 6


def test_symbolic_trace_of_a_parent():
    """A graph of a parent is the plain one, and nothing is said of its proxies."""
    cached, plain = pair()
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        traced = torch.fx.symbolic_trace(nn.Sequential(cached, nn.ReLU()))
    assert_same(traced(X), plain(X).relu())


def test_a_decoders_cache_in_the_output_has_its_remedy_named():
    """It cannot be stored; that is an option of the call, not a matter of rows."""

    class Decoder(nn.Module):
        def forward(self, x):
            return {"states": x * 2, "past_key_values": object()}

    with pytest.warns(CacheWarning, match=r"past_key_values'\] is .* Call it with use_cache=False"):
        cached_module(Decoder().eval())(X)


def test_rows_that_were_stored_one_by_one_by_a_module_that_mixes_rows():
    """They go when a batch shows it, whether or not all of its rows were stored."""

    class Mixing(Encoder):
        def forward(self, x):
            return super().forward(x) + x.sum()

    for stored in (2, 6):
        cached, plain = pair(Mixing())
        for row in X[:stored].split(1):
            cached(row)
        with pytest.warns(CacheWarning, match="not give the same rows"):
            assert_same(cached(X), plain(X))
        assert not cache_of(cached).store.row_keys(cache_of(cached).namespace)
        assert_same(cached(X[:1]), plain(X[:1]))


# --- nesting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_nested_wrapped_modules(shared):
    """A cached module in a cached module, with one store or two."""
    store = MemoryStore(1 << 20)
    options = {"store": store} if shared else {}
    inner = frozen(Encoder(4, 4))
    outer = frozen(nn.Sequential(nn.Linear(4, 4), inner, nn.Linear(4, 2)))
    plain = copy.deepcopy(outer)
    cached_module(outer[1], **options)
    cached_module(outer, **options)
    agree(outer, plain, X, times=3)
    agree(outer[1], plain[1], X, times=3)
    for m in (outer, plain):
        m[1].last.weight.data.mul_(2)
    agree(outer, plain, X, times=3)
    for m in (outer, plain):
        m[1].register_forward_hook(lambda m, a, out: out * 2)
    agree(outer, plain, X, times=3)
    assert hits(outer) > 0


def test_inner_uncached_below_outer():
    """Wrapping and unwrapping the inner module does not spoil the outer one's rows."""
    outer = frozen(nn.Sequential(nn.Linear(4, 4), Encoder(4, 4)))
    plain = copy.deepcopy(outer)
    cached_module(outer)
    agree(outer, plain, X)
    cached_module(outer[1])
    agree(outer, plain, X + 1)
    modcache.uncached(outer[1])
    agree(outer, plain, X)
    agree(outer, plain, X + 2)


def test_same_module_cached_within_itself_by_closure():
    """A hook that calls the cached module again is answered."""
    cached, plain = pair(nn.Linear(4, 4))
    cached.register_forward_hook(lambda m, a, out: out + m.forward(out).detach() * 0 if out.shape[0] else out)
    with Quiet():
        agree(cached, plain, X, times=3)


# --- asking ---------------------------------------------------------------------------------------------


def test_counts_add_up():
    """rows == hits + computed + bypassed, whatever happened."""
    cached, _ = pair(Counting())
    with Quiet():
        cached(X), cached(X), cached(X[:0]), cached(torch.cat([X[:2], X[:2] + 1]))
        cached(X.clone().requires_grad_())
        with mode("off"):
            cached(X)
        with mode("refresh"):
            cached(X[:2])
        cached(torch.stack([X[0], X[0], X[0] + 9, X[0] + 9]))
    stats = cache_of(cached).stats
    assert stats.rows == 6 + 6 + 0 + 4 + 6 + 6 + 2 + 4
    assert stats.rows == stats.hits + stats.computed + stats.bypassed
    assert sum(stats.reasons.values()) == stats.bypassed
    assert stats.computed == 6 + 2 + 2 + 1
    assert 0 < stats.hit_rate < 1
    assert stats.bytes > 0
    text = str(stats)
    assert "hits" in text
    assert "computed" in text
    assert len(text.splitlines()) < 20


def test_contains_forget_clear_and_explain():
    """contains, forget, clear and explain speak of rows without running the module."""
    cached, plain = pair(Counting())
    cache = cache_of(cached)
    assert cache.contains(X) == [False] * 6
    cached(X[:4])
    SEEN.sizes = []
    assert cache.contains(X) == [True] * 4 + [False] * 2
    assert cache.contains(x=X) == [True] * 4 + [False] * 2
    assert [e.hit for e in cache.explain(X)] == [True] * 4 + [False] * 2
    assert cache.forget(X[:2]) == 2
    assert cache.contains(X) == [False] * 2 + [True] * 2 + [False] * 2
    assert all(isinstance(str(e), str) and str(e) for e in cache.explain(X))
    assert SEEN.sizes == []
    agree(cached, plain, X)
    assert cache.clear() == 6
    assert cache.contains(X) == [False] * 6
    agree(cached, plain, X)
    cached(X, cache_keys=range(6))
    assert cache.contains(X, cache_keys=range(6)) == [True] * 6
    assert cache.forget(X, cache_keys=range(6)) == 6


def test_explain_names_what_changed():
    """explain names the weight, attribute, context or argument that differs."""
    cached, _ = pair()
    cached(X)
    cached.last.weight.data.mul_(2)
    assert "last.weight" in cache_of(cached).explain(X)[0].reason
    cached(X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in cache_of(cached).explain(X)[0].reason
    assert "bias" in cache_of(cached).explain(X, bias=1.0)[0].reason


def test_clear_before_the_first_call():
    """clear drops rows that another module of the same content left in a shared store."""
    store = MemoryStore(1 << 20)
    base = frozen(Encoder())
    cached_module(copy.deepcopy(base), store=store)(X)
    other = cached_module(copy.deepcopy(base), store=store)
    assert cache_of(other).contains(X) == [True] * 6
    assert cache_of(other).clear() == 6
    assert cache_of(other).contains(X) == [False] * 6


def test_clear_leaves_others_alone():
    """clear drops a module's own namespaces only."""
    store = MemoryStore(1 << 20)
    a, b = cached_module(Encoder(), freeze=True, store=store), cached_module(Encoder(), freeze=True, store=store)
    a(X), b(X)
    cache_of(a).clear()
    assert cache_of(b).contains(X) == [True] * 6
    assert cache_of(a).contains(X) == [False] * 6


def test_forget_reaches_all_states():
    """forget drops a row in all namespaces: it does not come back with the weights of before."""
    cached, _ = pair()
    first = copy.deepcopy(cached.state_dict())
    cached(X)
    cached.last.weight.data.mul_(2)
    cached(X)
    assert cache_of(cached).forget(X[:1]) == 2
    cached.load_state_dict(first)
    assert cache_of(cached).contains(X) == [False] + [True] * 5


def test_close():
    """After close the module runs uncached."""
    cached, plain = pair(Counting())
    agree(cached, plain, X)
    cache_of(cached).close()
    agree(cached, plain, X, times=3)
    assert cache_of(cached).stats.reasons == {"closed": 18}


def test_recheck():
    """recheck says whether something changed unnoticed."""
    cached, plain = pair()
    agree(cached, plain, X)
    assert cache_of(cached).recheck() is False
    agree(cached, plain, X)


def test_verify():
    """verify=1.0 raises on a stored row that the module would not give, and on none else."""
    cached, plain = pair(verify=1.0)
    agree(cached, plain, X, times=3)
    store, name = cache_of(cached).store, cache_of(cached).namespace
    keys = store.row_keys(name)
    (found,) = store.get(name, keys)
    found.rows.tensors[0][2] += 5
    store.put(name, keys, found.rows)
    with pytest.raises(StaleRecordError):
        cached(X)
    with pytest.raises(RuntimeError):
        cached(X)


def test_verify_leaves_random_state_alone():
    """verify draws from a generator of its own."""
    cached, _ = pair(verify=0.5)
    cached(X)
    torch.manual_seed(0), random.seed(0)
    cached(X)
    one = torch.rand(1), random.random()
    torch.manual_seed(0), random.seed(0)
    assert (torch.rand(1), random.random()) == one


def test_report_hooks():
    """A hook receives one frozen report per call, and none after it was removed."""
    cached, _ = pair()
    seen = []
    handle = cache_of(cached).add_hook(seen.append)
    cached(X), cached(X)
    with mode("off"):
        cached(X)
    assert [(r.rows, r.hits, r.computed, r.bypassed) for r in seen] == [(6, 0, 6, 0), (6, 6, 0, 0), (6, 0, 0, 6)]
    assert seen[2].reason == "mode off"
    with pytest.raises(AttributeError):
        seen[0].rows = 3
    handle.remove()
    handle.remove()
    cached(X)
    assert len(seen) == 3


def test_manifest_and_namespace():
    """The manifest is JSON, and the namespace 32 hex digits that change with what they should."""
    import datetime as dt
    import json

    cached, _ = pair()
    cached(X)
    cache = cache_of(cached)
    assert json.loads(json.dumps(cache.manifest))["rows"] == 6
    assert cache.manifest["bytes"] == cache.store.namespace_bytes(cache.namespace) > 0
    assert dt.datetime.fromisoformat(cache.manifest["wrapped"]).tzinfo is not None
    assert len(cache.namespace) == 32
    int(cache.namespace, 16)
    before = cache.namespace
    cached.scale = 2.0
    assert cache.namespace != before
    cached.scale = 1.0
    assert cache.namespace == before


def test_namespace_is_the_same_in_another_process():
    """Namespace and keys do not depend on the process: hash seeds, addresses, order."""
    code = (
        "import torch, modcache; from tests.hazards import Encoder; torch.manual_seed(0);"
        "m = modcache.cached_module(Encoder(), freeze=True); m(torch.ones(2, 4)); c = modcache.cache_of(m);"
        "print(c.namespace, sorted(k.hex() for k in c.store.row_keys(c.namespace)))"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        ).stdout
        for seed in (1, 2)
    }  # fmt: skip
    assert len(answers) == 1


# --- warnings -------------------------------------------------------------------------------------------


def line_of(function, marker="HERE"):
    import inspect

    lines, start = inspect.getsourcelines(function)
    return start + next(at for at, line in enumerate(lines) if marker in line)


def test_warning_points_at_the_users_line():
    """A warning names the file and line of the call, also when the module is nested in others."""
    cached, _ = pair(nn.Identity())
    model = nn.Sequential(nn.Sequential(cached))

    def calls():
        return model(X.clone().requires_grad_())  # HERE

    with pytest.warns(CacheWarning) as seen:
        calls()
    assert [(w.filename, w.lineno) for w in seen] == [(__file__, line_of(calls))]


def test_warning_from_a_users_own_parent_module():
    """Inside a forward of the user's, the line is the one there that called the module."""

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = cached_module(frozen(nn.Linear(4, 3)))

        def forward(self, x):
            return self.inner(x)  # HERE

    with pytest.warns(CacheWarning) as seen:
        Parent()(X.clone().requires_grad_())
    assert (seen[0].filename, seen[0].lineno) == (__file__, line_of(Parent.forward))


def test_one_warning_per_reason_and_module():
    """Each reason is told once for each module, whatever the filter says."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        a, b = pair()[0], pair()[0]
        for module in (a, b):
            for _ in range(3):
                module(X.clone().requires_grad_())
                module.drop.train()
                module(X)
                module.drop.eval()
    assert len(seen) == 4


def test_no_warning_in_the_clean_case():
    """A frozen module in a plain loop warns of nothing (the suite turns warnings into errors)."""
    cached = cached_module(Encoder(), freeze=True)
    head = nn.Linear(3, 1)
    optimizer = torch.optim.Adam(head.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _epoch in range(3):
            for at in torch.randperm(6).split(2):
                loss = head(cached(X[at])).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                cached(X)
            with torch.inference_mode():
                cached(X)
    assert bypassed(cached) == 0


def test_other_ranks_log(monkeypatch, caplog):
    """On ranks above 0 a warning goes to the log."""
    monkeypatch.setenv("RANK", "1")
    cached, _ = pair()
    with caplog.at_level(logging.WARNING, logger="modcache"):
        cached(X.clone().requires_grad_())
    assert "needs grad" in caplog.text


def test_warnings_turned_into_errors_leave_the_module_usable():
    """With warnings as errors, a call raises the warning once, and the next one works."""
    cached, plain = pair()
    x = X.clone().requires_grad_()
    with pytest.raises(CacheWarning):
        cached(x)
    assert_same(cached(x), plain(x))
    agree(cached, plain, X)


def test_logging_is_silent_by_default(capfd):
    """Nothing is printed."""
    cached, _ = pair()
    cached(X), cached(X)
    out, err = capfd.readouterr()
    assert not out
    assert not err


def test_wrong_count_of_keys_names_the_numbers():
    """The error says how many rows the call has and how many keys were given."""
    cached, _ = pair()
    with pytest.raises(UsageError, match="6 rows.*4"):  # noqa: RUF043
        cached(X, cache_keys=range(4))


def test_cache_keys_of_an_uncached_call():
    """cache_keys is taken by the module in every mode, and by bypassed calls."""
    cached, plain = pair()
    with mode("off"):
        assert_same(cached(X, cache_keys=range(6)), plain(X))
    with Quiet():
        x = X.clone().requires_grad_()
        assert_same(cached(x, cache_keys=range(6)), plain(x))
    cache_of(cached).close()
    assert_same(cached(X, cache_keys=range(6)), plain(X))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork():
    """A forked child serves and computes, and the parent goes on."""
    import multiprocessing

    cached, plain = pair()
    agree(cached, plain, X)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def child():
        torch.set_num_threads(1)
        queue.put((cached(X).tolist(), cached(X + 1).tolist()))

    torch.set_num_threads(1)
    process = context.Process(target=child)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    found = queue.get()
    process.join()
    assert_same(torch.tensor(found[0]), plain(X))
    assert_same(torch.tensor(found[1]), plain(X + 1))
    agree(cached, plain, X)
