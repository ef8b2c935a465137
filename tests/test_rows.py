"""An output taken apart into rows is the same output when it is put together again, and nothing else."""

import contextlib
import dataclasses
import json
import math
import sys
import types
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modcache.outputs import NotRowsError, UnknownClassError, rows_of, token_dims_of, tree_of, with_token_dims
from modcache.rows import SINGLE, Layout, Rows, bytes_of, join_rows, tensor_of

from .models import Encoded, EncodedData, EncodedOutput, EveryTree, StridedModel, TiedModel

CPU = torch.device("cpu")
DTYPES = [
    torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.float32, torch.float64, torch.bfloat16,
    torch.float8_e4m3fn, torch.complex64,
]  # fmt: skip


def leaf(count, number):
    """A tensor of ``count`` rows whose dtype, shape and values depend on a number."""
    dtype, shape = DTYPES[number % len(DTYPES)], [(), (2,), (0,), (3, 1)][number % 4]
    return torch.arange(number, number + count * math.prod(shape)).reshape(count, *shape).to(dtype)


def same(one, other):
    """Whether two outputs are equal in type, structure and bits."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return one.numel() == 0 or torch.equal(as_bytes(one), as_bytes(other))
    if isinstance(one, dict):
        same_keys = [(type(key), key) for key in one] == [(type(key), key) for key in other]
        return same_keys and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if dataclasses.is_dataclass(one):
        return same(vars(one), vars(other))
    return repr(one) == repr(other)


def as_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


constants = st.sampled_from(
    [None, True, False, 0, -7, 10**30, 0.0, -0.0, math.inf, -math.inf, math.nan, "", "a", "\ud800"]
)
keys = st.sampled_from(["a", "b", 1, True, None, "1"])


def trees(count):
    tensors = st.integers(0, 60).map(lambda number: leaf(count, number))
    return st.recursive(
        tensors | constants,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(keys, inner, max_size=3)
            | st.dictionaries(keys, inner, max_size=2).map(OrderedDict)
            | st.builds(Encoded, inner, inner)
            | st.builds(EncodedData, inner, inner)
            | st.builds(EncodedOutput, tensors, tensors, st.tuples(tensors, tensors))
            | st.builds(EncodedOutput, tensors)
        ),
        max_leaves=8,
    )


COUNT = 3


@given(trees(COUNT))
def test_putting_together_gives_the_output_back(output):
    """Rows of any tree are that tree again, in type, structure and bits."""
    rows = rows_of(output, COUNT, CPU)
    assert same(tree_of(rows, CPU), output)
    assert all(len(tensor) == COUNT and tensor.is_contiguous() for tensor in rows.tensors)
    assert rows.layout.leaves == tuple((tensor.dtype, tuple(tensor.shape[1:])) for tensor in rows.tensors)
    assert rows.layout.row_bytes == sum(tensor[0].nbytes for tensor in rows.tensors)


@given(trees(COUNT), st.lists(st.integers(0, COUNT - 1), max_size=5))
def test_taking_rows_is_taking_them_from_every_tensor(output, places):
    """Taken rows are those of the output, in the order asked for, with repeats."""

    def picked(value):
        if isinstance(value, torch.Tensor):
            return torch.stack([value[place] for place in places]) if places else value[:0]
        if isinstance(value, EncodedData):
            return EncodedData(picked(value.vector), picked(value.norm))
        if isinstance(value, Encoded):
            return Encoded(*map(picked, value))
        if isinstance(value, EncodedOutput):
            return EncodedOutput(**{name: picked(item) for name, item in value.items()})
        if isinstance(value, dict):
            return type(value)((key, picked(item)) for key, item in value.items())
        return type(value)(map(picked, value)) if isinstance(value, tuple | list) else value

    taken = rows_of(output, COUNT, CPU).take(places)
    assert same(tree_of(taken, CPU), picked(output))


@given(trees(COUNT))
def test_a_whole_output_is_one_row(output):
    """Without a count the output is one row, and comes back with the shapes that it had."""
    rows = rows_of(output, None, CPU)
    assert all(len(tensor) == 1 for tensor in rows.tensors)
    assert same(tree_of(rows, CPU, whole=True), output)


def test_a_whole_output_may_have_tensors_without_dimensions():
    """A loss comes back as the 0-d tensor that it was."""
    output = {"loss": torch.tensor(3.0), "table": torch.eye(2)}
    assert same(tree_of(rows_of(output, None, CPU), CPU, whole=True), output)


@pytest.mark.parametrize("model", [EveryTree(), StridedModel(), TiedModel()], ids=lambda model: type(model).__name__)
def test_outputs_of_modules(model):
    """What modules return comes back equal, detached and contiguous."""
    output = model(torch.randn(3, 3))
    rows = rows_of(output, 3, CPU)
    assert not any(tensor.requires_grad for tensor in rows.tensors)
    assert same(tree_of(rows, CPU), output)


def test_a_tensor_is_the_single_tree():
    """One tensor and nothing else has the shortest tree."""
    rows = rows_of(torch.zeros(2, 3), 2, CPU)
    assert rows.layout == Layout(SINGLE, ((torch.float32, (3,)),))
    assert rows.layout.leaf_bytes == (12,)


def test_rows_are_private():
    """Rows share no memory with the output, which may be a view of an input or a buffer."""
    output = torch.zeros(2, 3)
    rows = rows_of((output, output), 2, CPU)
    output.fill_(1)
    rows.tensors[0].fill_(2)
    assert torch.equal(rows.tensors[1], torch.zeros(2, 3))


class Slotted:
    __slots__ = ("x",)


@dataclasses.dataclass
class Derived:
    x: torch.Tensor

    def __post_init__(self):
        self.norm = self.x.norm()


@dataclasses.dataclass
class Strange(OrderedDict):
    x: object = None

    def __init__(self, only):
        OrderedDict.__init__(self, x=only)


class TaggedPair(Encoded):
    pass


def tagged(value):
    value.tag = "more"
    return value


def endless():
    found = []
    found.append(found)
    return found


X = torch.zeros(2, 3)
REFUSED = {
    "a loss": (torch.tensor(1.0), r"output has shape \(\)"),
    "time first": (
        (X, torch.zeros(5, 2)),
        r"output\[1\] has shape \(5, 2\), whose first size is not the number of rows \(2\)",
    ),
    "an object": ({"a": Slotted()}, r"output\['a'\] is a .*Slotted, which cannot be stored"),
    "a set": ({1}, "builtins.set"),
    "a default dict": (defaultdict(int, a=X), "defaultdict"),
    "a float key": ({1.0: X}, "which is no text, whole number, bool or None"),
    "a tuple key": ({(1, 2): X}, "which is no text"),
    "sparse": (torch.eye(2).to_sparse(), "not a dense tensor"),
    "meta": (X.to("meta"), "not a dense tensor"),
    "a subclass": (X.as_subclass(type("Own", (torch.Tensor,), {})), "is a Own"),
    "more than its fields": (Derived(X), "an attribute 'norm' beside its fields"),
    "a tagged output": (tagged(EncodedOutput(X)), "an attribute 'tag' beside its fields"),
    "a tagged pair": (tagged(TaggedPair(X, X)), "an attribute 'tag' beside its fields"),
    "a class of its own ways": (Strange(X), "cannot be put together again"),
    "endless": (endless(), "nested too deep"),
    "bytes": (b"a", "builtins.bytes"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_rows_is_named(kind):
    """An output that a hit could not give back is refused, naming the leaf."""
    output, message = REFUSED[kind]
    with pytest.raises(NotRowsError, match=message):
        rows_of(output, 2, CPU)


def test_a_leaf_on_another_device():
    """A tensor must be where the call's outputs are expected, or on the CPU."""
    rows = rows_of((X, X), 2, torch.device("cuda", 0))
    assert json.loads(rows.layout.tree) == ["tuple", [{"on": "cpu"}, {"on": "cpu"}]]
    assert same(tree_of(rows, torch.device("meta")), (X, X))
    assert tree_of(rows_of(X, 2, CPU), torch.device("meta")).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_a_leaf_on_a_third_device():
    """A tensor that is neither where the call is nor on the CPU cannot be stored."""
    with pytest.raises(NotRowsError, match="neither on cpu"):
        rows_of(X.cuda(), 2, CPU)


# --- what a store may hand in ---------------------------------------------------------------------------

HEAD = ["none", "bool", "int", "float", "str", "tuple", "list", "dict", "data", "named", "output", "eval", "", None, 3]
texts = st.sampled_from(
    ["builtins", "os", "dict", "eval", "system", "__class__", "__dict__", "x", "vector", "norm", "0x1p3", "zz",
     EncodedData.__module__, "EncodedData", "Encoded", "EncodedOutput", "OrderedDict", "collections",
     "dataclasses", "Popen", "subprocess", "nan", "last_hidden_state", "..", "", "tests.models"]
)  # fmt: skip
nodes = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.just({}) | st.sampled_from(HEAD),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["on", "tokens", "x"]), inner, max_size=2)
        | st.tuples(st.sampled_from(HEAD), inner).map(list)
        | st.tuples(st.sampled_from(HEAD), texts, texts, st.lists(st.tuples(inner, inner).map(list), max_size=3)).map(
            list
        )
    ),
    max_leaves=12,
)


def rows_with(tree, count=1):
    tensors = tuple(torch.zeros(2, 3) for _ in range(count))
    return Rows(Layout(tree, ((torch.float32, (3,)),) * count), tensors)


@given(nodes, st.integers(0, 3))
def test_a_hostile_tree_gives_an_output_or_is_unknown(node, count):
    """Whatever JSON lies in a store, it is an output or an `UnknownClassError`; no other error escapes."""
    tree = json.dumps(node)
    with contextlib.suppress(UnknownClassError):
        tree_of(rows_with(tree, count), CPU)
    try:
        dims = token_dims_of(tree)
    except UnknownClassError:
        return
    assert all(isinstance(dim, int) for own in dims for dim in own)


DATA = [EncodedData.__module__, "EncodedData"]
HOSTILE = {
    "no JSON": "{",
    "a number": "7",
    "nothing": "",
    "deep": "[" * 100_000,
    "deep tuples": '["tuple",[' * 5000 + "{}" + "]]" * 5000,
    "more leaves than tensors": '["tuple",[{},{}]]',
    "more tensors than leaves": '["none"]',
    "a key of no hash": '["dict","builtins","dict",[[["list",[]],{}]]]',
    "a tensor as key": '["dict","builtins","dict",[[{},{}]]]',
    "another class": json.dumps(["data", *DATA, [["__class__", {}]]]),
    "another dict": json.dumps(["data", *DATA, [["__dict__", {}]]]),
    "too few fields": json.dumps(["data", *DATA, [["vector", {}]]]),
    "a short pair": json.dumps(["named", Encoded.__module__, "Encoded", [["vector", {}]]]),
    "a field that is none": json.dumps(["output", EncodedOutput.__module__, "EncodedOutput", [[["str", "x"], {}]]]),
    "not of that kind": json.dumps(["named", *DATA, [["vector", {}], ["norm", ["none"]]]]),
    "a function": '["data","os","system",[]]',
    "a class that runs": '["output","subprocess","Popen",[[["str","args"],["str","true"]]]]',
    "a module": '["data","os","path",[]]',
    "an unknown module": '["data","not_there","X",[]]',
    "no text": '["data",1,2,[]]',
    "an unknown kind": '["eval","builtins","dict",[]]',
    "a wrong number": '["int","zz"]',
    "an argument too many": '["none",1]',
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_trees_are_unknown(kind):
    """A structure that this process cannot or must not build counts as missing."""
    with pytest.raises(UnknownClassError):
        tree_of(rows_with(HOSTILE[kind]), CPU)


def test_a_single_tree_without_a_tensor():
    """The shortest tree with no or two tensors is damage."""
    for count in (0, 2):
        with pytest.raises(UnknownClassError):
            tree_of(rows_with(SINGLE, count), CPU)


def test_looking_for_a_class_imports_nothing(monkeypatch):
    """A module that loads its parts when they are asked for is not asked."""

    def explode(name):
        raise AssertionError(f"asked for {name}")

    lazy = types.ModuleType("lazy_module")
    lazy.__getattr__ = explode
    monkeypatch.setitem(sys.modules, "lazy_module", lazy)
    with pytest.raises(UnknownClassError, match=r"lazy_module\.Thing is not loaded in this process"):
        tree_of(rows_with('["data","lazy_module","Thing",[]]'), CPU)


def test_a_class_is_found_by_its_name():
    """A class that no output of this process had yet is found where it was defined."""
    tree = json.dumps(["data", "dataclasses", "no", []])
    with pytest.raises(UnknownClassError):
        tree_of(rows_with(tree), CPU)
    module = types.ModuleType("made_here")
    holder = type("Holder", (), {"Inner": dataclasses.make_dataclass("Inner", ["x"])})
    module.Holder = holder
    sys.modules["made_here"] = module
    try:
        found = tree_of(rows_with('["data","made_here","Holder.Inner",[["x",{}]]]'), CPU)
    finally:
        del sys.modules["made_here"]
    assert type(found) is holder.Inner
    assert same(found.x, torch.zeros(2, 3))


def test_the_initialiser_of_a_dataclass_is_not_asked():
    """A dataclass comes back by its fields, also when making one would compute or refuse."""

    @dataclasses.dataclass(frozen=True)
    class Fussy:
        x: torch.Tensor

        def __post_init__(self):
            if self.x.shape[0] != 2:
                raise AssertionError("two rows only")

    rows = rows_of(Fussy(X), 2, CPU).take([0])
    assert same(tree_of(rows, CPU).x, X[:1])


def test_out_of_memory_is_not_damage(monkeypatch):
    """A device that is full says so, instead of being taken for a damaged record."""
    rows = rows_of((X,), 2, CPU)

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(MemoryError):
        tree_of(rows, CPU)


# --- bytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (2, 2)], ids=str)
def test_bytes_there_and_back(dtype, shape):
    """The byte matrix of rows is those rows again, bit by bit, in a tensor of their dtype."""
    tensor = torch.randint(0, 2, (4, *shape)).to(dtype)
    matrix = bytes_of(tensor)
    back = tensor_of(matrix.copy(), dtype, shape)
    assert matrix.shape == (4, dtype.itemsize * math.prod(shape))
    assert same(back, tensor)
    assert not back.requires_grad


@pytest.mark.parametrize("tensor", [torch.ones(4, 2)[:1, ::2], torch.ones(4, 3, 2)[:1, :1, 0]], ids=["row", "part"])
def test_bytes_of_one_value_with_a_stride(tensor):
    """A tensor of one value is contiguous whatever its strides are."""
    assert tensor.stride(-1) > 1
    assert torch.equal(tensor_of(bytes_of(tensor), tensor.dtype, tuple(tensor.shape[1:])), tensor)


def test_bytes_of_strided_and_no_rows():
    """Rows that do not lie behind each other, and no rows at all, have byte matrices, too."""
    tensor = torch.arange(6.0).reshape(2, 3).t()
    assert bytes_of(tensor).tobytes() == tensor.contiguous().numpy().tobytes()
    assert bytes_of(torch.zeros(0, 3)).shape == (0, 0)
    assert tensor_of(np.empty((0, 12), np.uint8), torch.float32, (3,)).shape == (0, 3)


def test_a_tensor_of_bytes_takes_part_in_autograd():
    """What numpy has no dtype for can be changed in place by something that requires grad."""
    made = tensor_of(np.zeros((2, 4), np.uint8), torch.bfloat16, (2,))
    made += torch.ones((), dtype=torch.bfloat16, requires_grad=True)
    assert made.requires_grad


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=8), st.integers(0, 60))
def test_joined_rows_stand_where_they_belong(owners, number):
    """Every place is filled from the part that names it."""
    whole = rows_of((leaf(len(owners), number), leaf(len(owners), number + 1)), len(owners), CPU)
    parts = []
    for name in dict.fromkeys(owners):
        places = [place for place, owner in enumerate(owners) if owner == name]
        parts.append((np.array(places), whole.take(places)))
    assert same(tree_of(join_rows(len(owners), parts), CPU), tree_of(whole, CPU))


def test_joined_rows_on_a_device():
    """Parts are brought to the device of the last one."""
    meta = Rows(Layout(SINGLE, ((torch.float32, (3,)),)), (torch.zeros(1, 3, device="meta"),))
    cpu = rows_of(torch.zeros(1, 3), 1, CPU)
    joined = join_rows(2, [(np.array([0]), cpu), (np.array([1]), meta)])
    assert joined.tensors[0].device.type == "meta"
    assert joined.tensors[0].shape == (2, 3)


# --- token dimensions -----------------------------------------------------------------------------------


def test_token_dims_are_written_at_the_leaves():
    """Which dimensions are tokens is part of the tree, and does not change what it builds."""
    rows = rows_of({"a": X, "b": (X, None)}, 2, CPU)
    tree = with_token_dims(rows.layout.tree, [(0,), ()])
    assert token_dims_of(tree) == ((0,), ())
    assert token_dims_of(rows.layout.tree) == ((), ())
    assert with_token_dims(rows.layout.tree, [(), ()]) == rows.layout.tree
    assert same(tree_of(Rows(Layout(tree, rows.layout.leaves), rows.tensors), CPU), {"a": X, "b": (X, None)})


def test_parameters_are_tensors():
    """A module may return a parameter of its own; what is stored is a plain tensor."""
    rows = rows_of(nn.Parameter(torch.ones(2, 3)), 2, CPU)
    assert type(rows.tensors[0]) is torch.Tensor
    assert same(tree_of(rows, CPU), torch.ones(2, 3))
