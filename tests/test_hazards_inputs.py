"""Whatever is passed in, a row is found again only for the very same input, and in the caller's order."""

from __future__ import annotations

import collections
import copy
import dataclasses
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import modcache
from modcache import (
    CacheWarning,
    KeyExtractionError,
    MemoryStore,
    UsageError,
    cache_of,
    cached_module,
    keys,
    keys_for,
    register_key_extractor,
)
from tests.hazards import Encoder, Quiet, agree, assert_same, bypassed, computed, frozen, hits, pair

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Apply(nn.Module):
    """Applies a function of its own to the arguments."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


class Call(nn.Module):
    """A plain signature with defaults."""

    def forward(self, a, b=2, *, mode="x", flag=None):
        scale = {int: 1, float: 2, bool: 3, str: 4}.get(type(b), 5)
        return a * scale + (7 if mode == "y" else 0) + (0 if flag is None else 1)


# --- batches --------------------------------------------------------------------------------------------


def test_partial_hits_in_any_order():
    """Rows come back in the caller's order whatever share of them is stored."""
    cached, plain = pair()
    generator = torch.Generator().manual_seed(1)
    pool = torch.randn(40, 4, generator=generator)
    for _ in range(60):
        size = int(torch.randint(0, 12, (), generator=generator))
        agree(cached, plain, pool[torch.randint(0, 40, (size,), generator=generator)], times=1)
    assert computed(cached) <= 40 + 2


def test_duplicates_are_computed_once():
    """A row that stands several times in a batch is computed once."""
    seen = []

    class Seen(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return x * 2

    cached, plain = pair(Seen())
    agree(cached, plain, X[:3], times=1)
    seen.clear()
    x = torch.stack([X[4], X[0], X[4], X[5], X[5], X[1], X[4]])
    out = cached(x)
    assert seen == [2]
    assert_same(out, x * 2)


def test_first_batch_of_duplicates():
    """A first batch of one distinct row, several times, is right."""
    cached, plain = pair()
    agree(cached, plain, X[:1].expand(5, 4))
    agree(cached, plain, X)


def test_empty_and_single_batches():
    """Batches of no and of one row are what the plain module gives."""
    cached, plain = pair()
    agree(cached, plain, X[:0])
    agree(cached, plain, X[:1])
    agree(cached, plain, X)
    agree(cached, plain, X[:0])
    agree(cached, plain, X[3:4])


def test_empty_lists_and_no_arguments():
    """Calls without rows run as they are."""
    cached, plain = pair(Apply(lambda *a, **k: torch.ones(3) * len(a)))
    with Quiet():
        agree(cached, plain)
        agree(cached, plain, [])
        agree(cached, plain, ())
        agree(cached, plain, {})
        agree(cached, plain, None)


def test_slices_of_one_tensor_and_row_zero():
    """A row is its values, not where it lies."""
    cached, plain = pair()
    agree(cached, plain, X)
    count = computed(cached)
    agree(cached, plain, X.flip(0))
    agree(cached, plain, X[2:5])
    agree(cached, plain, X.clone()[1::2])
    assert computed(cached) == count


# --- dtypes and strides ---------------------------------------------------------------------------------

DTYPES = [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128, torch.uint8,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.uint16, torch.uint32, torch.uint64, torch.complex32,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype):
    """Inputs and outputs of every dtype come back as they are, and rows of equal bytes but other dtypes differ."""
    cached, _plain = pair(Apply(lambda x: x.clone()))
    x = (
        (X * 4).to(dtype)
        if dtype not in (torch.uint16, torch.uint32, torch.uint64)
        else (X.abs() * 4).to(torch.uint8).to(dtype)
    )
    for _ in range(2):
        found = cached(x)
        assert found.dtype == dtype
        assert found.shape == x.shape
        assert bytes(found.contiguous().view(torch.uint8).numpy()) == bytes(x.contiguous().view(torch.uint8).numpy())
    assert hits(cached) >= len(x)
    some, two = (x.index_select(0, torch.tensor(places)) for places in ([0, 3, 0, 5], [3, 0]))
    cached(x[:1]), cached(some)
    assert bytes(cached(two).view(torch.uint8).numpy()) == bytes(two.view(torch.uint8).numpy())


def test_same_bytes_other_dtype():
    """int32 zeros, float32 zeros and int64 of half the width are other rows."""
    cached, plain = pair(Apply(lambda x: x.double() + x.element_size() + x.is_floating_point()))
    for x in (torch.zeros(4, 4), torch.zeros(4, 4, dtype=torch.int32), torch.zeros(4, 2, dtype=torch.int64)):
        agree(cached, plain, x)
    x = torch.arange(8, dtype=torch.float32).reshape(4, 2)
    agree(cached, plain, x)
    agree(cached, plain, x.view(torch.int32))
    agree(cached, plain, x.view(torch.bfloat16))
    agree(cached, plain, x.view(torch.float16))


def test_shapes_of_the_same_bytes():
    """(n, 2, 3), (n, 3, 2) and (n, 6) of the same bytes are other rows."""
    cached, plain = pair(Apply(lambda x: x.flatten(1).sum(1) * x.dim() + x.shape[1]))
    x = torch.randn(4, 6)
    for shape in ((4, 6), (4, 2, 3), (4, 3, 2), (4, 6, 1), (4, 1, 6)):
        agree(cached, plain, x.reshape(shape))


STRIDED = {
    "transposed": lambda: torch.randn(4, 6).t(),
    "expanded": lambda: torch.randn(1, 4).expand(6, 4),
    "expanded inside": lambda: torch.randn(6, 1).expand(6, 4),
    "sliced": lambda: torch.randn(12, 8)[::2, ::2],
    "flipped view": lambda: torch.randn(6, 4).flip(0),
    "as_strided": lambda: torch.randn(20).as_strided((6, 4), (3, 1)),
    "offset": lambda: torch.randn(10, 4)[4:],
}


@pytest.mark.parametrize("name", STRIDED)
def test_strides(name):
    """A view is keyed by its values; its contiguous twin hits."""
    cached, plain = pair()
    x = STRIDED[name]()
    agree(cached, plain, x)
    count = computed(cached)
    agree(cached, plain, x.contiguous())
    assert computed(cached) == count


def test_channels_last():
    """channels_last images are keyed by their values."""
    cached, plain = pair(nn.Conv2d(3, 2, 3))
    x = torch.randn(4, 3, 8, 8)
    agree(cached, plain, x.to(memory_format=torch.channels_last))
    count = computed(cached)
    agree(cached, plain, x)
    assert computed(cached) == count


def test_large_strided_rows():
    """Large rows of a non-contiguous batch are keyed by all of their values."""
    cached, plain = pair(Apply(lambda x: x.flatten(1).double().sum(1)))
    x = torch.randn(3, 200, 100).transpose(1, 2)
    agree(cached, plain, x)
    y = x.clone()
    y[1, 50, 50] += 1
    agree(cached, plain, y)


def test_conj_and_neg_views():
    """Lazy conjugation and negation are carried out before a row is keyed."""
    cached, plain = pair(Apply(lambda x: torch.view_as_real(x.resolve_conj().resolve_neg())))
    x = torch.randn(6, 4, dtype=torch.complex64)
    agree(cached, plain, x)
    agree(cached, plain, x.conj())
    real, plain_real = pair(Apply(lambda x: x + 0))
    agree(real, plain_real, x.conj().imag)
    agree(real, plain_real, x.imag)
    assert torch.equal(real(x.conj().imag), -x.imag)


def test_one_row_of_one_value_with_a_stride():
    """One row whose only value is cut out of others is cached beside another argument."""
    cached, plain = pair(Apply(lambda x, y: x + y))
    x = torch.randn(4, 2, dtype=torch.complex64).conj().imag
    agree(cached, plain, x[:1, :1], torch.ones(1))
    assert bypassed(cached) == 0


def test_bit_differences_count():
    """-0.0 and 0.0 differ, a NaN equals itself, the smallest step is another row."""
    cached, plain = pair(Apply(lambda x: torch.signbit(x).float() + x.nan_to_num()))
    x = torch.zeros(4, 3)
    agree(cached, plain, x)
    agree(cached, plain, -x)
    assert cached(-x).sum() == 12
    nan = torch.full((4, 3), float("nan"))
    agree(cached, plain, nan)
    count = computed(cached)
    cached(nan.clone())
    assert computed(cached) == count
    one = torch.ones(4, 3)
    agree(cached, plain, one, tolerance=0)
    agree(cached, plain, torch.nextafter(one, 2 * one), tolerance=0)


def test_one_pixel_counts():
    """One changed pixel anywhere is another row."""
    cached, plain = pair(Apply(lambda x: x.flatten(1).double().sum(1)))
    x = torch.zeros(4, 3, 64, 64)
    agree(cached, plain, x, tolerance=0)
    for place in range(0, 3 * 64 * 64, 977):
        x.view(4, -1)[2, place] = 1.0
        assert cached(x)[2] == plain(x)[2]


def test_input_changed_in_place_between_calls():
    """A batch buffer that is filled anew in place is other rows."""
    cached, plain = pair()
    buffer = torch.empty(6, 4)
    for step in range(4):
        buffer.fill_(step % 2)
        agree(cached, plain, buffer, times=1)
        np.asarray(buffer.numpy())[:] = 5 + step % 2
        agree(cached, plain, buffer, times=1)


def test_caller_input_storage_can_still_be_resized():
    """Keying an input leaves no mark on its storage: it can be resized afterwards."""
    cached, _ = pair()
    x = X.clone()
    cached(x), cached(x)
    x.untyped_storage().resize_(0)
    cached.last.weight.untyped_storage().resize_(cached.last.weight.untyped_storage().nbytes() * 2)


def test_parameter_and_subclass_inputs():
    """A Parameter is a tensor; a tensor subclass of the user's is not keyed by its values alone."""
    cached, plain = pair()
    agree(cached, plain, nn.Parameter(X, requires_grad=False))

    class Tagged(torch.Tensor):
        pass

    with Quiet():
        out = cached(X.as_subclass(Tagged))
    assert type(out) is type(plain(X.as_subclass(Tagged)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_sparse_and_nested_inputs():
    """Tensors without plain memory run uncached."""
    cached, plain = pair(Apply(lambda x: x.to_dense() if x.layout is not torch.strided else x.dequantize()))
    with Quiet():
        assert_same(cached(X.to_sparse()), plain(X.to_sparse()))
        n = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        whole = pair(Apply(lambda x: torch.ones(2)))
        assert_same(whole[0](n), whole[1](n))


def test_zero_width_rows():
    """Rows without elements are rows."""
    cached, plain = pair(Apply(lambda x: torch.ones(len(x), 2)))
    agree(cached, plain, torch.zeros(3, 0))
    agree(cached, plain, torch.zeros(5, 0))
    same, plain_same = pair(Apply(lambda x: x.clone()))
    agree(same, plain_same, torch.zeros(3, 0, 5))


# --- arguments ------------------------------------------------------------------------------------------


def test_equal_arguments_of_other_types():
    """1, 1.0, True and "1" are four arguments."""
    cached, plain = pair(Call())
    for b in (1, 1.0, True, "1", 2, 2.0, None, np.float32(1), np.int64(1)):
        agree(cached, plain, X, b)
        agree(cached, plain, X, b=b)


def test_equal_items_of_other_types_in_structures():
    """The types of items inside lists, tuples and dicts count."""
    cached, plain = pair(Apply(lambda x, opts: x * {int: 1, float: 2, bool: 3}[type(opts["a"][0])]))
    for item in (1, 1.0, True):
        agree(cached, plain, X, {"a": [item]})
        agree(cached, plain, X, {"a": (item,)})


def test_minus_zero_argument():
    """0.0 and -0.0 are two scalar arguments."""
    cached, plain = pair(Apply(lambda x, s: x * 0 + torch.signbit(torch.tensor(s)).float()))
    agree(cached, plain, X, 0.0)
    agree(cached, plain, X, -0.0)


def test_positional_keyword_and_defaults():
    """m(x), m(a=x) are one call; what differs in a default that is given is right anyway."""
    cached, plain = pair(Call())
    agree(cached, plain, X)
    count = computed(cached)
    agree(cached, plain, a=X)
    assert computed(cached) == count
    agree(cached, plain, X, 2)
    agree(cached, plain, X, b=2)
    agree(cached, plain, X, mode="y")
    agree(cached, plain, X, flag=True)
    agree(cached, plain, flag=True, a=X)


def test_explicit_default_hits():
    """Naming a default's value is the same call as leaving it out, or at least no other answer."""
    cached, plain = pair(Call())
    agree(cached, plain, X, b=2)
    agree(cached, plain, X, b=3)


def test_swapped_arguments():
    """m(a, b) and m(b, a) are two calls."""
    cached, plain = pair(Apply(lambda a, b: a - 2 * b))
    y = torch.randn(6, 4)
    agree(cached, plain, X, y)
    agree(cached, plain, y, X)
    named, plain_named = pair(Call())
    agree(named, plain_named, X, y)


def test_argument_none_and_absent():
    """None and left out are answered each as the plain module does."""
    cached, plain = pair(Apply(lambda x, *rest, **kw: x + len(rest) + 10 * len(kw)))
    agree(cached, plain, X)
    agree(cached, plain, X, None)
    agree(cached, plain, X, None, None)
    agree(cached, plain, X, a=None)
    agree(cached, plain, X, b=None)


def test_star_kwargs_names():
    """Keywords of other names are other calls."""
    cached, plain = pair(Apply(lambda x, **kw: x * (2 if "double" in kw else 1)))
    agree(cached, plain, X, double=1)
    agree(cached, plain, X, single=1)


def test_wrong_arguments_raise_the_modules_own_error():
    """A call that the module cannot take raises what the plain one raises."""
    cached, plain = pair(Call())
    for args, kwargs in (((), {}), ((X, 1, 2), {}), ((X,), {"nothing": 1})):
        with pytest.raises(TypeError) as expected:
            plain(*args, **kwargs)
        with pytest.raises(TypeError) as found:
            cached(*args, **kwargs)
        assert str(found.value).replace("forward", "") == str(expected.value).replace("forward", "")


# --- samples that interact ------------------------------------------------------------------------------

INTERACT = {
    "mean": lambda x: x - x.mean(0),
    "softmax": lambda x: x.softmax(0),
    "sort": lambda x: x.sort(0).values,
    "max": lambda x: x / x.abs().max(),
    "cumsum": lambda x: x.cumsum(0),
    "roll": lambda x: x.roll(1, 0),
    "flip": lambda x: x.flip(0),
    "index": lambda x: x + torch.arange(len(x))[:, None],
    "size": lambda x: x * len(x),
    "matmul": lambda x: x @ x.t() @ x,
    "first": lambda x: x + x[:1],
    "last": lambda x: x + x[-1:],
    "unique": lambda x: x + len(x.unique(dim=0)),
    "batchnorm": lambda x: nn.functional.batch_norm(x, None, None, training=True),
}


@pytest.mark.parametrize("name", INTERACT)
def test_rows_that_interact(name):
    """A module whose rows depend on each other is found out on its first batch, and warned about once."""
    cached, plain = pair(Apply(INTERACT[name]))
    with pytest.warns(CacheWarning) as seen:
        agree(cached, plain, X, times=1)
        agree(cached, plain, X[:4], times=2)
        agree(cached, plain, X[2:], times=2)
    assert len([w for w in seen if issubclass(w.category, CacheWarning)]) == 1


@pytest.mark.parametrize("name", [name for name in INTERACT if name != "matmul"])
def test_rows_that_interact_after_batches_of_one(name):
    """Rows stored one by one are not served to a batch before its rows were checked."""
    cached, plain = pair(Apply(INTERACT[name]))
    with Quiet():
        for row in X:
            try:  # noqa: SIM105
                agree(cached, plain, row[None], times=2)
            except ValueError:  # batch norm of one row
                pass
        agree(cached, plain, X)
        agree(cached, plain, X[1:4])
        agree(cached, plain, X[:1]) if name != "batchnorm" else None


def test_rows_that_interact_in_pairs():
    """Rows that mix with their neighbour only are found out."""
    cached, plain = pair(Apply(lambda x: x + x.roll(1, 0) if len(x) % 2 == 0 else x))
    with Quiet():
        agree(cached, plain, X)
        agree(cached, plain, X[:4])


@pytest.mark.parametrize("kind", ["float", "int", "dict", "list", "scalar", "array"])
def test_an_argument_that_switches_interaction_on(kind):
    """A self-check is valid for the options it was made with: a float or a dict may turn chance or interaction on."""
    make = {
        "float": float,
        "int": int,
        "dict": lambda by: {"by": by},
        "list": lambda by: [by],
        "scalar": torch.tensor,
        "array": np.float32,
    }[kind]

    def function(x, by):
        by = by["by"] if isinstance(by, dict) else by[0] if isinstance(by, list) else by
        return x - float(by) * x.mean(0) if float(by) >= 0 else x + torch.rand(len(x), 1)

    cached, plain = pair(Apply(function))
    with Quiet():
        agree(cached, plain, X, make(0.0))
        agree(cached, plain, X, make(1.0))
        agree(cached, plain, X[:3], make(1.0))
        assert not torch.equal(cached(X, make(-1.0)), cached(X, make(-1.0)))
        agree(cached, plain, X, make(0.0))
    assert hits(cached) >= 6


def test_first_batch_of_two():
    """A first batch of two rows is enough for the check."""
    cached, plain = pair(Apply(lambda x: x - x.mean(0)))
    with Quiet():
        agree(cached, plain, X[:2])
        agree(cached, plain, X[1:3])


# --- broadcast arguments --------------------------------------------------------------------------------


def test_mask_whose_size_is_the_batch():
    """A (B, B) table that all rows share is found out, and cached when it is named in broadcast."""
    table = torch.randn(4, 4)

    def function(x, table):
        return x @ table

    cached, plain = pair(Apply(function))
    with Quiet():
        agree(cached, plain, X[:4], table)
        agree(cached, plain, X, table)
        agree(cached, plain, X[2:], table)
    named, plain_named = pair(Named(), broadcast=["table"])
    agree(named, plain_named, X[:4], table)
    agree(named, plain_named, X[2:], table)
    assert bypassed(named) == 0
    agree(named, plain_named, X[:4], table + 1)


class Named(nn.Module):
    def forward(self, x, table):
        return x @ table


def test_shared_argument_changed():
    """A shared tensor is in every row's key by content."""
    cached, plain = pair(Named())
    table = torch.randn(4, 4)
    agree(cached, plain, X, table)
    table[0, 0] += 1
    agree(cached, plain, X, table)


def test_broadcast_of_batch_size_one():
    """A batch of one row beside tables of one row stays right."""
    cached, plain = pair(Apply(lambda x, bias: x + bias))
    bias = torch.randn(1, 4)
    with Quiet():
        agree(cached, plain, X[:1], bias)
        agree(cached, plain, X, bias)
        agree(cached, plain, X[:1], bias)
        agree(cached, plain, X[2:3], bias + 1)


def test_positions_of_the_length_of_the_batch():
    """A 1-D position tensor as long as the batch by chance stays right."""
    cached, plain = pair(Apply(lambda x, positions: x + positions))
    with Quiet():
        agree(cached, plain, torch.randn(4, 4), torch.arange(4.0))
        agree(cached, plain, torch.randn(4, 4), torch.arange(4.0) * 2)
        agree(cached, plain, torch.randn(6, 4), torch.arange(4.0))


def test_second_argument_of_another_length():
    """A list of another length is shared by all rows."""
    cached, plain = pair(Apply(lambda x, names: x + len(names)))
    agree(cached, plain, X, ["a", "b"])
    agree(cached, plain, X, ["a", "c", "d"])


def test_mutable_shared_argument_changed_in_place():
    """A dict of options that changes in place between calls is another call."""
    options = {"scale": 1.0, "names": ["a"]}
    cached, plain = pair(Apply(lambda x, options: x * options["scale"] * len(options["names"])))
    agree(cached, plain, X, options)
    options["scale"] = 2.0
    agree(cached, plain, X, options)
    options["names"].append("b")
    agree(cached, plain, X, options)


def test_argument_without_content():
    """An arbitrary object or a generator as an argument bypasses, with one warning."""

    class Thing:
        factor = 1.0

    cached, plain = pair(Apply(lambda x, thing: x * getattr(thing, "factor", 1.0)))
    thing = Thing()
    with pytest.warns(CacheWarning, match="register_key_extractor"):
        agree(cached, plain, X, thing, times=3)
    Thing.factor = 2.0
    agree(cached, plain, X, thing)
    agree(cached, plain, X, torch.Generator(), times=1) if False else None


# --- structures -----------------------------------------------------------------------------------------


class Point(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclasses.dataclass
class Pack:
    x: torch.Tensor
    note: str = "n"
    more: object = None


def total(value):
    if isinstance(value, torch.Tensor):
        return value.float()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.astype("f4"))
    if isinstance(value, dict | collections.UserDict):
        return sum(total(item) * (at + 1) for at, item in enumerate(value.values()))
    if dataclasses.is_dataclass(value):
        return total(vars(value))
    if isinstance(value, str):
        return float(len(value))
    if value is None or isinstance(value, int | float):
        return float(value or 0)
    if isinstance(value, list) and all(isinstance(item, torch.Tensor) for item in value):
        return torch.stack(value).float()
    return sum(total(item) * (at + 1) for at, item in enumerate(value))


def encoding():
    from transformers import BatchEncoding

    return BatchEncoding({"a": X, "b": X * 2})


STRUCTURES = {
    "tuple": lambda: (X, X * 2),
    "dict": lambda: {"a": X, "b": X * 3},
    "nested dict": lambda: {"a": {"b": (X, X * 2)}, "c": X},
    "ordered": lambda: collections.OrderedDict(a=X, b=X * 2),
    "namedtuple": lambda: Point(X, X * 2),
    "dataclass": lambda: Pack(X, "abc", {"k": X}),
    "encoding": encoding,
    "userdict": lambda: collections.UserDict(a=X, b=X * 2),
    "list of rows": lambda: list(X),
    "array": X.numpy,
    "mixed": lambda: {"a": X, "n": 3, "s": "text", "none": None},
    "defaultdict": lambda: collections.defaultdict(list, a=X, b=X * 2),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures(name):
    """A structure of per-row tensors is split and taken, whatever it is made of."""
    seen = []

    def function(value):
        seen.append(type(value))
        return total(value)

    cached, plain = pair(Apply(function))
    value = STRUCTURES[name]()
    agree(cached, plain, value)
    assert hits(cached) >= 6, cache_of(cached).stats.reasons
    half = _half(value)
    seen.clear()
    agree(cached, plain, half)
    assert set(seen) == {type(value)}


def _half(value):
    """The structure with half of its rows new."""
    if isinstance(value, torch.Tensor):
        return torch.cat([value[:3], value[:3] + 1])
    if isinstance(value, np.ndarray):
        return np.concatenate([value[:3], value[:3] + 1])
    if isinstance(value, list):
        return [*value[:3], *(row + 1 for row in value[:3])]
    if isinstance(value, Point):
        return Point(*map(_half, value))
    if isinstance(value, tuple):
        return tuple(map(_half, value))
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **{k: _half(v) for k, v in vars(value).items()})
    if isinstance(value, dict | collections.UserDict):
        made = copy.copy(value)
        for key in list(value):
            made[key] = _half(value[key])
        return made
    return value


def test_input_structures_are_left_alone():
    """A partial hit leaves the caller's containers as they were."""
    cached, _ = pair(Apply(total))
    value = encoding()
    cached(value)
    other = _half(value)
    before = {key: item.clone() for key, item in other.items()}
    cached(other)
    assert_same({**other}, before)


def test_order_of_dict_items():
    """The order of a dict's items counts, as a forward may walk them in order."""
    cached, plain = pair(Apply(total))
    agree(cached, plain, {"a": X, "b": X * 3})
    agree(cached, plain, {"b": X * 3, "a": X})


def test_list_of_tensors_of_several_shapes():
    """A list of tensors of several sizes is one row each."""
    cached, plain = pair(Apply(lambda images: torch.stack([image.sum() for image in images])))
    images = [torch.randn(2, 3), torch.randn(4, 3), torch.randn(2, 3)]
    agree(cached, plain, images)
    agree(cached, plain, [images[1], torch.randn(5, 5), images[0]])
    agree(cached, plain, [images[0].reshape(3, 2), images[1]])


def test_texts():
    """Texts as list, tuple (from default_collate) and single string; no confusion of boundaries."""
    cached, plain = pair(
        Apply(
            lambda texts: torch.tensor(
                [[len(t), sum(map(ord, t))] for t in ([texts] if isinstance(texts, str) else texts)]
            )
        )
    )
    agree(cached, plain, ["ab", "c"])
    agree(cached, plain, ["a", "bc"])
    agree(cached, plain, ("ab", "c"))
    agree(cached, plain, ["", "a", "\ud800", "é", "e\u0301", "\0", "a\0"])
    agree(cached, plain, "ab")
    agree(cached, plain, ["ab"])
    loader = torch.utils.data.DataLoader(["x", "yy", "zzz", "w"], batch_size=2)
    for batch in loader:
        agree(cached, plain, batch)


def test_default_collate_of_dicts():
    """What a DataLoader makes of dict samples is split into rows."""
    cached, plain = pair(Apply(lambda batch: batch["x"] * torch.tensor([[len(t)] for t in batch["text"]])))
    data = [{"x": X[i], "text": "t" * i} for i in range(6)]
    for _ in range(2):
        for batch in torch.utils.data.DataLoader(data, batch_size=3):
            agree(cached, plain, batch, times=1)
    assert hits(cached) >= 6


def test_lists_of_arrays_numbers_and_bytes():
    """Lists of arrays, numbers and bytes are rows; types of numbers count."""
    cached, plain = pair(
        Apply(
            lambda v: torch.tensor(
                [float(np.sum(np.frombuffer(i, "u1") if isinstance(i, bytes) else i)) + isinstance(i, float) for i in v]
            )
        )
    )
    agree(cached, plain, [np.ones(3), np.ones((3, 1)), np.zeros(2, "f4"), np.zeros(2, "i4")])
    agree(cached, plain, [1, 2, 3])
    agree(cached, plain, [1.0, 2.0, 3.0])
    agree(cached, plain, [b"a", b"ab", b""])


def test_numpy_arrays_of_every_kind():
    """Arrays that are read-only, byte-swapped, Fortran-ordered, of text or objects are keyed by value."""
    cached, plain = pair(Apply(lambda a: torch.tensor([float(len(str(row))) for row in a])))
    a = np.arange(12).reshape(4, 3)
    frozen_array = a.copy()
    frozen_array.setflags(write=False)
    for array in (
        a,
        frozen_array,
        np.asfortranarray(a),
        a.astype(">i4"),
        a[::-1],
        a[:, ::2],
        np.array(["a", "bb", "ccc", "d"]),
        np.array(["a", None, 1, 2.0], dtype=object),
        np.array([(1, 2.0)] * 4, dtype=[("a", "i4"), ("b", "f8")]),
        np.arange(4).astype("datetime64[D]"),
    ):
        with Quiet():
            agree(cached, plain, array)


def test_a_tensor_over_a_numpy_view_of_the_input():
    """Arrays that torch cannot hold are still right."""
    cached, plain = pair(Apply(lambda a: torch.from_numpy(a.astype("f8")) * 2))
    for dtype in ("u2", "u4", "u8", "f2", "?", "i1"):
        agree(cached, plain, np.arange(8).reshape(4, 2).astype(dtype))


# --- prepare, broadcast, per_row, keys ------------------------------------------------------------------


def test_prepare_is_called_for_missing_rows_only():
    """prepare sees the missing rows once each, never duplicates, and nothing when all rows hit."""
    seen = []

    def prepare(texts):
        seen.append(list(texts))
        return torch.tensor([[float(len(t)), 1.0, 2.0, 3.0] for t in texts])

    module = frozen(Encoder())
    plain = copy.deepcopy(module)
    cached = cached_module(module, prepare=prepare)
    texts = ["a", "bb", "ccc", "a"]
    expected = plain(prepare(texts))
    seen.clear()
    assert_same(cached(texts), expected)
    assert sorted(seen[0]) == ["a", "bb", "ccc"]
    seen.clear()
    assert_same(cached(texts), expected)
    assert seen == []
    cached(["bb", "new", "a", "new"])
    assert seen == [["new"]]


@pytest.mark.parametrize("kind", ["tuple", "mapping", "one", "userdict", "list"])
def test_what_prepare_returns(kind):
    """A tuple is positional, a mapping keywords, anything else one argument."""
    X4 = torch.ones(4)

    def prepare(numbers):
        rows = torch.stack([X4 * n for n in numbers])
        return {
            "tuple": (rows, rows),
            "mapping": {"b": rows, "a": rows * 3},
            "userdict": collections.UserDict(b=rows, a=rows * 3),
            "one": rows,
            "list": list(rows),
        }[kind]

    class Takes(nn.Module):
        def forward(self, a, b=None):
            a = torch.stack(a) if isinstance(a, list) else a
            return a if b is None else a - 2 * b

    cached, plain = pair(Takes(), prepare=prepare)
    for numbers in ([1, 2, 3], [3, 4, 1], [4]):
        given = prepare(numbers)
        expected = (
            plain(*given) if kind == "tuple" else plain(**given) if kind in ("mapping", "userdict") else plain(given)
        )
        for _ in range(2):
            assert_same(cached(numbers), expected)


def test_prepare_that_raises():
    """An error of prepare reaches the caller as it is; the next call works."""
    fail = [True]

    def prepare(texts):
        if fail[0]:
            raise ValueError("no such text")
        return torch.ones(len(texts), 4)

    cached, _ = pair(prepare=prepare)
    with Quiet():
        with pytest.raises(ValueError, match="no such text"):
            cached(["a", "b"])
        fail[0] = False
        assert cached(["a", "b"]).shape == (2, 3)


def test_prepare_is_in_the_namespace():
    """Another prepare is another namespace."""
    store = MemoryStore(1 << 20)
    base = frozen(Encoder())
    one = cached_module(copy.deepcopy(base), store=store, prepare=lambda t: torch.ones(len(t), 4))
    two = cached_module(copy.deepcopy(base), store=store, prepare=lambda t: torch.zeros(len(t), 4))
    assert not torch.equal(one(["a", "b"]), two(["a", "b"]))


class Transform(nn.Module):
    """As torchvision has them: a module, and so in training mode wherever `prepare=` uses it."""

    __module__ = "torchvision.transforms.transforms"

    def __init__(self, jitter):
        super().__init__()
        self.jitter = jitter

    def forward(self, number):
        row = torch.full((4,), float(number))
        return row + torch.rand(1) if self.jitter else row


@pytest.mark.parametrize("jitter", [False, True])
def test_transforms_in_prepare(jitter):
    """Those that draw nothing are cached; those that do are found out, and said to be random."""
    transform = Transform(jitter)
    cached = cached_module(Encoder(), freeze=True, prepare=lambda rows: torch.stack(list(map(transform, rows))))
    with pytest.warns(CacheWarning, match="it did not give the same rows") if jitter else Quiet():
        cached([1, 2, 3, 4])
        cached([4, 3, 2, 1])
    assert cache_of(cached).stats.hits == (0 if jitter else 4)


def test_a_module_of_ones_own_in_prepare():
    """It may do otherwise in training mode; freezing does not reach it, and is not what it is told to do."""

    class Own(nn.Module):
        def forward(self, numbers):
            return torch.tensor(numbers)[:, None] * torch.ones(4)

    own = Own()

    def prepare(rows):
        return own(rows)

    cached = cached_module(Encoder(), freeze=True, prepare=prepare)
    with pytest.warns(CacheWarning, match=r"prepare variable own is in training mode.*Call eval\(\) on it\.$"):
        cached([1, 2, 3, 4])
    own.eval()
    with Quiet():
        cached([1, 2, 3, 4])
        cached([4, 3, 2, 1])
    assert cache_of(cached).stats.hits == 4


def test_prepare_in_bypassed_calls():
    """prepare is applied in a bypassed call, and in mode off, too."""
    cached, plain = pair(prepare=lambda t: torch.ones(len(t), 4))
    with modcache.mode("off"):
        assert_same(cached(["a", "b"]), plain(torch.ones(2, 4)))


def test_per_row_false():
    """A module without a batch dimension is cached by the whole call."""
    cached, plain = pair(Apply(lambda x, k=1: (x.sum(), x.softmax(0) * k)), per_row=False)
    agree(cached, plain, X)
    agree(cached, plain, X[:3])
    agree(cached, plain, X, k=2)
    agree(cached, plain, X[0])
    agree(cached, plain, torch.tensor(3.0).reshape(1))
    assert hits(cached) == 5


def test_per_row_false_random():
    """per_row=False does not freeze one draw of a random module."""
    cached, _ = pair(Apply(lambda x: x + torch.randn(())), per_row=False)
    with Quiet():
        outs = [cached(X) for _ in range(4)]
    assert not any(torch.equal(outs[0], out) for out in outs[1:])


def test_cache_keys_in_all_forms():
    """ints, strings, bytes, tuples, tensors, arrays and collated pairs are keys; equal ids of other types differ."""
    cached, plain = pair()
    forms = [
        [1, 2, 3, 4, 5, 6],
        ["1", "2", "3", "4", "5", "6"],
        [b"1", b"2", b"3", b"4", b"5", b"6"],
        [(1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (6, 0)],
        [("a", 1), ("a", 2), ("b", 1), ("b", 2), ("ab", 1), ("a", "b1")],
        (torch.arange(6), torch.full((6,), 9)),
        (torch.arange(6), ("a",) * 6),
        range(10, 16),
        [2**70 + i for i in range(6)],
    ]
    for at, form in enumerate(forms):
        x = X + at
        for _ in range(2):
            assert_same(cached(x, cache_keys=form), plain(x))
    x = X - 1
    for form in (
        torch.arange(100, 106),
        np.arange(100, 106),
        list(range(100, 106)),
        torch.arange(100, 106, dtype=torch.int32),
    ):
        assert_same(cached(x, cache_keys=form), plain(x))
    assert computed(cached) == 6 * len(forms) + 6


@pytest.mark.parametrize(
    "wrong",
    [[1, 2], [], [1.0] * 6, [True] * 6, [None] * 6, torch.zeros(6), torch.zeros(6, 2, dtype=torch.int64), "abcdef", 5,
     {"a": 1}, [[1]] * 6, [float("nan")] * 6, [(1.0,)] * 6, (torch.arange(6), torch.arange(5)), range(7)],
    ids=str,
)  # fmt: skip
def test_wrong_cache_keys(wrong):
    """Keys of a wrong count or type raise an error of ours that is also a ValueError or TypeError; nothing is stored."""  # noqa: E501
    cached, _ = pair()
    with pytest.raises((ValueError, TypeError)) as error:
        cached(X, cache_keys=wrong)
    assert isinstance(error.value, modcache.ModcacheError)
    assert cache_of(cached).store.stats().rows == 0


def test_cache_keys_keep_other_arguments_in_the_key():
    """With cache_keys, shared arguments and the shape of per-row ones still count."""
    cached, plain = pair(Apply(lambda x, s=1: x * s))
    ids = list(range(6))
    for args in ((X,), (X, 2), (X, 2.0), (X[:, :3],), (X.double(),)):
        assert_same(cached(*args, cache_keys=ids), plain(*args))


def test_keys_for_with_a_module_called_twice():
    """keys_for gives the second call of a module in the block other rows than the first."""
    inner = frozen(nn.Linear(4, 3))

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, a, b):
            return self.inner(a) - 2 * self.inner(b)

    plain = copy.deepcopy(Two())
    model = Two()
    cached_module(model.inner)
    y = torch.randn(6, 4)
    for _ in range(3):
        with keys_for(range(6)):
            assert_same(model(X, y), plain(X, y))
    assert hits(model.inner) == 24


def test_keys_for_of_a_wrong_count():
    """keys_for with a wrong count says so."""
    cached, _ = pair()
    with keys_for([1, 2]), pytest.raises(UsageError, match="keys_for"):
        cached(X)


def test_keys_for_and_cache_keys():
    """cache_keys= given to a call is nearer than keys_for around it."""
    cached, plain = pair()
    with keys_for(range(6)):
        assert_same(cached(X, cache_keys=range(50, 56)), plain(X))
        assert_same(cached(X + 1), plain(X + 1))


def test_keys_for_is_per_thread_and_ends():
    """After the block, rows are keyed by content again, also after an error in it."""
    cached, plain = pair()
    with pytest.raises(RuntimeError), keys_for(range(6)):
        cached(X)
        raise RuntimeError
    agree(cached, plain, X + 1)


@pytest.mark.parametrize(
    "function",
    [lambda r: r, lambda r: float("nan"), lambda r: [1], lambda r: {"a": 1}, lambda r: (1, [2]), lambda r: object(),
     lambda r: np.float32(1), lambda r: r.sum(), lambda r: 1 / 0, lambda r: {1, 2}, lambda r: (float("nan"),)],
    ids=["tensor", "nan", "list", "dict", "list inside", "object", "numpy", "0-d tensor", "raises", "set", "nan inside"],  # noqa: E501
)  # fmt: skip
def test_key_function_that_gives_no_key(function):
    """A key function that answers a tensor, NaN, list or raises is an error of ours, and nothing is stored."""
    cached, _ = pair(key=function)
    with pytest.raises(KeyExtractionError) as error:
        cached(X)
    assert isinstance(error.value, TypeError)
    assert cache_of(cached).store.stats().rows == 0


def test_key_function_answers():
    """bool, int, float, str, bytes, None and tuples of these are keys, and each is another."""
    answers = [True, 1, 1.0, "1", b"1", None, (1,), (1.0,), ("1",), ((1,),), (), -0.0, 0.0]
    cached, plain = pair(key=lambda row: answers[int(row[0])])
    x = torch.arange(len(answers)).float()[:, None].expand(-1, 4)
    agree(cached, plain, x)
    assert computed(cached) == len(answers)


def test_key_function_sees_the_row_or_a_mapping():
    """With one per-row argument it gets the row itself, with several a mapping of name to row."""
    seen = []

    def of_row(row):
        seen.append(row)
        return float(row["x"].sum()) if isinstance(row, dict) else float(row.sum())

    cached, _ = pair(key=of_row)
    cached(X)
    assert isinstance(seen[0], torch.Tensor)
    assert torch.equal(seen[0], X[0])
    seen.clear()

    cached(X, bias=torch.zeros(6, 3)) if False else None

    class Both(nn.Module):
        def forward(self, x, y, flag=1):
            return x + y

    both, _ = pair(Both(), key=of_row)
    both(X, X)
    assert set(seen[0]) == {"x", "y"}


def test_unread_arguments_stay_in_the_key():
    """Arguments that an extractor does not read are part of the key."""

    class Takes(nn.Module):
        def forward(self, texts, scale, x=None):
            out = torch.tensor([[float(len(t))] for t in texts]) * scale
            return out if x is None else out + x

    for key in ("text", None):
        cached, plain = pair(Takes(), key=key)
        agree(cached, plain, ["a", "bb"], 1)
        agree(cached, plain, ["a", "bb"], 2)
        agree(cached, plain, ["a", "bb"], 2, torch.tensor([[1.0], [2.0]]))
        agree(cached, plain, ["a", "bb"], 2, torch.tensor([[3.0], [2.0]]))
    one, plain_one = pair(Takes(), key=lambda row: row if isinstance(row, str) else row["texts"])
    agree(one, plain_one, ["a", "bb"], 1)
    agree(one, plain_one, ["a", "bb"], 2)


def test_two_key_lambdas_of_one_line():
    """Two key functions of one line make two namespaces in one store."""
    one, two = (lambda row: float(row[0])), (lambda row: float(row[1]))
    store = MemoryStore(1 << 20)
    base = frozen(Encoder())
    a, b = (cached_module(copy.deepcopy(base), store=store, key=key) for key in (one, two))
    assert cache_of(a).namespace != cache_of(b).namespace
    agree(a, base, X)
    agree(b, base, X)


def test_key_function_that_closes_over_state():
    """A key function is known by what it closes over."""

    def make(place):
        return lambda row: float(row[place])

    base = frozen(Encoder())
    a, b = (cache_of(cached_module(copy.deepcopy(base), key=make(place))).namespace for place in (0, 1))
    assert a != b


# --- paths ----------------------------------------------------------------------------------------------


def reads_files(paths):
    single = isinstance(paths, str | os.PathLike)
    return torch.tensor([[float(sum(Path(p).read_bytes()))] for p in ([paths] if single else paths)])


def test_paths_by_content(tmp_path):
    """With key="path" a changed file is another row, a copy of a file is the same one."""
    a, b = tmp_path / "a.bin", tmp_path / "b.bin"
    a.write_bytes(b"aaaa"), b.write_bytes(b"bbbb")
    cached, plain = pair(Apply(reads_files), key="path")
    agree(cached, plain, [str(a), str(b)])
    a.write_bytes(b"cccc")
    agree(cached, plain, [str(a), str(b)])
    b.write_bytes(b"cccc")
    count = computed(cached)
    agree(cached, plain, [str(b)])
    assert computed(cached) == count
    agree(cached, plain, [a, b])
    agree(cached, plain, str(a))


def test_paths_same_size_and_mtime(tmp_path):
    """A file rewritten with the same size within one tick is another row."""
    a = tmp_path / "a.bin"
    cached, plain = pair(Apply(reads_files), key="path")
    for content in (b"aaaa", b"bbbb", b"cccc"):
        a.write_bytes(content)
        os.utime(a, ns=(10**18, 10**18))
        agree(cached, plain, [str(a), str(a)])


def test_paths_replaced_by_rename(tmp_path):
    """A file replaced by rename, of the same size and time stamp, is another row."""
    a, new = tmp_path / "a", tmp_path / "new"
    cached, plain = pair(Apply(reads_files), key="path")
    a.write_bytes(b"aaaa")
    os.utime(a, ns=(10**18, 10**18))
    agree(cached, plain, [str(a)])
    new.write_bytes(b"bbbb")
    os.utime(new, ns=(10**18, 10**18))
    new.replace(a)
    agree(cached, plain, [str(a)])


def test_missing_paths(tmp_path):
    """A path that does not exist raises the FileNotFoundError that opening it would."""
    cached, _ = pair(Apply(reads_files), key="path")
    with pytest.raises(FileNotFoundError):
        cached([str(tmp_path / "none")])
    with pytest.raises(IsADirectoryError):
        cached([str(tmp_path)])


def test_path_objects_by_default(tmp_path):
    """pathlib paths are keyed by the content of the file without being asked; strings are texts."""
    a = tmp_path / "a"
    a.write_bytes(b"aa")
    cached, plain = pair(Apply(reads_files))
    agree(cached, plain, [a])
    a.write_bytes(b"bb")
    agree(cached, plain, [a])


def test_path_checks(tmp_path):
    """check="name" trusts the name, "stat" sees a changed file."""
    a = tmp_path / "a"
    a.write_bytes(b"aa")
    by_name, _ = pair(Apply(reads_files), key=keys.path(check="name"))
    by_stat, plain = pair(Apply(reads_files), key=keys.path(check="stat"))
    first = by_name([str(a)])
    agree(by_stat, plain, [str(a)])
    time.sleep(0.01)
    a.write_bytes(b"bbb")
    assert torch.equal(by_name([str(a)]), first)
    agree(by_stat, plain, [str(a)])


# --- registered types -----------------------------------------------------------------------------------


def test_registered_types():
    """A registered function gives objects of a type a key; the most specific class wins."""

    class Clip:
        def __init__(self, samples, rate):
            self.samples, self.rate = samples, rate

    class Special(Clip):
        pass

    @register_key_extractor(Clip)
    def clip(c):
        return c.samples.tobytes(), c.rate

    function = lambda clips: torch.tensor([[float(c.samples.sum() * c.rate)] for c in clips])
    cached, plain = pair(Apply(function))
    clips = [Clip(np.arange(3) + i, i + 1) for i in range(4)]
    agree(cached, plain, clips)
    assert hits(cached) == 4
    agree(cached, plain, [Clip(np.arange(3), 1), Clip(np.arange(3), 2)])
    agree(cached, plain, [Special(np.arange(3), 1), Special(np.arange(3), 7)])

    @register_key_extractor(Special)
    def special(c):
        return ("special", c.samples.tobytes(), c.rate, 1)

    agree(cached, plain, [Special(np.arange(3), 1), Special(np.arange(3), 9)])
    single, plain_single = pair(Apply(lambda c: torch.tensor([[float(c.samples.sum() * c.rate)]])))
    agree(single, plain_single, clips[1])
    agree(single, plain_single, clips[2])


def test_registered_function_that_gives_no_key():
    """A registered function that answers a list is an error of ours that names the type."""

    class Bad:
        pass

    register_key_extractor(Bad)(lambda _: [1])
    cached, _ = pair(Apply(lambda b: torch.ones(len(b), 1)))
    with pytest.raises(KeyExtractionError, match="Bad"):
        cached([Bad(), Bad()])


def test_images():
    """PIL images are keyed by pixels, mode, palette and orientation."""
    Image = pytest.importorskip("PIL.Image")
    cached, plain = pair(
        Apply(
            lambda images: torch.stack(
                [torch.from_numpy(np.asarray(i.convert("RGB"), "f4")).mean((0, 1)) for i in images]
            )
        )
    )
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    agree(cached, plain, [red, blue])
    agree(cached, plain, [red.convert("L"), blue.convert("P")])
    changed = red.copy()
    changed.putpixel((1, 1), (0, 255, 0))
    agree(cached, plain, [changed, red])
    palette = blue.convert("P")
    other = palette.copy()
    other.putpalette([255, 0, 0] * 256)
    agree(cached, plain, [palette, other])
    assert bypassed(cached) == 0
    image, plain_image = pair(Apply(lambda i: torch.from_numpy(np.asarray(i.convert("RGB"), "f4")).mean((0, 1))[None]))
    agree(image, plain_image, red)
    agree(image, plain_image, blue)


def test_audio_arrays_and_dataclass_rows():
    """Lists of dataclasses that hold arrays are rows by content."""

    @dataclasses.dataclass
    class Audio:
        array: np.ndarray
        sampling_rate: int

    cached, plain = pair(Apply(lambda clips: torch.tensor([[float(c.array.sum() / c.sampling_rate)] for c in clips])))
    clips = [Audio(np.arange(4.0) + i, 16000) for i in range(3)]
    agree(cached, plain, clips)
    agree(cached, plain, [dataclasses.replace(clips[0], sampling_rate=8000), clips[1]])
    assert hits(cached) >= 3


# --- tokens ---------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Masks its padding, pools over tokens, and returns a token dimension as well."""

    def __init__(self, width=8, causal=False, ignore_mask=False):
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.mix = nn.Linear(width, width)
        self.types = nn.Embedding(4, width)
        self.ignore_mask = ignore_mask

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None, scale=1.0):
        hidden = self.embed(input_ids)
        if token_type_ids is not None:
            hidden = hidden + self.types(token_type_ids)
        if position_ids is not None:
            hidden = hidden + position_ids[..., None] * 0.1
        mask = torch.ones_like(input_ids) if attention_mask is None or self.ignore_mask else attention_mask
        scores = hidden @ hidden.transpose(1, 2) + (1 - mask[:, None, :].float()) * -1e9
        attention = scores.softmax(-1)
        hidden = torch.tanh(self.mix(attention @ hidden)) * scale
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return {"hidden": hidden, "pooled": pooled, "attentions": (attention[:, None],)}


def padded(rows, side="right", width=None):
    width = width or max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for at, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[at, where], mask[at, where] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def masked(out, mask):
    lengths = mask.sum(1).tolist()
    return {
        "hidden": [h[:n] for h, n in zip(out["hidden"], lengths, strict=True)],
        "pooled": out["pooled"],
        "attentions": [a[:, :n, :n] for a, n in zip(out["attentions"][0], lengths, strict=True)],
    }


ROWS = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10, 11], [1, 2, 3, 4], [12, 13, 14]]


@pytest.mark.parametrize("width", [8, 5, 4, 3])
def test_tokens_whatever_the_padding(width):
    """With key="tokens" a row hits whatever its neighbours' length, also when hidden size equals a token length."""
    cached, plain = pair(Tokens(width), key="tokens")
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        rows = [
            ROWS[i]
            for i in torch.randint(
                0, len(ROWS), (int(torch.randint(1, 6, (), generator=generator)),), generator=generator
            )
        ]
        call = padded(rows, width=None if torch.rand((), generator=generator) < 0.7 else 7)
        found, expected = cached(**call), plain(**call)
        assert found["hidden"].shape == expected["hidden"].shape
        assert found["attentions"][0].shape == expected["attentions"][0].shape
        assert_same(masked(found, call["attention_mask"]), masked(expected, call["attention_mask"]))
        beyond = call["attention_mask"] == 0
        assert not found["hidden"][beyond].any()
    assert computed(cached) <= len(ROWS) + 4, cache_of(cached).stats


def test_tokens_of_full_length_first():
    """A first batch without any padding says nothing wrong about token dimensions."""
    cached, plain = pair(Tokens(4), key="tokens")
    for rows in ([[1, 2, 3, 4]] * 1, [[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2], [5, 6, 7, 8]], [[1, 2]], [[9]]):
        call = padded(rows)
        assert_same(masked(cached(**call), call["attention_mask"]), masked(plain(**call), call["attention_mask"]))


def test_tokens_with_left_padding():
    """Left padding: the whole row is the key, and the answer is the plain one, padding included."""
    cached, plain = pair(Tokens(), key="tokens")
    for rows in (ROWS[:3], ROWS[2:], ROWS):
        agree(cached, plain, **padded(rows, "left"))


def test_tokens_with_other_arguments():
    """token_type_ids, position_ids and shared arguments count."""
    cached, plain = pair(Tokens(), key="tokens")
    call = padded(ROWS[:4])
    mask = call["attention_mask"]
    variants = [
        {},
        {"token_type_ids": mask * 1},
        {"token_type_ids": mask * 2},
        {"position_ids": torch.arange(mask.shape[1]).expand(4, -1)},
        {"position_ids": torch.arange(mask.shape[1]).flip(0).expand(4, -1)},
        {"scale": 2.0},
        {"scale": 3.0},
    ]
    with Quiet():
        for _ in range(2):
            for more in variants:
                found, expected = cached(**call, **more), plain(**call, **more)
                assert_same(masked(found, mask), masked(expected, mask))


def test_tokens_without_a_mask():
    """input_ids alone are keyed whole."""
    cached, plain = pair(Tokens(), key="tokens")
    with Quiet():
        agree(cached, plain, input_ids=torch.randint(0, 50, (4, 5)))
        agree(cached, plain, input_ids=torch.randint(0, 50, (4, 3)))
        agree(cached, plain, torch.randint(0, 50, (4, 3)))


def test_tokens_of_a_module_that_ignores_its_mask():
    """A module that ignores its mask is found out by key="tokens" and bypassed."""
    cached, plain = pair(Tokens(ignore_mask=True), key="tokens")
    with pytest.warns(CacheWarning, match="tokens"):
        for rows in (ROWS[:3], ROWS[2:], ROWS, ROWS[:1]):
            agree(cached, plain, **padded(rows))


def test_tokens_with_holes_and_empty_rows():
    """Masks with holes, with rows of no token, of other values or float dtype are answered as by the plain module."""
    cached, plain = pair(Tokens(), key="tokens")
    call = padded(ROWS[:4])
    hole = {**call, "attention_mask": call["attention_mask"].clone()}
    hole["attention_mask"][3, 1] = 0
    agree(cached, plain, **hole)
    floats = {**call, "attention_mask": call["attention_mask"].float()}
    found, expected = cached(**floats), plain(**floats)
    assert_same(masked(found, call["attention_mask"]), masked(expected, call["attention_mask"]))
    boolean = {**call, "attention_mask": call["attention_mask"].bool()}
    ints, plain_ints = pair(Apply(lambda input_ids, attention_mask: input_ids.float() * attention_mask), key="tokens")
    with Quiet():
        assert_same(ints(**boolean), plain_ints(**boolean))


def test_same_ids_other_length_of_mask():
    """[1, 2] padded with id 0 and [1, 2, 0] unpadded are two rows."""
    cached, plain = pair(Tokens(), key="tokens")
    one = {"input_ids": torch.tensor([[1, 2, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    two = {"input_ids": torch.tensor([[1, 2, 0]]), "attention_mask": torch.tensor([[1, 1, 1]])}
    for call in (one, two, one):
        found, expected = cached(**call), plain(**call)
        assert_same(masked(found, call["attention_mask"]), masked(expected, call["attention_mask"]))


def test_padding_note_for_default_keys():
    """With default keys, rows that miss only because of padding are noted once, with the option that would help."""
    cached, plain = pair(Tokens())
    with pytest.warns(CacheWarning, match='key="tokens"') as seen:
        for width in (5, 6, 7):
            agree(cached, plain, times=1, **padded(ROWS, width=width))
    assert len(seen) == 1


def test_arguments_that_contain_themselves():
    """What has no end has no rows either; the module is run on it."""
    table = {"x": X}
    table["table"] = table
    rows = [X[0]]
    rows.append(rows)
    for argument, function in ((table, lambda table: table["x"] * 2), (rows, lambda rows: rows[0] * 2)):
        module = cached_module(Apply(function).eval())
        with pytest.warns(CacheWarning, match="contains itself"):
            assert_same(module(argument), function(argument))


class Batch(dict):
    """A dict on which things are set."""


class UserBatch(collections.UserDict):
    """The same, of another kind."""


@pytest.mark.parametrize("kind", [Batch, UserBatch])
def test_what_is_set_on_a_mapping_counts(kind):
    """An attribute of a batch is read by the forward like its items are: a number for all rows, or one for each."""

    def batch_of(x, scale):
        made = kind(x=x)
        made.scale, made._notes = scale, object()
        return made

    module = cached_module(Apply(lambda batch: batch["x"] * batch.scale).eval())
    other = torch.cat([X[:2], X[:4] + 1])
    each = torch.arange(1.0, 7.0)[:, None]
    for x, scale in ((X, 2.0), (X, 3.0), (other, 3.0), (X, 2.0), (X, each), (other, each), (X, each.flip(0))):
        assert_same(module(batch_of(x, scale)), x * scale)
    assert dict(cache_of(module).stats.reasons) == {}
    assert hits(module) == 6 + 2 + 2
