"""The verbs of a cached module, and what happens at their edges."""

import copy
import functools
import warnings
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from torch import nn

from modcache import (
    CacheWarning,
    MemoryStore,
    NotCachedError,
    UsageError,
    UsageTypeError,
    cache_of,
    cached_module,
    keys_for,
    mode,
    uncached,
)
from modcache.manifests import _own_version

BATCH = torch.arange(24.0).reshape(6, 4)


def frozen_linear():
    return nn.Linear(4, 3).requires_grad_(False).eval()


def test_a_sparse_write_noticed_late_drops_what_was_stored_since():
    """One value written behind autograd's back is found within a few calls: one warning, and no row stays stale."""
    layer = cached_module(nn.Linear(512, 64), freeze=True)
    plain = nn.Linear(512, 64).requires_grad_(False)
    plain.load_state_dict(layer.state_dict())
    batches = [torch.randn(4, 512) for _ in range(64)]
    for batch in batches[:4]:
        layer(batch)
    views = layer._modcache.identity._look.watch._probe._sets
    place = views[3][0]  # a window that comes round, by where it lies
    at = (torch.frombuffer(place, dtype=torch.uint8).data_ptr() - layer.weight.data_ptr()) // 4
    for weight in (layer.weight, plain.weight):
        weight.data.view(-1)[at] = 50.0
    with pytest.warns(CacheWarning, match="noticed late|behind autograd"):
        for batch in batches[4:40]:
            layer(batch)

    assert all(torch.allclose(layer(batch), plain(batch), atol=1e-5) for batch in batches)


def test_recheck_finds_a_sparse_write_at_once():
    """recheck() looks at every weight: the rows of before are gone, and nothing is warned about afterwards."""
    layer = cached_module(nn.Linear(512, 64), freeze=True)
    batch = torch.randn(4, 512)
    before = layer(batch)
    layer.weight.data[5, 7] += 1.0

    assert cache_of(layer).recheck() is True
    assert not torch.equal(layer(batch)[:, 5], before[:, 5])
    assert cache_of(layer).recheck() is False


@pytest.mark.parametrize("option", [{"freeze": False}, {"key": None}, {"store": None}, {"verify": 0.0}])
def test_wrapping_again_with_a_default_is_asking_for_it(option):
    """An option that is given counts, whatever it is; the same ones again, or none, change nothing."""
    first = {"freeze": True, "key": "tensor", "store": MemoryStore(1 << 20), "verify": 0.5}
    layer = cached_module(nn.Linear(3, 2), **first)
    assert cached_module(layer, **first) is cached_module(layer) is layer
    with pytest.raises(UsageError, match="cached already"):
        cached_module(layer, **option)


def test_an_option_that_there_is_not():
    """The error names the nearest one."""
    with pytest.raises(UsageTypeError, match="has no option"):
        cached_module(nn.Linear(3, 2), per_rows=False)


def test_freezing_drops_gradients():
    """Momentum would go on moving frozen weights that have a gradient left: then nothing would ever be served."""
    layer = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    layer(BATCH).sum().backward()
    optimizer.step()
    cached_module(layer, freeze=True)
    for _ in range(4):
        layer(BATCH)
        optimizer.step()
    assert cache_of(layer).stats.hits == 3 * len(BATCH)


def test_frozen_weights_that_keep_changing_are_told_of():
    """Nothing is ever served, so somebody should know."""
    layer = cached_module(nn.Linear(4, 3), freeze=True)
    with pytest.warns(CacheWarning, match="other ones at 5 calls in a row"), torch.no_grad():
        for _ in range(6):
            layer(BATCH)
            layer.weight.add_(0.1)
    assert len(layer._modcache._naming._names) < 10


def test_twins_in_a_batch_do_not_hide_that_nothing_is_served(tmp_path):
    """A batch that is drawn with replacement has hits within itself; the disk is still not filled with old states."""
    layer = cached_module(nn.Linear(4, 3), freeze=True, store=tmp_path)
    with pytest.warns(CacheWarning, match="other ones at 5 calls in a row"), torch.no_grad():
        for _ in range(20):
            layer(BATCH[[0, 1, 2, 2]])
            layer.weight.add_(0.1)
    cache_of(layer).flush()
    assert cache_of(layer).stats.hits == 20
    assert len(cache_of(layer).store.back.namespaces()) == 5


def test_two_states_that_take_turns_are_written(tmp_path):
    """Nothing is served in a first epoch; the states are known by then, so a later run gets their rows."""
    layer = cached_module(nn.Linear(4, 3), freeze=True, store=tmp_path)
    own, other = layer.weight.detach().clone(), layer.weight.detach() * 2
    with torch.no_grad():
        for number, weights in enumerate([own, other] * 4):
            layer.weight.copy_(weights)
            layer(BATCH + number / 16)
    cache_of(layer).flush()
    assert cache_of(layer).store.back.stats().rows == 8 * len(BATCH)


def test_states_that_come_back_are_served_although_something_is_trainable():
    """Weights that are swapped in and out between steps, as averages are, keep their rows."""
    with pytest.warns(CacheWarning, match="trainable"):
        layer = cached_module(nn.Linear(4, 3).eval())
    own, average = layer.weight.detach().clone(), layer.weight.detach() * 2
    with torch.no_grad():
        for weights in (own, average, own, average):
            layer.weight.copy_(weights)
            layer(BATCH)
    assert cache_of(layer).stats.hits == 2 * len(BATCH)


def test_rows_of_weights_that_were_trained_leave_memory():
    """A step leaves rows for eight more steps, not for good."""
    with pytest.warns(CacheWarning, match="trainable"):
        layer = cached_module(nn.Linear(4, 3).eval())
    with torch.no_grad():
        for _ in range(40):
            layer(BATCH)
            layer.weight.add_(0.1)
    assert len(cache_of(layer).store.namespaces()) <= 9
    assert len(layer._modcache._sites) <= 9


@pytest.mark.parametrize("ability", ["retire", "namespaces"])
def test_a_store_that_fails_at_a_change_of_weights(ability):
    """Whatever a store raises, the loop goes on, and one warning says so."""

    class Failing(MemoryStore):
        pass

    def fail(*_):
        raise OSError("gone")

    store = Failing(1 << 20)
    layer = cached_module(nn.Linear(4, 3), freeze=True, store=store)
    setattr(store, ability, fail)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for _ in range(70):
            layer(BATCH)
            layer(BATCH)
            layer.weight.add_(0.1)
    assert sum("its store raised OSError" in str(warning.message) for warning in caught) == 1


def test_contains_digests_nothing_large(monkeypatch):
    """Whether rows are there can be told by the number that stands for large weights."""
    monkeypatch.setattr("modcache.attached._LARGE", 8)
    layer = cached_module(frozen_linear())
    layer(BATCH)
    monkeypatch.setattr("modcache.fingerprint.identity.Identity.fingerprint", None)
    assert all(cache_of(layer).contains(BATCH))
    assert cache_of(layer).forget(BATCH[:1]) == 1
    assert cache_of(layer).clear() == len(BATCH) - 1


def test_undigested_weights_are_digested_when_the_namespace_is_asked_for(monkeypatch):
    """Large weights in memory get a name of this process first; asked for, the name of their content, and keep rows."""
    monkeypatch.setattr("modcache.attached._LARGE", 8)
    layer = cached_module(frozen_linear())
    layer(BATCH)
    (local,) = cache_of(layer).store.namespaces()
    name = cache_of(layer).namespace

    assert local != name
    assert cache_of(layer).store.namespaces() == [name]
    layer(BATCH)
    assert cache_of(layer).stats.hits == 6


def test_verbs_on_calls_that_are_bypassed():
    """A call that cannot be cached has no stored rows to contain, explain or forget; it says why."""
    layer = cached_module(frozen_linear())
    cache = cache_of(layer)
    layer(BATCH)

    assert cache.contains(torch.tensor(1.0)) == [False]
    assert cache.forget(torch.tensor(1.0)) == 0
    assert "no rows" in str(cache.explain(torch.tensor(1.0))[0])
    with mode("off"):
        assert cache.contains(BATCH) == [False] * 6
        assert "mode off" in str(cache.explain(BATCH)[0])
    assert cache.contains(BATCH) == [True] * 6
    assert cache.forget(BATCH[:2]) == 2
    assert cache.contains(BATCH) == [False] * 2 + [True] * 4


def test_verbs_inside_keys_for():
    """Inside keys_for, the verbs ask about the keys that a call would get."""
    layer = cached_module(frozen_linear())
    with keys_for(range(6)):
        layer(BATCH)
        assert cache_of(layer).contains(BATCH) == [True] * 6
    assert cache_of(layer).contains(BATCH) == [False] * 6


def test_the_handle_shows_what_it_is():
    """repr names module, rows and hits; flush waits for nothing in memory."""
    layer = cached_module(frozen_linear())
    layer(BATCH)
    layer(BATCH)
    cache_of(layer).flush()

    assert repr(cache_of(layer)) == "Cache(Linear, 12 rows, 50% hits)"


def test_close_leaves_a_shared_store_alone():
    """A closed module runs uncached; the store that it shared keeps its rows for the others."""
    store = MemoryStore()
    one = cached_module(frozen_linear(), store=store)
    other = copy.deepcopy(one)
    one(BATCH)
    cache_of(one).close()
    one(BATCH)
    other(BATCH)

    assert cache_of(one).stats.reasons == {"closed": 6}
    assert cache_of(other).stats.hits == 6


def test_prepare_that_fails_once_is_tried_again(tmp_path):
    """A file that cannot be read once does not stop caching: that call runs whole, the next is cached again."""
    failing = tmp_path / "failing"

    def prepare(rows):
        if failing.exists() and len(rows) < 6:
            failing.unlink()
            raise OSError("try again")
        return rows * 2

    layer = cached_module(frozen_linear(), prepare=prepare)
    plain = uncached(copy.deepcopy(layer))
    layer(BATCH[:3])
    failing.touch()
    with pytest.warns(CacheWarning, match="its prepare raised OSError"):
        assert torch.allclose(layer(BATCH), plain(BATCH * 2))
    assert torch.allclose(layer(BATCH), plain(BATCH * 2))
    assert torch.equal(layer(BATCH), layer(BATCH))
    assert cache_of(layer).stats.hits > 0


def test_prepare_follows_what_it_reads():
    """A prepare whose state changes makes other inputs: its old rows are not served."""

    class Scale:
        def __init__(self):
            self.by = 1.0

        def __call__(self, rows):
            return rows * self.by

    scale = Scale()
    layer = cached_module(frozen_linear(), prepare=scale)
    plain = uncached(copy.deepcopy(layer))
    for by in (1.0, 2.0, 1.0):
        scale.by = by
        assert torch.allclose(layer(BATCH), plain(BATCH * by))
    assert cache_of(layer).stats.hits == 6


def test_misspelt_names_and_things_that_are_no_instances_are_refused():
    """Options and verbs say what they take and what they found."""
    with pytest.raises(UsageError, match="broadcast='mask' names no argument; those of the forward are 'input'"):
        cached_module(frozen_linear(), broadcast="mask")
    with pytest.raises(UsageTypeError, match="store must be None"):
        cached_module(frozen_linear(), store=MemoryStore)

    @cached_module
    class Encoder(nn.Linear):
        pass

    assert cached_module(Encoder) is Encoder
    with pytest.raises(UsageError, match=r"Encoder is cached already; give these options \(version\)"):
        cached_module(Encoder, version="2")
    with pytest.raises(UsageTypeError, match="takes an instance"):
        cache_of(Encoder)


@pytest.mark.parametrize("verb", [cache_of, uncached])
def test_asked_of_the_model_around_it_the_cached_modules_inside_are_named(verb):
    """Who means a part of a model and names the whole is told which parts are cached."""
    model = nn.Sequential(nn.Sequential(cached_module(nn.Linear(3, 2), freeze=True)), nn.ReLU())
    with pytest.raises(NotCachedError, match=r"this Sequential is not cached; inside of it these are: 0\.0$"):
        verb(model)
    with pytest.raises(NotCachedError, match=r"this ReLU is not cached; see cached_module"):
        verb(model[1])


def test_a_module_that_takes_time_before_batch_is_told_how_to_give_rows():
    """The self-check finds that its rows are no samples, and the warning names the two ways out."""
    module = cached_module(nn.MultiheadAttention(4, 2), freeze=True)
    with pytest.warns(CacheWarning, match=r"batch is not its first dimension, set batch_first=True.*per_row=False"):
        module(*[torch.randn(5, 5, 4)] * 3, need_weights=False)


def test_many_outlines_are_not_all_remembered(monkeypatch):
    """Recipes of calls are bounded in number, and come back when they are needed."""
    monkeypatch.setattr("modcache.call._RECIPES", 2)
    layer = cached_module(frozen_linear())
    for size in (2, 3, 4, 5, 2, 3, 4, 5):
        layer(BATCH[:size])

    assert len(layer._modcache.memo.recipes) <= 2
    assert cache_of(layer).stats.computed == 5


def test_a_module_that_changes_its_weights_is_never_stored():
    """Rows of a forward that moves its own weights belong to no state: three times, then for good, said once."""

    class Drifting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x):
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
            return x - self.mean

    layer = cached_module(Drifting().eval())
    plain = Drifting().eval()
    with pytest.warns(CacheWarning, match="keeps changing mean") as told:
        for _ in range(12):
            assert torch.equal(layer(BATCH), plain(BATCH))
    assert len(told) == 1
    assert cache_of(layer).store.stats().rows == 0


def test_the_namespace_asked_for_in_training_carries_no_rows_along():
    """Asking for the manifest while weights are trained renames nothing: no old row is served for new weights."""
    layer = cached_module(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).requires_grad_(False).eval())
    layer(BATCH)
    layer.train()
    names = {cache_of(layer).namespace}
    with torch.no_grad():
        layer[0].weight.mul_(2)
    names.add(cache_of(layer).namespace)
    layer.eval()
    plain = uncached(copy.deepcopy(layer))

    assert len(names) == 2
    assert torch.allclose(layer(BATCH[:1]), plain(BATCH[:1]))
    assert torch.allclose(layer(BATCH), plain(BATCH))


def test_a_bypassed_call_counts_in_keys_for():
    """A call that is switched off has its number in the block: the next one is about other inputs."""
    layer = cached_module(frozen_linear())
    plain = uncached(copy.deepcopy(layer))
    queries, documents = BATCH, BATCH + 100
    for off in (False, True):
        with keys_for(range(6)):
            with mode("off" if off else "read-write"):
                layer(queries)
            assert torch.allclose(layer(documents), plain(documents))


def test_keys_for_around_nested_cached_modules():
    """A cached module inside a cached module is run on parts of the batch, where the given keys fit nothing."""
    inner = cached_module(frozen_linear())
    outer = cached_module(nn.Sequential(inner, nn.ReLU()).requires_grad_(False).eval())
    plain = nn.Sequential(uncached(copy.deepcopy(inner)), nn.ReLU())
    for _ in range(2):
        with keys_for(range(6)):
            assert torch.allclose(outer(BATCH), plain(BATCH))
    assert cache_of(outer).stats.hits == 6


def test_hooks_whose_handles_are_not_kept():
    """Several hooks all receive each report, kept handles or not; remove() takes one away."""
    layer = cached_module(frozen_linear())
    one, two = [], []
    cache_of(layer).add_hook(one.append)
    cache_of(layer).add_hook(two.append).remove()
    cache_of(layer).add_hook(two.append)
    layer(BATCH)

    assert (len(one), len(two)) == (1, 1)


def test_arguments_that_the_signature_does_not_show():
    """A decorated forward that takes more than its signature says runs uncached, counted and said once."""
    plain_forward = nn.Linear.forward

    class Renaming(nn.Linear):
        @functools.wraps(plain_forward)
        def forward(self, x=None, old=None):
            return plain_forward(self, x if old is None else old)

    layer = cached_module(Renaming(4, 3), freeze=True)
    with pytest.warns(CacheWarning, match="do not fit its signature"):
        layer(old=BATCH)
    assert cache_of(layer).stats.reasons == {"arguments do not fit the signature": 6}


def test_writes_into_a_tensor_inside_of_an_argument():
    """A forward that changes a tensor inside of a mapping is found out like one that changes its argument."""

    class InPlace(nn.Module):
        def forward(self, batch):
            return batch["x"].add_(1.0)

    layer = cached_module(InPlace().eval())
    with pytest.warns(CacheWarning, match="changes an input in place"):
        for number in range(3):
            batch = {"x": BATCH.clone() + number}
            expected = batch["x"] + 1.0
            assert torch.equal(layer(batch), expected)
            assert torch.equal(batch["x"], expected)


def test_a_failed_wrap_changes_nothing():
    """A class that cannot be derived from is refused, and keeps the forward that was patched on the instance."""

    class Final(type):
        def __new__(cls, name, bases, body):
            if any(isinstance(base, Final) for base in bases):
                raise TypeError(f"{name} is final")
            return super().__new__(cls, name, bases, body)

    class Tagged(nn.Linear, metaclass=Final):
        pass

    layer = Tagged(4, 3)
    layer.forward = patched = lambda x: x
    with pytest.raises(UsageTypeError, match="cannot derive from Tagged"):
        cached_module(layer, freeze=True)
    assert layer.forward is patched
    assert layer.weight.requires_grad


@pytest.mark.parametrize("wrapped", ["inner first", "outer first"])
@pytest.mark.parametrize("undone", ["inner first", "outer first"])
def test_nested_frozen_modules_are_undone_in_any_order(wrapped, undone):
    """What the other one freezes stays frozen; in the end everything is as it was."""
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 3), nn.Dropout()), nn.Linear(3, 2))
    model[0][0].bias.requires_grad_(False)
    for module in [model[0], model] if wrapped == "inner first" else [model, model[0]]:
        cached_module(module, freeze=True)
    modules = [model[0], model] if undone == "inner first" else [model, model[0]]
    uncached(modules[0])
    assert not any(parameter.requires_grad for parameter in model[0].parameters())
    assert not any(module.training for module in model[0].modules())
    assert model[1].training == model[1].weight.requires_grad == (undone == "outer first")
    uncached(modules[1])
    assert [name for name, value in model.named_parameters() if not value.requires_grad] == ["0.0.bias"]
    assert all(module.training for module in model.modules())


def test_what_lies_in_a_frozen_module_that_is_undone_is_handed_to_the_outermost():
    """Three frozen modules within each other, the middle one undone first."""
    model = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(4, 3))))
    for module in (model[0][0], model[0], model):
        cached_module(module, freeze=True)
    uncached(model[0])
    uncached(model[0][0])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    uncached(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_training_mode_is_warned_about_where_it_matters():
    """Layers that do the same in training are cached in it, and nothing is said; one that is random there is named."""
    layer = cached_module(nn.Sequential(nn.Linear(4, 2), nn.ReLU()).requires_grad_(False))
    for _ in range(2):
        layer(BATCH)
    assert cache_of(layer).stats.hits == 6
    with pytest.warns(CacheWarning, match="Sequential: 1 is in training mode, so it would not be cached in training"):
        cached_module(nn.Sequential(nn.Linear(4, 2), nn.Dropout()).requires_grad_(False))


def test_explain_says_what_the_next_call_does():
    """Rows stored one by one are run once more with their first batch, and explain says so."""
    layer = cached_module(frozen_linear())
    for row in BATCH:
        layer(row[None])
    assert cache_of(layer).contains(BATCH) == [True] * 6
    answers = cache_of(layer).explain(BATCH)
    assert all(answer.hit and "the first one is run as a whole" in answer.reason for answer in answers)
    layer(BATCH)
    assert cache_of(layer).stats.hits == 6
    assert {answer.reason for answer in cache_of(layer).explain(BATCH)} == {"stored in this namespace"}


def test_states_are_not_remembered_without_bound():
    """A target network that moves every other call leaves no trace for each of its states."""
    layer = cached_module(frozen_linear(), store=MemoryStore(max_bytes=1000))
    for _ in range(200):
        with torch.no_grad():
            layer.weight.add_(0.1)
        layer(BATCH)
        layer(BATCH)
    attached = layer._modcache

    assert len(attached._sites) <= 64
    assert len(attached._naming._fingerprints) <= 64
    assert len(attached._naming._names) <= 80
    assert cache_of(layer).stats.hits > 0


def test_the_manifest_of_a_package_that_is_not_installed(monkeypatch):
    """Run from a checkout that was never installed, the manifest says so instead of raising."""

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("modcache.manifests.version", missing)
    monkeypatch.setattr("modcache.manifests._own_version", _own_version.__wrapped__)  # what was read once is remembered
    layer = cached_module(frozen_linear())
    layer(BATCH)

    assert cache_of(layer).manifest["made_with"]["modcache"] == "not installed"


def test_an_argument_of_the_module_called_cache_keys_is_refused():
    """A forward that has an argument of that name would never get it, so wrapping it says what to do."""

    class Own(nn.Linear):
        def forward(self, x, cache_keys=None):
            return super().forward(x)

    with pytest.raises(UsageError, match="argument called cache_keys"):
        cached_module(Own(4, 3), freeze=True)
