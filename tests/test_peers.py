"""The failures that were seen in torchcache and torch-module-cache (reference/PEERS.md 2.1-2.13, marked T), run here."""  # noqa: E501

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from modcache import CacheWarning, MemoryStore, cache_of, cached_module, mode
from tests.hazards import Encoder, Quiet, assert_same, bypassed, computed, frozen, hits, pair

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def collisions(rows):
    cached, _ = pair(nn.Flatten())
    cached(rows)
    return len(rows) - computed(cached)


def test_weights_doubled():
    """2.1: weights doubled, the old outputs were served."""
    cached, plain = pair()
    cached(X)
    for m in (cached, plain):
        for p in m.parameters():
            p.data *= 2
    assert_same(cached(X), plain(X))


def test_new_random_instance():
    """2.1: a new instance with other random weights was served the outputs of the first."""
    store = MemoryStore(1 << 20)
    for _ in range(3):
        cached, plain = pair(store=store)
        assert_same(cached(X), plain(X))


def test_two_instances_of_one_class():
    """2.1: two instances of one decorated class shared their entries."""

    @cached_module(freeze=True)
    class Decorated(Encoder):
        pass

    a, b = Decorated(), Decorated()
    assert not torch.equal(a(X), b(X))


def test_small_floats():
    """2.3: rand * 0.01 in 8 dimensions had two keys for 5,000 rows."""
    assert collisions(torch.rand(5000, 8) * 0.01) == 0


def test_uniform_rows():
    """2.3: 20,000 rows of rand in 16 dimensions had 12,854 keys."""
    assert collisions(torch.rand(20000, 16)) == 0


def test_normal_rows():
    """2.3: 20,000 rows of randn in 64 dimensions had 18,594 keys."""
    assert collisions(torch.randn(20000, 64)) == 0


def test_one_pixel_inverted():
    """2.3: an image with one pixel inverted had the same key 470 times of 500."""
    image = torch.rand(3, 224, 224)
    cached, _ = pair(Apply(lambda x: x.flatten(1).double().sum(1)))
    places = torch.randperm(image.numel(), generator=torch.Generator().manual_seed(0))[:60]
    for chunk in places.split(20):
        batch = image.repeat(len(chunk), 1, 1, 1)
        batch.view(len(chunk), -1)[torch.arange(len(chunk)), chunk] += 1
        cached(batch)
    assert computed(cached) == 60


def test_scalars_were_xored():
    """2.3: f(x, 2, 2) was f(x, 3, 3), and f(x, 2, 5) was f(x, 5, 2)."""
    cached, plain = pair(Apply(lambda x, a, b: x * a - b))
    for a, b in ((2, 2), (3, 3), (2, 5), (5, 2)):
        assert_same(cached(X, a, b), plain(X, a, b))


def test_int_and_text_keys():
    """2.3: key 1 and key "1" were one entry."""
    cached, plain = pair()
    assert_same(cached(X, cache_keys=[1, 2, 3, 4, 5, 6]), plain(X))
    assert_same(cached(X + 1, cache_keys=["1", "2", "3", "4", "5", "6"]), plain(X + 1))


def test_one_draw_of_dropout_for_ever():
    """2.6: one draw of dropout was frozen for ever, without a word."""
    with Quiet():
        cached = cached_module(nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5)))
    with torch.no_grad(), pytest.warns(CacheWarning, match="training mode"):
        one = cached(X)
    with torch.no_grad():
        assert not torch.equal(one, cached(X))


def test_full_store_never_caches_again():
    """2.10: when the store was full, 96 of 100 rows were computed for ever; lru keeps what is in use."""
    x = torch.randn(100, 4)
    cached, plain = pair(nn.Linear(4, 64), store=MemoryStore(4 * 400, eviction="lru"))
    for row in x:
        cached(row[None])
    count = computed(cached)
    assert_same(cached(x[-4:]), plain(x[-4:]))
    for _ in range(3):
        cached(x[-2:])
    assert computed(cached) <= count + 4


def test_integer_input_truncated_the_output():
    """2.13: with integer input the second call gave int64, all values cut to 0."""
    cached, plain = pair(nn.Embedding(10, 4))
    ids = torch.arange(6)
    for _ in range(3):
        assert_same(cached(ids), plain(ids))


def test_edit_of_a_hit_changed_the_entry():
    """2.13: an edit in place of what a hit returned corrupted the entry."""
    cached, plain = pair()
    for _ in range(3):
        out = cached(X)
        assert_same(out, plain(X))
        out.fill_(7)


def test_autocast_then_fp32():
    """1a: a bfloat16 result under autocast was served as float32 later."""
    cached, plain = pair(nn.Linear(4, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cached(X).dtype == plain(X).dtype == torch.bfloat16
    assert_same(cached(X), plain(X), 1e-6)


def test_text_without_a_tensor():
    """1a: a call without a tensor raised."""
    cached, plain = pair(Apply(lambda texts: torch.tensor([[float(len(t))] for t in texts])))
    for _ in range(2):
        assert_same(cached(["a", "bb"]), plain(["a", "bb"]))


def test_mixed_batch_computes_what_is_missing():
    """1a: a batch with one new row was computed whole."""
    cached, _ = pair()
    cached(X)
    cached(torch.cat([X, X[:1] + 1]))
    assert computed(cached) == 7


def test_duplicates_in_a_batch():
    """1a: duplicates inside a batch were computed each."""
    cached, _ = pair()
    cached(X[[0, 0, 1, 1, 0]])
    assert computed(cached) == 2


def test_tuple_and_dict_outputs():
    """1a: tuples raised, dicts came back as lists of a wrong shape."""
    for function in (lambda x: (x, x * 2), lambda x: {"a": x, "b": x[:, 0]}):
        cached, plain = pair(Apply(function))
        for _ in range(2):
            assert_same(cached(X), plain(X))


def test_lazy_construction_lost_the_parameters():
    """1a: before the first miss there were no parameters and an empty state_dict."""
    cached, plain = pair()
    assert list(cached.state_dict()) == list(plain.state_dict())
    assert len(list(cached.parameters())) == len(list(plain.parameters()))


def test_grad_on_miss_none_on_hit():
    """3 (17): a miss carried a graph and a hit did not; here neither does, and what needs one is bypassed."""
    cached, _ = pair()
    assert not cached(X).requires_grad
    assert not cached(X).requires_grad
    cached.last.weight.requires_grad_(True)
    with Quiet():
        assert cached(X).requires_grad
        assert cached(X).requires_grad


def test_compile():
    """2.17: compiling around the cache failed with fullgraph; a parent compiles around it, and off it goes whole."""
    cached, plain = pair()
    compiled = torch.compile(nn.Sequential(cached, nn.Identity()), backend="eager")
    for _ in range(2):
        assert_same(compiled(X), plain(X))
    assert hits(cached) == 6


def test_instance_from_elsewhere():
    """1a: an instance that somebody else made could not be wrapped."""
    module = frozen(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
    plain = copy.deepcopy(module)
    cached_module(module)
    x = torch.randn(3, 5, 4)
    for _ in range(2):
        assert_same(module(x), plain(x))
    assert hits(module) == 3
    assert bypassed(module) == 0
    with mode("off"):
        assert_same(module(x), plain(x))


def test_same_input_other_process_same_key():
    """2.4: keys varied from process to process (salted hashes, pickled tensors); these are fixed bytes."""
    cached, _ = pair(nn.Flatten())
    cached(torch.arange(4.0)[None])
    cache = cache_of(cached)
    (key,) = cache.store.row_keys(cache.namespace)
    cached(torch.tensor([[0.0, 1.0, 2.0, 3.0]]).t().contiguous().t())
    assert cache.store.row_keys(cache.namespace) == [key]
