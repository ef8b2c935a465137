"""A call is parted into rows and what they share; all rows of a call are the call again."""

import dataclasses
import types
import warnings
from collections import OrderedDict, UserDict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BatchEncoding

from modcache import cache_of, cached_module
from modcache.batch import NoRowsError, row, split, take
from modcache.keys.registry import is_row

from .models import EncodedOutput

COUNT = 3


class Pair(NamedTuple):
    x: object
    y: object


@dataclasses.dataclass
class Data:
    x: object
    y: object


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: object


def parted(*broadcast, **arguments):
    return split(list(arguments.items()), frozenset(broadcast), is_row)


def same(one, other):
    """Whether two arguments are equal in type, structure and values."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict | UserDict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if dataclasses.is_dataclass(one):
        return all(same(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one))
    return one is other or one == other


leaves = st.sampled_from(
    [
        torch.arange(COUNT * 2).reshape(COUNT, 2),
        torch.arange(float(COUNT)),
        np.arange(COUNT),
        ["a", "b", "c"],
        ("a", "b", "c"),
        [1, None, "x"],
        torch.tensor(7),
        torch.arange(9),
        np.float32(3),
        "text",
        None,
        2.5,
        [*"seventy"],
    ]
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.tuples(inner, inner)
        | st.dictionaries(st.sampled_from(["a", "b", 1]), inner, max_size=3)
        | st.dictionaries(st.sampled_from("ab"), inner, max_size=2).map(OrderedDict)
        | st.dictionaries(st.sampled_from("ab"), inner, max_size=2).map(BatchEncoding)
        | st.builds(Pair, inner, inner)
        | st.builds(Data, inner, inner)
        | st.builds(Frozen, inner)
    ),
    max_leaves=6,
)
FIRST = torch.arange(COUNT)


@given(trees)
def test_all_rows_are_the_call_again(tree):
    """Taking every row in order gives an equal argument of the same types, and leaves the caller's alone."""
    batch = parted(first=FIRST, tree=tree)
    assert batch.size == COUNT
    taken = take(tree, batch, range(COUNT), "tree")
    assert same(taken, tree)


@given(trees, st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=4))
def test_taken_rows_are_the_rows_one_by_one(tree, places):
    """Rows taken together are those taken alone, and those that a key function sees."""
    batch = parted(first=FIRST, tree=tree)
    together = parted(first=FIRST[places], tree=take(tree, batch, places, "tree"))
    bound = [("first", FIRST), ("tree", tree)]
    for number, place in enumerate(places):
        here = row([("first", FIRST[places]), ("tree", take(tree, batch, places, "tree"))], together, number)
        there = row(bound, batch, place)
        assert same(here, there)


@given(trees)
def test_what_is_shared_stays_the_very_same_object(tree):
    """An argument without a row in it is not copied."""
    batch = parted("tree", first=FIRST, tree=tree)
    assert [column.path for column in batch.columns] == ["first"]
    assert take(tree, batch, [1], "tree") is tree


def test_taking_does_not_touch_the_callers_mapping():
    """A mapping that was taken from keeps its items."""
    for cls in (dict, OrderedDict, BatchEncoding):
        whole = cls({"x": FIRST, "n": 5})
        found = take(whole, parted(batch=whole), [2], "batch")
        assert torch.equal(found["x"], torch.tensor([2]))
        assert torch.equal(whole["x"], FIRST)
        assert type(found) is cls
    output = EncodedOutput(FIRST)
    assert torch.equal(take(output, parted(batch=output), [2], "batch").last_hidden_state, torch.tensor([2]))
    assert torch.equal(output.last_hidden_state, FIRST)


SIZES = {
    "tensor": (FIRST, 3),
    "array": (np.zeros((4, 2)), 4),
    "list": (["a"], 1),
    "tuple of texts": (("a", "b"), 2),
    "tensors in a tuple": ((torch.zeros(2), torch.zeros(2)), 2),
    "dict": ({"n": 7, "x": torch.zeros(5, 1)}, 5),
    "bare text": ("abc", 1),
    "bare bytes": (b"abc", 1),
    "no rows": (torch.zeros(0, 3), 0),
    "rows without elements": (torch.zeros(3, 0), 3),
}


@pytest.mark.parametrize("kind", SIZES)
def test_size(kind):
    """The number of rows is the first size of the first argument that has one."""
    value, size = SIZES[kind]
    assert parted(x=value).size == size


def test_the_first_argument_decides():
    """A list or tensor of another length is shared, as are numbers, texts and 0-d tensors."""
    batch = parted(
        a=3, b=FIRST, c=torch.zeros(5), d=["x"], e="abc", f=torch.tensor(1), g=["x", "y", "z"], h=np.array(1)
    )
    assert [column.path for column in batch.columns] == ["b", "g"]
    assert [path for path, _ in batch.shared] == ["a", "c", "d", "e", "f", "h"]


def test_nested_tensors_have_no_rows():
    """A nested tensor has no sizes to go by, so it is shared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    batch = parted(x=nested, y=FIRST)
    assert [column.path for column in batch.columns] == ["y"]


def test_broadcast_by_name_and_by_path():
    """What is named in broadcast is shared although its size is the batch's; a part of an argument by its path."""
    assert [column.path for column in parted("y", x=FIRST, y=FIRST).columns] == ["x"]
    batch = parted("b['y']", b={"x": FIRST, "y": FIRST})
    assert [column.path for column in batch.columns] == ["b['x']"]
    assert parted("x", x=FIRST, y=torch.zeros(7)).size == 7


def test_bare_rows():
    """Without a batched argument, texts and paths are one row, unless they are broadcast."""
    batch = parted("option", text="abc", number=3, option="mean")
    assert [(column.path, column.single) for column in batch.columns] == [("text", True)]
    assert [path for path, _ in batch.shared] == ["number", "option"]
    assert take("abc", batch, [0], "text") == "abc"
    assert row([("text", "abc")], batch, 0) == "abc"


NO_ROWS = [
    {"x": 3},
    {"x": torch.tensor(1)},
    {"x": None},
    {},
    {"x": {}},
    {"x": ()},
    {"x": object()},
    {"x": {2.5: FIRST}},
]


@pytest.mark.parametrize("arguments", NO_ROWS, ids=str)
def test_no_rows(arguments):
    """A call without a list, an array, a tensor or a row by itself has no rows."""
    with pytest.raises(NoRowsError, match="no argument has rows"):
        parted(**arguments)


def test_containers_are_recorded():
    """Class and length of the structures around the rows are facts of the call."""
    batch = parted(x=Pair({"a": FIRST}, (FIRST, [])))
    assert [(path, length) for path, _, length in batch.containers] == [("x", 2), ("x.x", 1), ("x.y", 2)]
    assert batch.containers[0][1] == f"{__name__}.Pair"


def test_paths_of_odd_keys_are_told_apart():
    """A key that looks like a path is not taken for one."""
    odd = {"a']['b": FIRST, "a": {"b": FIRST + 1}, 1: FIRST + 2, "1": FIRST + 3}
    batch = parted(x=odd)
    assert len({column.path for column in batch.columns}) == 4
    assert same(take(odd, batch, range(COUNT), "x"), odd)


def test_rows_of_a_key_function():
    """One per-row argument gives the row itself, several a mapping of name to row; structures are rebuilt."""
    assert row([("x", ["a", "b"]), ("n", 3)], parted(x=["a", "b"], n=3), 1) == "b"
    several = [("x", ["a", "b"]), ("y", torch.tensor([1, 2]))]
    assert row(several, parted(x=["a", "b"], y=torch.tensor([1, 2])), 1) == {"x": "b", "y": torch.tensor(2)}
    data = Data(["a", "b"], {"k": ("c", "d")})
    found = row([("x", data)], parted(x=data), 0)
    assert found == Data("a", {"k": "c"})


class Doubling(nn.Module):
    """Reads one tensor out of whatever it gets."""

    def __init__(self, read):
        super().__init__()
        self.read = read

    def forward(self, batch):
        return 2 * self.read(batch)


def test_a_mapping_that_cannot_be_rebuilt_breaks_nothing():
    """A read-only mapping is one thing that all rows share; the module's output is right."""
    cached = cached_module(Doubling(lambda batch: batch["x"]), freeze=True)
    batch = types.MappingProxyType({"x": FIRST})
    with pytest.warns(UserWarning, match="no argument has rows"):
        first = cached(batch)
    assert torch.equal(first, 2 * FIRST)
    assert torch.equal(cached(batch), 2 * FIRST)


def test_what_was_set_on_a_dataclass_is_in_the_key():
    """An attribute beside the fields, which the forward may read, makes another call."""
    cached = cached_module(Doubling(lambda batch: batch.x * batch.scale), freeze=True)
    for scale in (1, 2, 1, 2):
        data = Data(FIRST, None)
        data.scale = scale
        assert torch.equal(cached(data), 2 * FIRST * scale)
        data.scale = FIRST + scale
        assert torch.equal(cached(data), 2 * FIRST * (FIRST + scale))
    assert cache_of(cached).stats.hits == 4 * COUNT


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("shape", [(6,), (6, 2), (6, 2, 2, 2)], ids=str)
def test_rows_of_dtypes_that_torch_cannot_index(dtype, shape):
    """Rows of any dtype and rank are taken, put together and served, in the memory format that they had."""
    values = (torch.arange(torch.Size(shape).numel(), dtype=torch.uint8) % 7).view(shape)
    x = values.to(dtype)
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
        values = values.contiguous(memory_format=torch.channels_last)
    batch = split([("x", x)], frozenset(), is_row)
    taken = take(x, batch, [4, 1, 1], "x")
    assert torch.equal(taken.to(torch.float32), values[[4, 1, 1]].to(torch.float32))
    assert taken.stride() == values[[4, 1, 1]].stride()
    cached = cached_module(Same(), freeze=True)
    for places in ([0, 1, 2, 3], [0, 0, 3], [5, 1], [5], [2, 4, 4]):
        own = take(x, batch, places, "x")
        assert torch.equal(cached(own).to(torch.float32), own.to(torch.float32))
    assert cache_of(cached).stats.bypassed == 0


class Same(nn.Module):
    """Gives what it is given, in new memory."""

    def forward(self, x):
        return x.clone()
