"""A store that keeps manifests is told what its rows are, and spares the next process a self-check."""

import gc
import logging
import weakref

import pytest
import torch
from torch import nn

from modcache import MemoryStore, TieredStore, cache_of, cached_module
from modcache.stores import Describes, Store

from .models import CountingEncoder


class Keeping:
    """A store of the user's that lasts and keeps manifests."""

    def __init__(self):
        self.rows = MemoryStore()
        self.told = {}

    def get(self, namespace, row_keys):
        return self.rows.get(namespace, row_keys)

    def put(self, namespace, row_keys, rows):
        return self.rows.put(namespace, row_keys, rows)

    def delete(self, namespace, row_keys=None):
        return self.rows.delete(namespace, row_keys)

    def row_keys(self, namespace):
        return self.rows.row_keys(namespace)

    def namespaces(self):
        return self.rows.namespaces()

    def stats(self):
        return self.rows.stats()

    def flush(self):
        self.rows.flush()

    def close(self):
        self.rows.close()

    def describe(self, namespace, facts):
        before = self.told.setdefault(namespace, {})
        checked = {**before.get("checked", {}), **facts.get("checked", {})}
        before.update(facts, checked=checked)

    def manifest(self, namespace):
        return self.told.get(namespace)

    def manifests(self):
        return dict(self.told)


def encoder(seed=0):
    torch.manual_seed(seed)
    return CountingEncoder()


def anew(store):
    """The same store, as another process would open it."""
    other = Keeping()
    other.rows, other.told = store.rows, store.told
    return other


BATCH = torch.arange(12.0).reshape(4, 3)


def test_it_is_a_store_that_describes():
    """The double meets both protocols."""
    assert isinstance(Keeping(), Store)
    assert isinstance(Keeping(), Describes)


def test_the_first_rows_bring_a_manifest():
    """A namespace is described when rows are put, with what is in its name, and not before."""
    store = Keeping()
    cached = cached_module(encoder(), freeze=True, store=store, version="v7")
    assert store.told == {}
    cached(BATCH)
    facts = store.told[cache_of(cached).namespace]
    assert facts["class"].endswith("CountingEncoder")
    assert facts["version"] == "v7"
    assert facts["made_with"]["torch"] == torch.__version__
    assert facts["parts"]
    assert len(facts["checked"]) == 1


def test_another_process_does_not_check_again():
    """What passed a self-check is known to whoever opens the store later: nothing is computed."""
    store = Keeping()
    cached_module(encoder(), freeze=True, store=store)(BATCH)
    later = encoder()
    again = cached_module(later, freeze=True, store=anew(store))
    assert torch.equal(again(BATCH), encoder()(BATCH))
    assert later.calls == 0
    assert cache_of(again).stats.hits == 4


def test_without_the_mark_it_checks_again():
    """The test before is no accident: without the word that was left, a first batch is computed as a whole."""
    store = Keeping()
    cached_module(encoder(), freeze=True, store=store)(BATCH)
    for facts in store.told.values():
        facts["checked"] = {}
    later = encoder()
    again = cached_module(later, freeze=True, store=anew(store))
    assert torch.equal(again(BATCH), encoder()(BATCH))
    assert later.calls > 0


@pytest.mark.parametrize("nonsense", [3, "x", [[-1]], [["a"]], [[True]], [1], {"a": 1}])
def test_nonsense_for_a_mark_is_no_mark(nonsense):
    """A mark that somebody made up is not believed, and breaks nothing."""
    store = Keeping()
    cached_module(encoder(), freeze=True, store=store)(BATCH)
    for facts in store.told.values():
        facts["checked"] = dict.fromkeys(facts["checked"], nonsense)
    again = cached_module(encoder(), freeze=True, store=anew(store))
    assert torch.equal(again(BATCH), encoder()(BATCH))


class Tokens(nn.Module):
    """One vector a token, and how many tokens there are."""

    def forward(self, input_ids, attention_mask):
        return (input_ids * attention_mask)[..., None].float().expand(-1, -1, 4)


@pytest.mark.parametrize("wrong", [[[1]], [[0], [0]], [[5]]])
def test_a_mark_that_does_not_fit_the_output_is_no_mark(wrong):
    """Token dimensions that somebody made up are seen not to fit, and looked for anew."""
    ids = torch.tensor([[3, 4, 5], [6, 7, 0], [8, 0, 0], [9, 9, 0]])
    store = Keeping()
    cached_module(Tokens().eval(), key="tokens", store=store)(ids, (ids > 0).long())
    (facts,) = store.told.values()
    assert list(facts["checked"].values()) == [((0,),)]
    facts["checked"] = dict.fromkeys(facts["checked"], wrong)
    store.rows = MemoryStore()
    again = cached_module(Tokens().eval(), key="tokens", store=anew(store))
    for _ in range(2):
        assert torch.equal(again(ids, (ids > 0).long()), Tokens()(ids, (ids > 0).long()))


class Pairs(nn.Module):
    """Takes no row by itself, which a self-check on two rows does not find out."""

    def forward(self, x):
        if len(x) == 1:
            raise ValueError("a row needs company")
        return x + 1


def test_a_mark_goes_when_a_form_fails_later():
    """A form of call that failed after it had passed is not believed by the next process either."""
    store = Keeping()
    cached = cached_module(Pairs().eval(), store=store)
    cached(BATCH)
    (facts,) = store.told.values()
    assert list(facts["checked"].values()) == [((),)]
    with pytest.warns(UserWarning, match="a row needs company"):
        cached(torch.cat([BATCH[1:], -BATCH[1:2]]))
    assert list(facts["checked"].values()) == [None]


def test_weights_that_are_trained_are_not_written():
    """Once trainable weights were seen to change, rows stay in memory: nobody needs those of each step."""
    store = Keeping()
    model = encoder()
    model.eval()
    with pytest.warns(UserWarning, match="is trainable"):
        cached = cached_module(model, store=TieredStore(MemoryStore(), store))
    with torch.no_grad():
        cached(BATCH)
        before = store.stats().rows
        next(cached.parameters()).add_(1)
        with pytest.warns(UserWarning, match="its rows stay in memory"):
            fresh = cached(BATCH)
        assert torch.equal(cached(BATCH), fresh)
        assert store.stats().rows == before == 4
        assert cache_of(cached).stats.hits == 4
        cached.requires_grad_(False)
        next(cached.parameters()).add_(1)
        cached(BATCH)
        assert store.stats().rows == 8, "nothing is trained any more"


def test_a_surprise_explains_itself(caplog):
    """One log line says what differs when the same class has rows under another fingerprint."""
    store = Keeping()
    cached_module(encoder(0), freeze=True, store=store)(BATCH)
    with caplog.at_level(logging.INFO, "modcache"):
        cached_module(encoder(1), freeze=True, store=anew(store))(BATCH)
    (line,) = [record.getMessage() for record in caplog.records if "another fingerprint" in record.getMessage()]
    assert "weights" in line


def test_explain_tells_of_the_same_surprise():
    """A module that has stored nothing yet is told in what the rows of its class in the store are other ones."""
    store = Keeping()
    cached_module(encoder(0), freeze=True, store=store)(BATCH)
    other = cached_module(encoder(1), freeze=True, store=anew(store))
    (answer, *_) = cache_of(other).explain(BATCH)
    assert not answer.hit
    assert "this class under another fingerprint; what differs: weights" in answer.reason
    other(BATCH)
    (answer, *_) = cache_of(other).explain(BATCH + 1)
    assert "fingerprint" not in answer.reason


def test_a_manifest_keeps_no_module_alive():
    """What is ready to be told does not hold the module."""
    cached = cached_module(encoder(), freeze=True, store=Keeping())
    gone = weakref.ref(cached)
    cache_of(cached).contains(BATCH)
    del cached
    gc.collect()
    assert gone() is None


class Failing(Keeping):
    """Its manifests cannot be read or written."""

    def describe(self, namespace, facts):
        raise OSError("no space left")

    def manifest(self, namespace):
        raise OSError("damaged")


def test_a_store_that_cannot_describe_breaks_nothing():
    """The run goes on with one warning, and rows are served."""
    cached = cached_module(encoder(), freeze=True, store=Failing())
    with pytest.warns(UserWarning, match="describing"):
        first = cached(BATCH)
    assert torch.equal(cached(BATCH), first)
    assert cache_of(cached).stats.hits == 4
