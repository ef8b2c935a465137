"""The oracle: a cached module is its plain copy, over a table of models, batches and hit ratios."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from modcache import MemoryStore, cache_of, cached_module, keys
from tests.hazards import Encoder, Quiet, assert_same, bypassed, computed, frozen, hits

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
VISION = {**SMALL, "image_size": 8, "patch_size": 4, "num_channels": 3}


def vectors(count, seed):
    return {"input": torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))}


def images(count, seed):
    return {"pixel_values": torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))}


def plain_images(count, seed):
    return {"input": images(count, seed)["pixel_values"]}


def tokens(count, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (count, 7), generator=generator)
    lengths = torch.randint(2, 8, (count, 1), generator=generator)
    mask = (torch.arange(7) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def seq2seq(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return {**tokens(count, seed), "decoder_input_ids": torch.randint(3, 60, (count, 4), generator=generator)}


def both(count, seed):
    return {**tokens(count, seed), **images(count, seed)}


def sequences(count, seed):
    return {"input": torch.randn(count, 5, 4, generator=torch.Generator().manual_seed(seed))}


def attention_rows(count, seed):
    x = torch.randn(count, 5, 4, generator=torch.Generator().manual_seed(seed))
    return {"query": x, "key": x * 2, "value": x + 1}


class Encoding(Encoder):
    def forward(self, input):  # noqa: A002
        return super().forward(input)


class Recurrent(nn.LSTM):
    """Without its final states, which have the rows in their second dimension."""

    def __init__(self):
        super().__init__(4, 3, batch_first=True)

    def forward(self, input):  # noqa: A002
        return super().forward(input)[0]


T = transformers
TEXT = {"vocab_size": 60, "max_position_embeddings": 16}
T5 = {
    "vocab_size": 60,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
CLIP = {
    "text_config": {**SMALL, **TEXT, "eos_token_id": 2},
    "vision_config": VISION,
    "projection_dim": 8,
}

MODELS = {
    "linear": (lambda: nn.Linear(4, 3), vectors),
    "encoder": (Encoding, vectors),
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), plain_images),  # noqa: E501
    "transformer": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2, enable_nested_tensor=False), lambda c, s: {"src": sequences(c, s)["input"]}),  # noqa: E501
    "lstm": (Recurrent, sequences),
    "attention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), attention_rows),
    "bert": (lambda: T.BertModel(T.BertConfig(**SMALL, **TEXT)), tokens),
    "bert for classification": (lambda: T.BertForSequenceClassification(T.BertConfig(**SMALL, **TEXT)), tokens),
    "distilbert": (lambda: T.DistilBertModel(T.DistilBertConfig(vocab_size=60, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=16)), tokens),  # noqa: E501
    "vit": (lambda: T.ViTModel(T.ViTConfig(**VISION)), images),
    "clip text": (lambda: T.CLIPTextModel(T.CLIPTextConfig(**CLIP["text_config"])), tokens),
    "clip vision": (lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**VISION)), images),
    "t5 encoder": (lambda: T.T5EncoderModel(T.T5Config(**T5)), tokens),
    "t5": (lambda: T.T5Model(T.T5Config(**T5, use_cache=False)), seq2seq),
}  # fmt: skip


def made(name):
    torch.manual_seed(0)
    build, rows = MODELS[name]
    module = frozen(build())
    return module, copy.deepcopy(module), rows


def joined(one, other):
    return {name: torch.cat([one[name], other[name]]) for name in one}


def taken(batch, places):
    return {name: value[places] for name, value in batch.items()}


@pytest.mark.parametrize("name", MODELS)
def test_cached_is_plain(name):
    """Whatever share of a batch is stored, the answer is the plain module's, and nothing is bypassed."""
    module, plain, rows = made(name)
    cached_module(module)
    old, new = rows(6, 1), rows(6, 2)
    with torch.no_grad(), Quiet():
        for batch in (
            old,  # 0 %
            old,  # 100 %
            joined(taken(old, [0, 1, 2]), taken(new, [0])),  # 75 %
            joined(taken(new, [1, 2, 3]), taken(old, [5])),  # 25 %
            taken(joined(old, new), [11, 3, 7, 3, 0, 11]),  # mixed, with duplicates
            taken(old, [4]),
            taken(joined(old, new), torch.randperm(12).tolist()),
        ):
            assert_same(module(**batch), plain(**batch), 2e-4)
    assert bypassed(module) == 0, cache_of(module).stats.reasons
    assert computed(module) == 12
    assert hits(module) > 12


@pytest.mark.parametrize("name", ["bert", "distilbert", "t5 encoder"])
def test_tokens_key_is_plain_where_the_mask_is_one(name):
    """With key="tokens" the answer is the plain module's at every token, whatever the padding; padding is zero."""
    module, plain, rows = made(name)
    cached_module(module, key="tokens")
    batch = rows(8, 1)
    with torch.no_grad(), Quiet():
        for places in ([0, 1, 2, 3], [3, 2, 1, 0], [0], [1, 4], [5, 6, 7], list(range(8)), [7, 0]):
            call = taken(batch, places)
            width = int(call["attention_mask"].sum(1).max())
            call = {key: value[:, :width] for key, value in call.items()}
            found, expected = module(**call).last_hidden_state, plain(**call).last_hidden_state
            mask = call["attention_mask"].bool()
            assert found.shape == expected.shape
            assert_same(found[mask], expected[mask], 2e-4)
            assert not found[~mask].any()
    assert computed(module) <= 8 + 4


@pytest.mark.parametrize("name", ["bert", "vit", "t5"])
def test_other_outputs_of_transformers(name):
    """output_hidden_states, output_attentions and return_dict give what the plain model gives."""
    module, plain, rows = made(name)
    for m in (module, plain):
        m.set_attn_implementation("eager")
    cached_module(module)
    batch = rows(4, 1)
    with torch.no_grad(), Quiet():
        for options in (
            {"output_hidden_states": True},
            {"output_attentions": True},
            {"output_attentions": True, "output_hidden_states": True},
            {"return_dict": False},
            {},
        ):
            for _ in range(2):
                assert_same(module(**batch, **options), plain(**batch, **options), 2e-4)
    assert bypassed(module) == 0, cache_of(module).stats.reasons


def test_t5_with_its_own_cache_of_keys_and_values():
    """A model that returns an object of its own (a KV cache) is bypassed, not broken."""
    torch.manual_seed(0)
    module = frozen(T.T5Model(T.T5Config(**T5)))
    plain = copy.deepcopy(module)
    cached_module(module)
    batch = seq2seq(3, 1)
    with Quiet():
        for _ in range(2):
            assert_same(module(**batch).last_hidden_state, plain(**batch).last_hidden_state)


def test_clip_model():
    """CLIP's two towers interact (its logits are a table of all pairs): bypassed, and right; its towers are cached."""
    torch.manual_seed(0)
    module = frozen(T.CLIPModel(T.CLIPConfig(**CLIP)))
    plain = copy.deepcopy(module)
    cached_module(module)
    cached_module(module.vision_model)
    with torch.no_grad(), Quiet():
        for count, seed in ((4, 1), (4, 1), (3, 2)):
            batch = both(count, seed)
            found, expected = module(**batch), plain(**batch)
            assert_same(found.logits_per_image, expected.logits_per_image, 2e-4)
    assert hits(module) == 0
    assert hits(module.vision_model) >= 4


# --- each ingredient of a namespace, changed once -------------------------------------------------------


class Ingredients(Encoder):
    def __init__(self):
        super().__init__()
        self.config = {"gain": 1.0}

    def forward(self, x):
        return super().forward(x) * self.config["gain"]


class Ingredients2(Ingredients):
    def forward(self, x):
        return super().forward(x) * 1.0


def hooked(m):
    m.norm.register_forward_hook(lambda m, a, out: out)


def parametrized(m):
    class Same(nn.Module):
        def forward(self, w):
            return w

    nn.utils.parametrize.register_parametrization(m.last, "weight", Same())


def ones(m):
    nn.init.ones_(m.weight), nn.init.ones_(m.bias)


INGREDIENTS = {
    "weight": lambda m: m.last.weight.data.add_(1e-3),
    "one bit of a weight": lambda m: m.last.weight.data.copy_(torch.nextafter(m.last.weight, m.last.weight + 1)),
    "buffer": lambda m: m.shift.add_(1),
    "attribute": lambda m: setattr(m, "scale", 2.0),
    "type of an attribute": lambda m: setattr(m, "scale", 1),
    "config": lambda m: m.config.update(gain=2.0),
    "child attribute": lambda m: setattr(m.norm, "eps", 1e-3),
    "hook": hooked,
    "parametrization": parametrized,
    "child swapped": lambda m: setattr(m, "drop", nn.Identity()),
    "tied": lambda m: setattr(m.norm, "bias", m.first.bias),
    "dtype": lambda m: m.double(),
    "shape": lambda m: setattr(m, "last", frozen(nn.Linear(8, 2)).to("meta").to_empty(device="cpu").apply(ones)),
}


@pytest.mark.parametrize("name", INGREDIENTS)
def test_ingredient_of_the_module(name):
    """Each part of what a module is changes its namespace, and changes nothing while it is the same."""
    torch.manual_seed(0)
    base = frozen(Ingredients())
    one, same, other = (cached_module(copy.deepcopy(base)) for _ in range(3))
    before = cache_of(one).namespace
    assert cache_of(same).namespace == before
    INGREDIENTS[name](other)
    with Quiet():
        assert cache_of(other).namespace != before
        INGREDIENTS[name](one)
        assert cache_of(one).namespace != before
        assert cache_of(one).namespace == cache_of(other).namespace


def test_ingredients_around_the_module():
    """Class, version, key, prepare, per_row and context are part of the namespace; the store is not."""
    torch.manual_seed(0)
    base, derived = frozen(Ingredients()), frozen(Ingredients2())
    derived.load_state_dict(base.state_dict())

    def name(module=base, **options):
        return cache_of(cached_module(copy.deepcopy(module), **options)).namespace

    names = [
        name(),
        name(derived),
        name(version="1"),
        name(key="text"),
        name(key="path"),
        name(key=keys.path(check="name")),
        name(key="tokens"),
        name(key=lambda row: 1),
        name(key=lambda row: 2),
        name(prepare=lambda x: x),
        name(prepare=lambda x: x + 1),
        name(per_row=False),
    ]
    for context in (torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", dtype=torch.float16)):
        with context:
            names.append(name())
    torch.set_default_dtype(torch.float64)
    try:
        names.append(name())
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(set(names)) == len(names)
    assert name(store=MemoryStore(1 << 20)) == names[0]
    with torch.no_grad():
        assert name() == names[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert name() == names[0]
    torch.set_num_threads(threads)
