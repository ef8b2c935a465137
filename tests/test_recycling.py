"""The verbs of recycling: what they refuse, what they tell, and what they undo."""

import copy
import inspect
import os
import pickle
import warnings

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

import modcache
from modcache import (
    CacheWarning,
    CutError,
    MemoryStore,
    UsageError,
    UsageTypeError,
    cache_of,
    is_cached,
    recycle,
    uncached,
)
from modcache.stores.disk.upkeep import listing


class Small(nn.Module):
    """A stem, a trunk, a tower beside it, and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.low, self.mid, self.head = (nn.Linear(4, 4) for _ in range(4))
        self.tower, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)
        self.rows = 0

    def forward(self, x, labels=None):
        side = self.tower(x)
        out = self.head(self.mid(self.low(self.drop(self.stem(x)).relu())) + side)
        return out if labels is None else (out, (out.sum(1) - labels).square().mean())


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Small()


BATCH = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))


def test_a_cut_that_was_not_probed_says_so(model):
    """Before the first batch, the cut is known by its name; the namespace is not known."""
    recycle(model, at="mid")
    assert not cache_of(model).cut.probed
    assert "not probed" in str(cache_of(model).cut)
    with pytest.raises(CutError, match=r"mid.*not probed"):
        cache_of(model).namespace  # noqa: B018 - asking is the test
    with pytest.raises(CutError, match="batch="):
        cache_of(model).contains(BATCH)


def test_the_cut_tells_its_facts(model):
    """What is frozen, stored, in the key, and beside the trunk."""
    recycle(model, at="mid", batch=(BATCH,))
    cut = cache_of(model).cut
    assert cut.frozen == ("low.bias", "low.weight", "stem.bias", "stem.weight")
    assert (cut.tied, cut.bystanders, cut.inputs) == ((), ("tower",), ("x",))
    assert [(one.shape, one.dtype, one.row_bytes) for one in cut.stored] == [((4,), "float32", 16)]
    assert cut.row_bytes == 16
    assert "bystanders: tower" in str(cut)
    assert repr(cache_of(model)).startswith("Cache(Small from mid")
    assert cache_of(modcache.cached_module(nn.Linear(2, 2), freeze=True)).cut is None


def test_a_manifest_names_the_model_and_its_cut(model, tmp_path):
    """What lies in a directory tells of which model it is the trunk, and where that was cut."""
    recycle(model, at="mid", batch=(BATCH,), store=str(tmp_path))
    model(BATCH)
    recycle(model, at="low", batch=(BATCH,))
    model(BATCH)
    manifest = cache_of(model).manifest
    cache_of(model).close()
    assert (manifest["class"].rpartition(".")[2], manifest["cut"]) == ("Small", "low")
    found = {facts.manifest["cut"]: facts for facts in listing(tmp_path).namespaces}
    assert {facts.cls for facts in found.values()} == {manifest["class"]}
    assert "cut low -> mid" in found["mid"].differs
    assert "cut mid -> low" in found["low"].differs


class Again(nn.Module):
    """A layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.again = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.again(self.again(self.stem(x)).relu())


def test_a_manifest_tells_a_later_call_of_the_cut():
    """Where a submodule is called several times, the number of the call stands beside its name."""
    model = Again()
    recycle(model, at="again", call=1, batch=(BATCH,))
    assert (cache_of(model).manifest["cut"], cache_of(model).manifest["call"]) == ("again", 1)


def test_the_handle_takes_the_arguments_of_the_model(model):
    """Rows are looked up, explained, forgotten and dropped by what the model is called with."""
    recycle(model, at="mid", batch=(BATCH,))
    model(BATCH)
    cache = cache_of(model)
    assert cache.contains(BATCH) == [True] * 6
    assert cache.contains(x=BATCH + 1) == [False] * 6
    assert all(one.hit for one in cache.explain(BATCH))
    assert cache.forget(BATCH[:2]) == 2
    assert cache.contains(BATCH) == [False] * 2 + [True] * 4
    assert cache.recheck() is False
    assert cache.clear() == 4
    assert len(cache.namespace) == 32
    cache.flush()
    cache.close()
    model(BATCH)
    assert cache.stats.bypassed == 6


def test_flags_and_gradients_are_put_back(model):
    """`uncached` undoes class, gradients and modes, also where some were off before."""
    model.low.weight.requires_grad_(False)
    model.stem.eval()
    before = {name: value.requires_grad for name, value in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    recycle(model, at="mid", batch=(BATCH,))
    assert is_cached(model)
    assert not model.drop.training
    uncached(model)
    assert type(model) is Small
    assert {name: value.requires_grad for name, value in model.named_parameters()} == before
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_the_cut_moves(model):
    """Moved upwards, more is frozen; moved down, what was frozen above learns again; rows of both cuts stay."""
    store = MemoryStore()
    recycle(model, at="low", batch=(BATCH,), store=store)
    model(BATCH)
    recycle(model, at="mid", batch=(BATCH,))
    model(BATCH)
    assert cache_of(model).store is store
    assert len(store.namespaces()) == 2
    assert "low.weight" in cache_of(model).cut.frozen
    recycle(model, at="low", batch=(BATCH,))
    assert model.low.weight.requires_grad
    assert not model.stem.weight.requires_grad
    before = cache_of(model).stats.computed
    model(BATCH)
    assert cache_of(model).stats.computed == before
    uncached(model)
    assert all(value.requires_grad for value in model.parameters())


def test_a_probe_that_fails_leaves_the_model_as_it_was(model):
    """With `batch=`, a refusal changes nothing."""
    with pytest.raises(CutError, match="not called"):
        recycle(Unused(), at="spare", batch=(BATCH,))
    with pytest.raises(CutError, match="call=3"):
        recycle(model, at="mid", call=3, batch=(BATCH,))
    assert type(model) is Small
    assert not is_cached(model)
    assert all(value.requires_grad for value in model.parameters())
    assert all(module.training for module in model.modules())


class Unused(Small):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(4, 4)


OPTIONS = [
    ({"at": 3}, UsageTypeError, "at must be the name"),
    ({"at": "mid", "call": -1}, UsageError, "negative"),
    ({"at": "mid", "call": True}, UsageTypeError, "whole number"),
    ({"at": "mid", "extra": 1}, UsageTypeError, "extra must be"),
    ({"at": "mid", "prepare": len}, UsageError, "prepare"),
    ({"at": "mid", "per_row": False}, UsageError, "per_row"),
    ({"at": "mid", "freeze": True}, UsageError, "frozen anyway"),
    ({"at": "mid", "exta": True}, UsageTypeError, "did you mean extra="),
    ({"at": "mid", "verify": 3}, UsageError, "verify"),
    ({"at": "mdi"}, CutError, "nearest names are mid"),
    ({"at": ""}, CutError, "cut at itself"),
    ({"at": "stem"}, None, ""),
]


@pytest.mark.parametrize(("options", "error", "says"), OPTIONS, ids=[str(options) for options, *_ in OPTIONS])
def test_options_that_cannot_be_right(model, options, error, says):
    """Misuse is told at once, in the words of the user."""
    if error is None:
        with pytest.raises(CutError, match="nothing to store"):
            recycle(model, **options, batch=(BATCH,))
    else:
        with pytest.raises(error, match=says):
            recycle(model, **options)
    assert type(model) is Small


def test_layers_of_caching_do_not_mix(model):
    """A cached model is not recycled, and a recycled one is not cached as a whole."""
    with pytest.raises(CutError, match="uncached"):
        recycle(modcache.cached_module(copy.deepcopy(model), freeze=True), at="mid")
    with pytest.raises(UsageError, match="recycled"):
        modcache.cached_module(recycle(model, at="mid"))
    with pytest.raises(UsageTypeError):
        recycle(Small, at="mid")


def test_copies_and_pickles(model):
    """A copy shares the store and is undone alone; a pickle finds out anew."""
    recycle(model, at="mid", batch=(BATCH,))
    wanted = model.eval()(BATCH)
    other, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for one in (other, again):
        assert torch.equal(one(BATCH), wanted)
        assert cache_of(one).cut.probed
        assert all(value.requires_grad for value in uncached(one).parameters())
    assert cache_of(model).cut.probed
    assert not model.stem.weight.requires_grad


def test_a_warning_stands_at_the_users_line():
    """What is frozen by a tie is warned about where the model was called or recycled."""

    class Tied(Small):
        def __init__(self):
            super().__init__()
            self.head.weight = self.stem.weight

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CacheWarning)
        recycle(Tied(), at="mid", batch=(BATCH,))
        line = inspect.currentframe().f_lineno - 1
    (one,) = [one for one in caught if issubclass(one.category, CacheWarning)]
    assert "head.weight (tied to stem.weight)" in str(one.message)
    assert (one.filename, one.lineno) == (__file__, line)


def test_labels_and_other_kinds_of_calls(model):
    """Labels are not in the key; a call without them is of another kind, with rows of its own."""
    recycle(model, at="mid")
    model(BATCH, labels=torch.zeros(6))
    model(BATCH, labels=torch.ones(6))
    assert (cache_of(model).stats.computed, cache_of(model).stats.hits) == (6, 6)
    model(BATCH)
    assert cache_of(model).stats.computed == 12


# --- a BERT ---------------------------------------------------------------------------------------------


def bert(kind=BertForSequenceClassification):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    return kind(config).double()


def texts(lengths, width, labels=True):
    generator = torch.Generator().manual_seed(sum(lengths))
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, 60, (len(lengths), 20), generator=generator)[:, :width] * mask
    more = {"labels": torch.randint(0, 3, (len(lengths),), generator=generator)} if labels else {}
    return {"input_ids": ids, "attention_mask": mask, **more}


def frozen(model, layers):
    for module in (model.bert.embeddings, *model.bert.encoder.layer[:layers]):
        module.requires_grad_(False).eval()
    return model


def test_a_bert_trains_as_with_a_frozen_trunk():
    """Losses and gradients are the same bits as those of the un-recycled model whose lower layers are frozen."""
    plain, model = frozen(bert().train(), 2), recycle(bert().train(), at="bert.encoder.layer.2")
    for batch in (texts([5, 7, 3], 8), texts([5, 7, 3], 8), texts([2, 4], 4), texts([6, 6, 6, 6], 6)):
        torch.manual_seed(1)
        wanted = plain(**batch)
        wanted.loss.backward()
        torch.manual_seed(1)
        found = model(**batch)
        found.loss.backward()
        assert torch.equal(found.loss, wanted.loss)
        for (name, one), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None), name
            assert one.grad is None or torch.equal(one.grad, other.grad), name


def test_token_rows_hit_whatever_their_padding():
    """With key="tokens", a text that was padded to another length is served, and the result is the same."""
    plain, model = bert().eval(), recycle(bert().eval(), at="bert.encoder.layer.2", key="tokens")
    model(**texts([3, 5, 4], 6, labels=False))
    computed = cache_of(model).stats.computed
    for width in (5, 6, 9):
        batch = texts([3, 5, 4], width, labels=False)
        torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, rtol=0, atol=1e-12)
    assert cache_of(model).stats.computed == computed


class MeanOfAll(nn.Module):
    """A head that looks at masked positions."""

    def __init__(self):
        super().__init__()
        self.table, self.low, self.head = nn.Embedding(60, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, input_ids, attention_mask):
        return self.head(self.low(self.table(input_ids)) + 0).mean(1)


def test_padding_that_matters_is_refused():
    """A head that looks at masked positions is not given zeros there; token by token it need not be asked."""
    batch = texts([3, 5, 4], 6, labels=False)
    with pytest.raises(CutError, match="masked positions"):
        recycle(MeanOfAll(), at="head", key="tokens", batch=batch)
    recycle(MeanOfAll(), at="head", batch=batch)
    recycle(bert(BertForTokenClassification), at="bert.encoder.layer.2", key="tokens", batch=batch)


# --- processes ------------------------------------------------------------------------------------------


@pytest.fixture
def one_process(monkeypatch):
    """A group of this process alone."""
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    monkeypatch.setitem(os.environ, "MASTER_ADDR", "127.0.0.1")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_distributed_data_parallel(model):
    """Recycled before, a wrapped model trains; late freezing and recycling inside are refused with the way out."""
    wrap = nn.parallel.DistributedDataParallel
    late, inside = copy.deepcopy(model), copy.deepcopy(model)
    recycle(model, at="mid", batch=(BATCH,))
    wrapped = wrap(model)
    for _ in range(2):
        wrapped(BATCH).sum().backward()
    assert cache_of(model).stats.hits == 6
    outer = wrap(recycle(late, at="mid"))
    with pytest.raises(CutError, match=r"batch=\.\.\."):
        outer(BATCH)
    outer = wrap(inside)
    with pytest.raises(CutError, match="wrap the model then"):
        recycle(inside, at="mid", batch=(BATCH,))
    with pytest.raises(CutError, match="inside of it"):
        recycle(outer, at="module.mid")


# --- models in models, and strange calls ----------------------------------------------------------------


class Outer(nn.Module):
    """Holds a model that is recycled by itself."""

    def __init__(self, inner):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 4), inner, nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.inner(self.first(x).tanh()))


@pytest.mark.parametrize("at", ["inner", "last"])
def test_a_recycled_model_inside_of_a_recycled_one(model, at):
    """Both cuts work, whether the inner model is head or trunk of the outer one."""
    plain = Outer(copy.deepcopy(model)).eval()
    outer = Outer(recycle(model, at="mid"))
    outer.load_state_dict(plain.state_dict())
    recycle(outer.eval(), at=at)
    for rows in (BATCH, BATCH.flip(0), BATCH[:3]):
        torch.testing.assert_close(outer(rows), plain(rows))
    assert cache_of(outer).stats.computed == 6
    assert cache_of(model).stats.hits > 0 or at == "last"


def test_a_model_that_calls_itself(model):
    """A forward that runs the model's own forward again is one call."""

    class Twice(Small):
        def forward(self, x, again=True):
            out = super().forward(x)
            return out + self(x, again=False) if again else out

    one = Twice().eval()
    wanted = one(BATCH)
    recycle(one, at="low", batch=(BATCH,))
    for _ in range(2):
        torch.testing.assert_close(one(BATCH), wanted, rtol=0, atol=0)
    assert cache_of(one).stats.hits == 6


def test_modes_are_those_that_the_model_would_have(model):
    """`train` and `eval` of a recycled model leave the trunk in eval; undone, it has the mode of the rest."""
    recycle(model, at="mid", batch=(BATCH,))
    assert model.train().head.training
    assert not model.drop.training
    assert not uncached(model.eval()).drop.training
    recycle(model, at="mid", batch=(BATCH,)).train()
    assert all(module.training for module in uncached(model).modules())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_call_runs_in_full(model):
    """`torch.jit.trace` and `torch.func` see the whole model; before a probe, where it would learn, that is refused."""
    wanted = copy.deepcopy(model).eval()(BATCH)
    recycle(model.eval(), at="mid")
    with pytest.raises(CutError, match="batch="):
        torch.func.vmap(model)(BATCH[:, None])
    model(BATCH)
    torch.testing.assert_close(torch.jit.trace(model, (BATCH,), check_trace=False)(BATCH), wanted)
    torch.testing.assert_close(torch.func.vmap(model)(BATCH[:, None])[:, 0], wanted)


def test_numbers_that_change_with_each_call():
    """A step number among the arguments makes each call one of another kind, and that is said."""

    class Stepped(Small):
        def forward(self, x, step):
            return super().forward(x) + step

    stepped = recycle(Stepped().eval(), at="mid")
    with pytest.raises(CutError, match="another one in each call"):
        for step in range(100):
            stepped(BATCH, step)


def test_a_single_row_is_never_guessed_from(model):
    """The first batch must have two different rows; later, a row alone is of a known kind, or runs in full."""
    recycle(model.eval(), at="mid")
    for rows in (BATCH[:1], BATCH[:1].expand(3, 4)):
        with pytest.raises(CutError, match="first batch"):
            model(rows)
    model(BATCH)
    plain = uncached(copy.deepcopy(model))
    assert torch.equal(model(BATCH[:1]), model(BATCH[:1]))
    labels = torch.zeros(1)
    with torch.no_grad():
        assert torch.equal(model(BATCH[:1], labels)[1], plain(BATCH[:1], labels)[1])
    assert cache_of(model).stats.bypassed == 1
    with pytest.raises(CutError, match="one row"):
        model(BATCH[:1], labels)


def test_a_way_that_only_a_row_alone_takes():
    """A branch that nobody looked at is looked at: a row that comes out otherwise is refused, not served."""

    class Branching(Small):
        def forward(self, x):
            h = self.stem(x)
            if x.abs().max() > 100:
                h = self.drop(h) * 2
            return self.head(self.mid(self.low(h)))

    branching = recycle(Branching().eval(), at="mid", batch=(BATCH,))
    large = BATCH.clone()
    large[2] = 1000
    with pytest.raises(CutError, match="decides by values"):
        branching(large)


def test_a_model_without_values_is_refused(model):
    """On the meta device there is nothing that could be looked at."""
    model.to("meta")
    with pytest.raises(CutError, match="meta device"):
        recycle(model, at="mid", batch=(BATCH.to("meta"),))


def edited(trunk):
    trunk.low.weight[1, 2] = 3.0


def swapped(trunk):
    trunk.low.weight = nn.Parameter(torch.eye(4), requires_grad=False)


def hooked(trunk):
    trunk.low.register_forward_hook(lambda module, args, output: output + 1)


def exchanged(trunk):
    trunk.low = nn.Linear(4, 4).requires_grad_(False)


def in_training(trunk):
    trunk.drop.train()


@pytest.mark.parametrize("change", [edited, swapped, hooked, exchanged, in_training])
def test_a_resumed_call_looks_at_the_trunk_once_and_sees_all(model, change, monkeypatch):
    """One look at the trunk answers for a call of stored rows, and what was changed between two calls is seen in it."""
    recycle(model.eval(), at="mid", batch=(BATCH,))
    looks, check = [], modcache.fingerprint.Identity.check
    monkeypatch.setattr(modcache.fingerprint.Identity, "check", lambda *args: looks.append(args) or check(*args))
    with torch.no_grad():
        model(BATCH)
        looks.clear()
        model(BATCH)
        assert len(looks) == 1
        change(model)
        found = model(BATCH)
        plain = uncached(copy.deepcopy(model)).eval()
        torch.testing.assert_close(found, plain(BATCH))


def test_what_is_frozen_is_moved_no_more(model):
    """An optimizer with momentum and weight decay, in the middle of training, leaves the trunk alone."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(4):
        if step == 2:
            recycle(model, at="mid", batch=(BATCH,))
            before = model.low.weight.clone()
        optimizer.zero_grad(set_to_none=False)
        model(BATCH).sum().backward()
        optimizer.step()
    assert torch.equal(model.low.weight, before)
    assert cache_of(model).stats.hits > 0


def test_a_closed_cache_gives_its_store_back(model, tmp_path):
    """The rows of a directory stay there, and nothing of it is held."""
    recycle(model.eval(), at="mid", batch=(BATCH,), store=tmp_path)
    expected = model(BATCH)
    store = cache_of(model).store
    cache_of(model).close()
    assert cache_of(model).store is not store
    torch.testing.assert_close(model(BATCH), expected)


class Dropped(nn.Module):
    """Skips layers in some steps of training, as layer drop does."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.skipped = ()

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            if not (self.training and number in self.skipped):
                x = layer(x)
        return torch.dropout(x, 0.1, self.training)


@pytest.mark.parametrize(("skipped", "why"), [((1, 2), "layers.1 was not called"), ((1,), "layer drop")])
def test_a_call_in_which_the_cut_is_dropped_is_refused_as_such(skipped, why):
    """When the cut is skipped in a call, the reason is that, and not that a value goes around it."""
    model = recycle(Dropped(), at="layers.1", batch=(torch.eye(4),)).train()
    model.skipped = skipped
    with pytest.raises(CutError, match=why) as raised:
        model(torch.eye(4))
    assert "extra=True" not in str(raised.value)
    model.skipped = ()
    assert model(torch.eye(4)).requires_grad


class Dense(nn.ModuleDict):
    """A block that is a mapping of layers, and is called."""

    def forward(self, x):
        for layer in self.values():
            x = x + layer(x)
        return x


def test_a_list_of_modules_that_has_a_forward_is_a_module():
    """What is called can be a cut, whatever it derives from; what is not says so."""
    model = nn.Sequential(nn.Linear(3, 3), Dense({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}), nn.ModuleList()).eval()
    plain = copy.deepcopy(model[:2])
    recycled = recycle(model[:2], at="1")
    batch = torch.randn(4, 3)
    for _ in range(2):
        assert torch.equal(recycled(batch), plain(batch))
    assert cache_of(recycled).stats.hits == 4
    with pytest.raises(CutError, match="2 is a ModuleList, which is never called"):
        recycle(model, at="2")


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.low, self.top = torch.jit.script(nn.Sequential(nn.Linear(4, 4))), nn.Linear(4, 4)

    def forward(self, x):
        return self.top(self.low(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_cut_inside_of_torchscript_is_refused():
    """What is compiled cannot be parted, and that is said."""
    with pytest.raises(CutError, match="low is TorchScript"):
        recycle(Scripted(), at="low.0")


def test_a_class_derived_of_the_class_of_a_recycled_model(model):
    """Its instances are plain models: nobody has asked for them to be recycled."""
    recycle(model.eval(), at="mid", batch=(BATCH,))
    cls = type(model)

    class Derived(cls):
        """As somebody may derive of whatever class a model has."""

    plain = Derived().eval()
    plain.load_state_dict(model.state_dict())
    assert not is_cached(plain)
    torch.testing.assert_close(plain(BATCH), model(BATCH))
