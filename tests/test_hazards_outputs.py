"""What comes back is what the module gives: structure, dtype, shape, device, and private memory, on a miss as on a hit."""  # noqa: E501

from __future__ import annotations

import collections
import dataclasses
import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from modcache import CacheWarning, MemoryStore, cache_of, cached_module
from tests.hazards import Quiet, agree, assert_same, bypassed, computed, hits, pair

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Out(NamedTuple):
    a: torch.Tensor
    b: Any


@dataclasses.dataclass
class Data:
    a: torch.Tensor
    b: Any = None
    note: str = "x"

    def __post_init__(self):
        if isinstance(self.note, str) and self.note == "forbidden":
            raise ValueError("made by __init__")


@dataclasses.dataclass(frozen=True)
class FrozenData:
    a: torch.Tensor
    k: int = 3


def model_output(x):
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(last_hidden_state=x[:, None], pooler_output=x, hidden_states=(x, x * 2))


def late_model_output(x):
    """Its fields are set in another order than they are declared in."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    output = BaseModelOutputWithPooling(last_hidden_state=x[:, None], hidden_states=(x, x * 2))
    output["pooler_output"] = x + 1
    return output


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("table", torch.randn(8, 4))
        self.stash = None

    def forward(self, x):
        return self.function(x)


TREES = {
    "tensor": lambda x: x * 2,
    "vector": lambda x: x.sum(1),
    "tuple": lambda x: (x, x * 2),
    "list": lambda x: [x, x * 2],
    "one-tuple": lambda x: (x,),
    "nested": lambda x: {"a": [x, (x * 2, {"b": x})]},
    "dict": lambda x: {"b": x, "a": x * 2},
    "int keys": lambda x: {0: x, 1: x * 2, True: x, None: x},  # noqa: F601
    "ordered": lambda x: collections.OrderedDict(a=x, b=x),
    "namedtuple": lambda x: Out(x, x * 2),
    "maximum": lambda x: x.max(1),
    "sorted": lambda x: {"a": torch.sort(x, 1)},
    "nested namedtuple": lambda x: Out(x, Out(x, None)),
    "dataclass": lambda x: Data(x, x * 2),
    "frozen dataclass": FrozenData,
    "model output": model_output,
    "late model output": late_model_output,
    "none": lambda x: (x, None),
    "constants": lambda x: (x, 3, 2.5, True, "text", None, -0.0, 10**30),
    "inf": lambda x: (x, float("inf"), float("-inf")),
    "ints": lambda x: x.long(),
    "bools": lambda x: x > 0,
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "complex": lambda x: torch.complex(x, x),
    "mixed dtypes": lambda x: (x.half(), x.long(), x > 0, x.double()),
    "zero width": lambda x: (x[:, :0], x),
    "empty tuple": lambda x: (x, ()),
    "empty dict": lambda x: (x, {}),
    "five dims": lambda x: x[:, :, None, None, None].expand(-1, -1, 2, 2, 2),
    "same twice": lambda x: (lambda y: (y, y))(x * 2),  # noqa: PLC3002
    "transposed": lambda x: x[:, :, None].expand(-1, -1, 3).transpose(1, 2),
    "nan": lambda x: torch.where(x > 0, float("nan"), x),
    "infinite": lambda x: torch.where(x > 0, float("inf"), x),
}


@pytest.mark.parametrize("name", TREES)
def test_trees(name):
    """Every tree of outputs comes back on a miss, on a hit and on a partial hit."""
    cached, plain = pair(Apply(TREES[name]))
    agree(cached, plain, X)
    agree(cached, plain, torch.cat([X[3:], X[:3] + 1, X[:1]]))
    agree(cached, plain, X[2:3])
    assert bypassed(cached) == 0
    assert hits(cached) >= 12


NOT_ROWS = {
    "loss": lambda x: (x, x.mean()),
    "time major": lambda x: x[:, None].expand(-1, 5, -1).transpose(0, 1),
    "attention over tokens": lambda x: torch.ones(9, 3),
    "object": lambda x: (x, object()),
    "sparse": lambda x: x.to_sparse(),
    "scalar": lambda x: x.sum(),
    "set": lambda x: (x, {1, 2}),
    "generator": lambda x: (x, iter([1])) and (x, range(3)),
}


@pytest.mark.parametrize("name", [name for name in NOT_ROWS if name not in ("object", "generator")])
def test_outputs_that_are_no_rows(name):
    """An output that cannot be parted into rows is returned as it is, with one warning that names the leaf."""
    cached, plain = pair(Apply(NOT_ROWS[name]))
    with pytest.warns(CacheWarning, match="output") as seen:
        for _ in range(3):
            found, expected = cached(X), plain(X)
            if name == "sparse":
                found, expected = found.to_dense(), expected.to_dense()
            assert_same(found, expected)
    assert len(seen) == 1
    assert computed(cached) == 0


def test_time_major_with_as_many_tokens_as_rows():
    """A (T, B, D) output with T == B is found out."""
    function = lambda x: x[:, None].expand(-1, len(x), -1).transpose(0, 1) * torch.arange(1, len(x) + 1)[:, None, None]
    cached, plain = pair(Apply(function))
    with pytest.warns(CacheWarning):
        agree(cached, plain, X)
    agree(cached, plain, X[:4])


def test_time_major_with_fixed_tokens():
    """A (T, B, D) output with a fixed T is right whatever the batch: also when T is the batch's size."""
    function = lambda x: torch.stack([x * t for t in range(1, 7)])
    cached, plain = pair(Apply(function))
    with Quiet():
        agree(cached, plain, X)
        agree(cached, plain, X[:4])
        agree(cached, plain, X[:1])
        agree(cached, plain, X.flip(0))


def test_time_major_filled_by_single_rows():
    """A (1, B, D) output of single rows is not taken for rows when batches come."""
    function = lambda x: (x * 2)[None]
    cached, plain = pair(Apply(function))
    with Quiet():
        for row in X:
            agree(cached, plain, row[None])
        agree(cached, plain, X)


def test_scalars_per_batch():
    """A number in the output that depends on the batch is found out, like a tensor of one element."""
    for function in (
        lambda x: (x, len(x)),
        lambda x: {"x": x, "mean": float(x.mean())},
        lambda x: (x, x.mean().reshape(1)),
        lambda x: (x, str(len(x))),
        lambda x: (x, torch.tensor([len(x)] * len(x))),
    ):
        cached, plain = pair(Apply(function))
        with Quiet():
            agree(cached, plain, X)
            agree(cached, plain, X[:3])
            agree(cached, plain, X[:1])
            agree(cached, plain, X)


def test_constant_that_depends_on_the_row():
    """A structure or constant that follows the row: rows of several layouts are computed together."""
    cached, plain = pair(Apply(lambda x: (x, "big" if float(x.abs().max()) > 1.5 else "small")))
    with Quiet():
        for at in range(6):
            agree(cached, plain, X[at : at + 1])
        agree(cached, plain, X)
        agree(cached, plain, X[:2])


def test_rows_of_several_widths():
    """Rows whose width depends on the longest of the batch are right in every mixture."""

    class Pads(nn.Module):
        def forward(self, texts):
            width = max(map(len, texts))
            return torch.tensor([[float(ord(c)) for c in t.ljust(width)] for t in texts])

    cached, plain = pair(Pads())
    with Quiet():
        for texts in (["a"], ["bbb"], ["a", "bbb"], ["a"], ["cc", "a"], ["bbb", "cc", "a"], ["d", "e"], ["a", "d"]):
            agree(cached, plain, texts)


def test_ragged_rows_without_padding():
    """A module that gives another width for each call still answers as the plain one."""
    cached, plain = pair(Apply(lambda x: torch.ones(len(x), 1 + int(x.abs().max()))))
    with Quiet():
        for x in (X[:1], X[1:2] * 3, X[:2] * 3, X, X * 5, X[:1]):
            agree(cached, plain, x)


# --- memory ---------------------------------------------------------------------------------------------


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if dataclasses.is_dataclass(value) and not isinstance(value, dict):
        return tensors(list(vars(value).values()))
    if isinstance(value, dict):
        return tensors(list(value.values()))
    return [t for item in value for t in tensors(item)] if isinstance(value, tuple | list) else []


def overlap(one, other):
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() and one.numel() and other.numel()


def test_calls_share_no_memory():
    """Whatever is returned may be written to: no later call sees it."""
    cached, plain = pair(Apply(lambda x: (x * 2, {"a": x.sum(1)})))
    kept = []
    for x in (X, X, X[:3], X[:1], X, X[:0] if False else X[1:2], torch.cat([X[:2], X[:2] + 9])):
        found = cached(x)
        assert_same(found, plain(x))
        assert not any(overlap(a, b) for a in tensors(found) for b in kept)
        kept += tensors(found)
        for tensor in tensors(found):
            assert not tensor.requires_grad
            tensor.fill_(77)


def test_leaves_of_one_call_share_no_memory():
    """The same tensor twice comes back as two tensors, or at least writing to one changes no stored row."""
    cached, plain = pair(Apply(lambda x: (lambda y: (y, y, y[:, :2]))(x * 2)))  # noqa: PLC3002
    for _ in range(3):
        found = cached(X)
        assert_same(found, plain(X))
        found[0].zero_()


ALIASES = {
    "input": lambda m, x: x,
    "view of input": lambda m, x: x[:, 1:],
    "buffer": lambda m, x: m.table[: len(x)] * 1 if len(x) > 8 else m.table[0].expand(len(x), 4),
    "gathered": lambda m, x: m.table[x.long().abs().clamp(max=7)[:, 0]],
    "stash": lambda m, x: m.keep(x),
    "expanded": lambda m, x: x[:, :1].expand(-1, 4),
    "detached": lambda m, x: x.detach(),
}


@pytest.mark.parametrize("name", ALIASES)
def test_aliases(name):
    """A module that returns its input, a view, a buffer or a stash of its own: rows are copies of their own."""

    class Aliased(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(8, 4))
            self.kept = torch.zeros(6, 4)

        def keep(self, x):
            self.kept[: len(x)] = x * 2
            return self.kept[: len(x)]

        def forward(self, x):
            return ALIASES[name](self, x)

    cached, plain = pair(Aliased())
    with Quiet():
        for step in range(4):
            x = X.clone() + (step % 2)
            found = cached(x)
            assert_same(found, plain(x.clone()))
            if hits(cached) and name != "stash":
                before = x.clone()
                found.fill_(5)
                assert torch.equal(x, before)
                assert not (cached.table == 5).any()


def test_in_place_modules():
    """A module that writes into its input does so on every call, as the plain one does."""

    class InPlace(nn.Module):
        def forward(self, x):
            return x.mul_(2)

    cached, plain = pair(InPlace())
    with Quiet():
        for _ in range(3):
            a, b = X.clone(), X.clone()
            assert_same(cached(a), plain(b))
            assert torch.equal(a, b)
    relu, plain_relu = pair(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2)))
    with Quiet():
        for _ in range(3):
            a, b = X.clone(), X.clone()
            assert_same(relu(a), plain_relu(b))
            assert torch.equal(a, b)


def test_in_place_inside_structures():
    """A module that writes into a tensor inside a dict or a list is found out as well."""

    class InPlace(nn.Module):
        def forward(self, batch):
            return batch["x"].add_(1)

    cached, plain = pair(InPlace())
    with Quiet():
        for _ in range(3):
            a, b = {"x": X.clone()}, {"x": X.clone()}
            assert_same(cached(a), plain(b))
            assert torch.equal(a["x"], b["x"])


def test_in_place_on_lists_and_dicts():
    """A module that pops from the dict it is given does so on every call."""

    class Pops(nn.Module):
        def forward(self, batch):
            return batch.pop("x") * 2

    cached, plain = pair(Pops())
    with Quiet():
        for _ in range(3):
            a, b = {"x": X, "y": X}, {"x": X, "y": X}
            assert_same(cached(a), plain(b))
            assert list(a) == list(b)


WRITES = {
    "a list": (lambda: ["A", "BB"], lambda rows: rows.__setitem__(0, rows[0].lower())),
    "a list in a dict": (lambda: {"rows": [1.0, 2.0]}, lambda batch: batch["rows"].append(3.0)),
    "a new key": (lambda: {"rows": [1.0, 2.0]}, lambda batch: batch.__setitem__("more", 1)),
    "an array": (lambda: np.ones((2, 3)), lambda array: array.__imul__(2)),
    "an array of a tuple": (lambda: (np.ones((2, 3)), None), lambda pair: pair[0].__imul__(2)),
}


@pytest.mark.parametrize("kind", WRITES)
def test_in_place_on_arrays_and_lists(kind):
    """What a forward writes into what it is given is written on every call; only tensors count their own writes."""
    made, writes = WRITES[kind]

    def function(value):
        writes(value)
        return torch.ones(2, 1)

    module = cached_module(Apply(function).eval())
    with pytest.warns(CacheWarning, match="changes an input in place"):
        module(made())
    for _ in range(3):
        found, expected = made(), made()
        module(found)
        writes(expected)
        assert repr(found) == repr(expected)


class Asked(MemoryStore):
    """Counts how often it is asked for rows."""

    asked = 0

    def get(self, *args):
        self.asked += 1
        return super().get(*args)


class Switched(nn.Module):
    """Gives rows, or the mean of them."""

    def __init__(self):
        super().__init__()
        self.config = {"mean": True}

    def forward(self, x):
        return x.mean() if self.config["mean"] else x * 2


@pytest.mark.filterwarnings("ignore::modcache.CacheWarning")
def test_what_never_gives_rows_is_not_asked_for_keys():
    """After three outputs that are no rows, calls of that form ask for nothing, until the module is another one."""
    store = Asked()
    cached = cached_module(Switched(), freeze=True, store=store)
    plain = Switched()
    for number in range(6):
        assert_same(cached(X + number), plain(X + number))
    assert store.asked == 3
    assert dict(cache_of(cached).stats.reasons) == {"output is not rows": 36}
    assert "bypassed (output is not rows)" in cache_of(cached).explain(X)[0].reason
    cached.config["mean"] = plain.config["mean"] = False
    for _ in range(2):
        assert_same(cached(X), plain(X))
    assert (hits(cached), computed(cached), bypassed(cached)) == (6, 6, 36)


@pytest.mark.filterwarnings("ignore::modcache.CacheWarning")
def test_what_sometimes_gives_rows_is_asked_each_time():
    """Where one call of a form gave rows, others that give none do not end the caching of it."""
    cached = cached_module(Apply(lambda x: x[: len(x) - int(x[0, 0] > 0)].squeeze(0)), freeze=True)
    rows = -X.abs()
    for row in rows:
        cached(row[None])
    cached(rows)
    for number in range(6):
        cached(number - rows)
    cached(rows)
    assert (hits(cached), computed(cached), bypassed(cached)) == (6, 6, 42)


def test_outputs_of_hits_are_ordinary():
    """A hit is contiguous, writable, no view, no inference tensor, and takes part in autograd as a constant."""
    cached, _ = pair(Apply(lambda x: x.t().contiguous().t() * 2))
    cached(X)
    found = cached(X)
    assert found.is_contiguous()
    assert not found.is_inference()
    assert found.is_leaf
    assert not found._is_view()
    found += 1
    weight = torch.ones(4, requires_grad=True)
    (found * weight).sum().backward()
    assert weight.grad is not None


def test_bfloat16_and_float8_hits_can_be_written():
    """Rows of dtypes that numpy lacks are as ordinary as others."""
    for dtype in (torch.bfloat16, torch.float8_e5m2):
        cached, _ = pair(Apply(lambda x, dtype=dtype: x.to(dtype)))
        with Quiet():
            for _ in range(3):
                found = cached(X)
                assert found.dtype == dtype
                assert found.is_leaf
                assert not found._is_view()
                found.zero_()
                assert cached(X).float().abs().sum() > 0 if not dtype.is_complex else True


def test_needs_grad_output_without_parameters():
    """Something trainable that is no parameter (a closure) is not cut off."""
    weight = torch.ones(4, requires_grad=True)
    cached, _ = pair(Apply(lambda x: x * weight))
    with pytest.warns(CacheWarning):
        for _ in range(3):
            out = cached(X)
            assert out.requires_grad
    with torch.no_grad():
        cached(X)
    assert cached(X).requires_grad


def test_no_grad_fill_then_grad():
    """Rows stored under no_grad do not cut a graph that the plain module would make."""
    weight = torch.ones(4, requires_grad=True)
    cached, _ = pair(Apply(lambda x: x * weight))
    with Quiet():
        with torch.no_grad():
            cached(X), cached(X)
        assert cached(X).requires_grad


def test_nan_and_inf_rows():
    """NaN and infinite values are stored and served bit by bit."""
    x = X.clone()
    x[1], x[2, 0] = float("nan"), float("inf")
    cached, plain = pair(nn.Linear(4, 3))
    agree(cached, plain, x)
    agree(cached, plain, x.flip(0))
    assert bypassed(cached) == 0


def test_store_full():
    """A full store admits no more and every row stays right; so does a row larger than the bound."""
    for eviction in ("none", "lru"):
        store = MemoryStore(2000, eviction=eviction)
        cached, plain = pair(Apply(lambda x: x.repeat(1, 10)), store=store)
        generator = torch.Generator().manual_seed(0)
        pool = torch.randn(60, 4, generator=generator)
        for _ in range(20):
            agree(cached, plain, pool[torch.randint(0, 60, (8,), generator=generator)], times=1)
        assert store.stats().bytes <= 2000
    tiny = MemoryStore(10)
    cached, plain = pair(nn.Linear(4, 100), store=tiny)
    agree(cached, plain, X, times=3)
    assert tiny.stats().rows == 0


def test_tiered_store():
    """A hit in the back is promoted; a tiny front changes no answer."""
    from modcache import TieredStore

    store = TieredStore(MemoryStore(400, eviction="lru"), MemoryStore(1 << 20))
    cached, plain = pair(store=store)
    for x in (X, X[:3], X + 1, X, X[3:], X + 1):
        agree(cached, plain, x)
    assert computed(cached) == 12


@pytest.mark.parametrize("fails", ["get", "put", "both", "delete"])
def test_store_that_raises(fails):
    """A store of the user's that raises costs a warning, not the loop."""

    class Bad(MemoryStore):
        def get(self, *args):
            if fails in ("get", "both"):
                raise OSError("no disk")
            return super().get(*args)

        def put(self, *args):
            if fails in ("put", "both"):
                raise OSError("disk full")
            return super().put(*args)

        def delete(self, *args):
            raise OSError("read-only")

    cached, plain = pair(store=Bad(1 << 20))
    if fails == "delete":
        agree(cached, plain, X, times=3)
        return
    with pytest.warns(CacheWarning) as seen:
        agree(cached, plain, X, times=3)
    assert len(seen) == (2 if fails == "both" else 1)


def test_store_that_loses_and_lies_within_the_protocol():
    """A store that forgets at random, or answers in several parts, changes no answer."""
    import random

    class Forgets(MemoryStore):
        def get(self, namespace, row_keys):
            keep = [key for key in row_keys if chance.random() < 0.5]
            found = super().get(namespace, row_keys)
            dropped = super().delete(namespace, [key for key in row_keys if key not in keep])
            return found if not dropped else super().get(namespace, row_keys)

    chance = random.Random(0)
    cached, plain = pair(store=Forgets(1 << 20))
    for _ in range(20):
        agree(cached, plain, X, times=1)


def test_minimal_user_store():
    """A store with the protocol's methods alone is enough."""
    inner = MemoryStore(1 << 20)

    class Mine:
        __slots__ = ()
        get, put, delete = (staticmethod(getattr(inner, name)) for name in ("get", "put", "delete"))
        row_keys, namespaces, stats = (
            staticmethod(getattr(inner, name)) for name in ("row_keys", "namespaces", "stats")
        )
        flush, close = staticmethod(inner.flush), staticmethod(inner.close)

    cached, plain = pair(store=Mine())
    agree(cached, plain, X)
    agree(cached, plain, X[:3])
    assert cache_of(cached).contains(X) == [True] * 6
    assert hits(cached) == 6 + 6
    assert cache_of(cached).forget(X[:2]) == 2
    assert cache_of(cached).clear() == 4


def test_refused_rows_are_still_returned():
    """With a closed store the module still answers."""
    cached, plain = pair()
    agree(cached, plain, X)
    cache_of(cached).store.close()
    agree(cached, plain, X, times=3)


def test_whole_output_of_per_row_false():
    """per_row=False keeps the output as it is: 0-d tensors, unequal first sizes, constants."""
    cached, plain = pair(
        Apply(lambda x: {"loss": x.mean(), "all": x, "n": len(x), "t": x.t(), "none": None}), per_row=False
    )
    agree(cached, plain, X, times=3)
    agree(cached, plain, X[:2], times=3)
    assert hits(cached) == 4


def test_default_device_does_not_matter():
    """Rows come back on the CPU under another default device."""
    cached, plain = pair(nn.Linear(4, 3))
    agree(cached, plain, X)
    with torch.device("meta"):
        for _ in range(2):
            found = cached(X)
            assert found.device.type == "cpu"
            assert_same(found, plain(X))
            found = cached(torch.cat([X[:2], X[:2] + 1]).to("cpu")) if False else found


def test_miss_under_another_default_device():
    """Computing and joining under a default device of "meta" gives real rows."""
    cached, plain = pair(nn.Linear(4, 3))
    cached(X[:3])
    y = torch.cat([X, X + 1])
    with torch.device("meta"):
        found = cached(y)
    assert found.device.type == "cpu"
    assert_same(found, plain(y))


def test_meta_inputs():
    """Inputs on the meta device run uncached and give what the plain module gives."""
    cached, _plain = pair(nn.Linear(4, 3).to("meta"))
    with Quiet():
        assert cached(X.to("meta")).shape == (6, 3)
        assert cached_module(nn.Identity().eval())(X.to("meta")).device.type == "meta"


def test_large_batch_of_threads_digests():
    """A batch above the size at which several threads digest is right."""
    cached, plain = pair(Apply(lambda x: x.flatten(1).sum(1, keepdim=True).double()))
    x = torch.randn(20, 1 << 18)
    agree(cached, plain, x, times=2, tolerance=1e-2)
    y = x.clone()
    y[7, 12345] += 100
    agree(cached, plain, y, tolerance=1e-2)
    assert computed(cached) == 21


class Remade(nn.Module):
    """A row in an output of a class that a notebook cell may define again."""

    def __init__(self, cls):
        super().__init__()
        self.cls = cls

    def forward(self, x):
        return self.cls(2 * x)


def remake():
    """The class as one run of a cell makes it."""
    return dataclasses.make_dataclass("Remake", ["value"], namespace={"__module__": __name__, "__qualname__": "Remake"})


def test_an_output_class_that_was_defined_again():
    """After its cell ran again, outputs are of the new class from the first miss on."""
    for cls in (remake(), remake()):
        cached = cached_module(Remade(cls), freeze=True)
        found = [cached(torch.ones(2, 3)) for _ in range(2)]
        assert [type(output) is cls for output in found] == [True, True]


@dataclasses.dataclass(slots=True)
class Slotted:
    vector: object
    norm: object = None


def test_dataclass_with_slots():
    """A dataclass without a ``__dict__`` is a structure like any other, in grad mode too."""
    cached, plain = pair(Apply(lambda x: Slotted(x * 2, x.norm(dim=1))))
    for _ in range(2):
        expected, found = plain(X), cached(X)
        assert type(found) is Slotted
        assert_same([found.vector, found.norm], [expected.vector, expected.norm])
    assert hits(cached) == len(X)


def test_nested_tensors_are_given_as_they_are():
    """A nested tensor has no rows to part; the call is bypassed, whichever layout it has."""
    for layout in (torch.strided, torch.jagged):
        module = cached_module(Apply(lambda x, at=layout: torch.nested.as_nested_tensor(list(x), layout=at)).eval())
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert module(X).is_nested
            assert module(X).is_nested
        ours = [str(one.message) for one in said if one.category is CacheWarning]
        assert len(ours) == 1
        assert "not a dense tensor" in ours[0]


def test_an_output_that_contains_itself():
    """It cannot be stored, which is no reason to fail."""

    def loops(x):
        found = [x]
        found.append(found)
        return found

    module = cached_module(Apply(loops).eval())
    with pytest.warns(CacheWarning, match="contains itself"):
        assert module(X)[0] is X
