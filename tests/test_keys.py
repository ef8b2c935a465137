"""Keys tell rows apart exactly where their inputs differ, and are the same for the same input everywhere."""

import json
import pathlib
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import modcache
from modcache import CacheWarning, KeyExtractionError, UsageError, UsageTypeError, cache_of, cached_module, keys
from modcache.arguments import Binder
from modcache.batch import Column, split
from modcache.digest import digest
from modcache.keys import Extractor, parts
from modcache.keys.extractors import extractor_of
from modcache.keys.keyed import Given, given_keyed
from modcache.keys.parts import Values, part_of, row_keys, shared_digests
from modcache.keys.registry import is_row
from modcache.tensors import NoContentError

from .models import CountingEncoder, Scaled, TextEncoder, encoder

GOLDEN = Path(__file__).parent / "golden" / "keys-v1.json"


def keyed(extractor=None, **arguments):
    bound = list(arguments.items())
    return extractor_of(extractor)(bound, split(bound, frozenset(), is_row))


def keys_of(extractor=None, **arguments):
    return keyed(extractor, **arguments).keys


# --- golden ---------------------------------------------------------------------------------------------

X = torch.arange(6.0).reshape(3, 2)
BOOLEAN = torch.tensor([True, False, True])  # a row that occurs twice
GOLDEN_INPUTS = {
    "texts": lambda: keys_of(x=["", "a", "Grüße", "\ud800"]),
    "texts in a tuple": lambda: keys_of(x=("a", "b")),
    "one text": lambda: keys_of(x="a"),
    "bytes": lambda: keys_of(x=[b"a", b""]),
    "numbers": lambda: keys_of(x=[1, 1.0, True, None, 2**70, -1]),
    "nested": lambda: keys_of(x=[("a", 1), ["a", 1], {"a": 1}]),
    "float32": lambda: keys_of(x=X),
    "float64": lambda: keys_of(x=X.double()),
    "bfloat16": lambda: keys_of(x=X.bfloat16()),
    "complex64": lambda: keys_of(x=X.to(torch.complex64)),
    "bool": lambda: keys_of(x=BOOLEAN[:2]),
    "int64": lambda: keys_of(x=torch.arange(3)),
    "large rows": lambda: keys_of(x=torch.arange(3 * 3000, dtype=torch.int32).reshape(3, 3000)),
    "array": lambda: keys_of(x=np.arange(6, dtype=np.int32).reshape(3, 2)),
    "array of objects": lambda: keys_of(x=np.array(["a", 1, None], object)),
    "tensors in a list": lambda: keys_of(x=[torch.zeros(2), torch.zeros(3)]),
    "two tensors": lambda: keys_of(a=X, b=torch.arange(3)),
    "tensor and text": lambda: keys_of(a=X, b=["a", "b", "c"]),
    "shared number": lambda: keys_of(a=X, scale=2),
    "shared mapping": lambda: keys_of(a=X, options={"size": 2, "mask": torch.eye(2)}),
    "mapping of tensors": lambda: keys_of(batch={"a": X, "b": BOOLEAN}),
    "tokens": lambda: keys_of(
        "tokens", input_ids=torch.tensor([[5, 6], [7, 0]]), attention_mask=torch.tensor([[1, 1], [1, 0]])
    ),
    "path by name": lambda: keys_of(keys.path("name"), x=["a/b", pathlib.PurePosixPath("c")]),
    "given ints": lambda: given_keyed(Given([1, -2]), split([("x", X[:2])], frozenset(), is_row)).keys,
    "given texts": lambda: given_keyed(Given(["a", ("b", 3)]), split([("x", X[:2])], frozenset(), is_row)).keys,
}


@pytest.mark.parametrize("name", GOLDEN_INPUTS)
def test_golden_keys(name):
    """Keys are those that the first version made; a store that outlived it still knows them.

    The file is written once. Another scheme gets another KEY_SCHEME and a file of its own; this one is never
    regenerated to make a test green.
    """
    golden = json.loads(GOLDEN.read_text())["keys"]
    assert [key.hex() for key in GOLDEN_INPUTS[name]()] == golden[name]


def test_golden_keys_are_all_there():
    """Every golden key is still compared, and none occurs twice."""
    golden = json.loads(GOLDEN.read_text())
    assert golden["keys"].keys() == GOLDEN_INPUTS.keys()
    assert golden["key_scheme"] == modcache.digest.KEY_SCHEME
    everything = [key for found in golden["keys"].values() for key in found]
    assert len(set(everything)) == len(everything)


def test_golden_file_key(tmp_path):
    """The key of a file is that of its content, on every machine."""
    (tmp_path / "a").write_bytes(b"content")
    golden = json.loads(GOLDEN.read_text())["file"]
    assert [key.hex() for key in keys_of("path", x=[str(tmp_path / "a")])] == golden


# --- columns --------------------------------------------------------------------------------------------

tricky = st.sampled_from([1, 1.0, True, "1", b"1", None, 0.0, -0.0, "", "a", (1,), [1]])


@given(st.lists(tricky, min_size=1, max_size=6))
def test_objects_in_a_list_by_type_and_value(rows):
    """Rows of plain objects have one key exactly if they are of one type and value."""
    found = keys_of(x=[*rows, ...])
    exact = [(type(row).__name__, repr(row)) for row in rows]
    assert [found.index(key) for key in found[:-1]] == [exact.index(pair) for pair in exact]


@given(st.lists(st.text(max_size=4), min_size=1, max_size=6), st.permutations(range(6)))
def test_a_key_does_not_depend_on_its_neighbours(texts, order):
    """A row has the key that it has alone, at whatever place."""
    order = [place for place in order if place < len(texts)]
    found = keys_of(x=texts)
    assert [keys_of(x=[text])[0] for text in texts] == found
    assert keys_of(x=[texts[place] for place in order]) == [found[place] for place in order]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=6), st.sampled_from([1, 3000]))
def test_two_arguments_both_count(pairs, width):
    """A row of two arguments has one key exactly if both are equal, small or large."""
    a = torch.tensor([[pair[0]] * width for pair in pairs])
    b = torch.tensor([[pair[1]] for pair in pairs], dtype=torch.int8)
    found = keys_of(a=a, b=b)
    assert [found.index(key) for key in found] == [pairs.index(pair) for pair in pairs]
    if [pair[::-1] for pair in pairs] != pairs:
        assert keys_of(a=b, b=a) != found


DIFFERENT_FORMS = {
    "argument name": ({"a": X}, {"b": X}),
    "dtype": ({"a": X}, {"a": X.double()}),
    "trailing shape": ({"a": X}, {"a": X.reshape(3, 1, 2)}),
    "tensor and array": ({"a": X}, {"a": X.numpy()}),
    "list and tuple": ({"a": ["x", "y"]}, {"a": ("x", "y")}),
    "bare text": ({"a": "x"}, {"a": ["x"]}),
    "dict key": ({"a": {"k": X}}, {"a": {"l": X}}),
    "dict key type": ({"a": {1: X}}, {"a": {"1": X}}),
    "container": ({"a": (X, X)}, {"a": {0: X, 1: X}}),
    "texts and paths": ({"a": ["x"]}, {"a": [pathlib.PurePath("x")]}),
    "shared type": ({"a": X, "s": 1}, {"a": X, "s": True}),
    "shared float": ({"a": X, "s": 1}, {"a": X, "s": 1.0}),
    "shared zero": ({"a": X, "s": 0.0}, {"a": X, "s": -0.0}),
    "shared tensor": ({"a": X, "s": torch.tensor(1.0)}, {"a": X, "s": torch.tensor(2.0)}),
    "shared absent": ({"a": X, "s": None}, {"a": X}),
    "shared list": ({"a": X, "s": ["ab"]}, {"a": X, "s": ["a", "b"]}),
    "shared name": ({"a": X, "s": 1}, {"a": X, "t": 1}),
    "byte order": ({"a": np.arange(3, dtype="<i4")}, {"a": np.arange(3, dtype=">i4")}),
    "field names": ({"a": np.zeros(3, [("x", "i4")])}, {"a": np.zeros(3, [("y", "i4")])}),
}


@pytest.mark.parametrize("kind", DIFFERENT_FORMS)
def test_what_rows_have_in_common_is_in_their_keys(kind, tmp_path, monkeypatch):
    """No row of a call of one form has the key of a row of a call of another form."""
    monkeypatch.chdir(tmp_path)
    Path("x").write_bytes(b"x")
    if kind == "texts and paths":
        one, other = {"a": ["x"]}, {"a": [Path("x")]}
    else:
        one, other = DIFFERENT_FORMS[kind]
    assert not set(keys_of(**one)) & set(keys_of(**other))


def test_small_matrices_are_those_of_their_digests():
    """Rows are laid side by side as the bytes that they are; strided, offset and conjugated ones, too."""
    z = torch.complex(X, -X)
    for tensor, plain in [(X.t(), X.t().contiguous()), (X[1:], X[1:].clone()), (z.conj(), z.conj().resolve_conj())]:
        meta = ("x", "tensor", tensor.dtype, tuple(tensor.shape[1:]))
        assert Values(meta, tensor).matrix().tobytes() == Values(meta, plain).matrix().tobytes()
    assert Values(("x",), torch.zeros(2, 0)).matrix() is None
    assert Values(("x",), torch.zeros(2, 2000)).matrix() is None
    assert keys_of(a=torch.zeros(2, 0), b=X[:2]) != keys_of(a=torch.zeros(2, 0), b=X[1:])


def test_arrays_are_their_values():
    """Strides, byte order within the dtype, read-only memory and emptiness do not change an array's rows."""
    array = np.arange(6, dtype=np.float32).reshape(3, 2)
    expected = keys_of(x=array)
    frozen = array.copy()
    frozen.flags.writeable = False
    for other in (np.asfortranarray(array), np.repeat(array, 2, axis=1)[:, ::2], frozen):
        assert keys_of(x=other) == expected
    assert len(set(keys_of(x=np.zeros((3, 0))))) == 1
    assert len(set(keys_of(x=np.array(["a", "b", "a"])))) == 2


def test_array_subclasses(tmp_path):
    """A memory map has rows; a masked array has no key, for its rows are more than their values."""
    mapped = np.memmap(tmp_path / "values", np.int64, "w+", shape=(3, 2))
    mapped[:] = [[1, 2], [3, 4], [1, 2]]
    first, second, third = keys_of(x=mapped)
    assert first == third != second
    with pytest.raises(NoContentError, match="MaskedArray"):
        keys_of(x=np.ma.array([[1, 2], [3, 4]], mask=[[0, 1], [0, 0]]))


class Own(torch.Tensor):
    """A tensor that may hold more than its values."""


def test_no_content_is_named():
    """The argument without content is named, per row or shared."""
    with pytest.raises(NoContentError, match=r"x is a .*Own, which has no content"):
        keys_of(x=X.as_subclass(Own))
    with pytest.raises(NoContentError, match=r"s: an object of type builtins\.object has no content"):
        keys_of(x=X, s=object())
    with pytest.raises(NoContentError, match="has no content"):
        keys_of(x=[object()])


def test_parts_of_columns():
    """A part knows the form of its column; texts and objects have no matrix."""
    column = Column("x", "x", ["a", "b"])
    assert part_of(column).meta == ("x", "text", "list", False)
    assert part_of(column).matrix() is None
    assert part_of(Column("x", "x", [1, 2])).matrix() is None
    assert row_keys([part_of(column)], 1) == [digest(b"a", 1), digest(b"b", 1)]


def test_shared_arguments_have_digests():
    """Each shared argument has a digest of its own, so that an explanation can name it."""
    batch = split([("x", X), ("s", 1), ("t", "a")], frozenset(), is_row)
    other = split([("x", X), ("s", 2), ("t", "a")], frozenset(), is_row)
    one, two = dict(shared_digests(batch)), dict(shared_digests(other))
    assert one["s"] != two["s"]
    assert one["t"] == two["t"]


# --- extractors -----------------------------------------------------------------------------------------


def test_names():
    """An extractor says what it goes by; options and names are two ways to the same."""
    named = {name: extractor_of(name).name for name in ("text", "path", "tensor", "tokens")}
    assert named == {"text": "text", "path": "path, by content", "tensor": "tensor", "tokens": "tokens"}
    assert extractor_of(None).name == "by type"
    assert keys.path("stat").name == "path, by stat"
    assert extractor_of(len).name == "custom len"
    assert keys.custom(lambda row: row).name == "custom test_names.<locals>.<lambda>"
    assert extractor_of(keys.text()) == keys.text() == extractor_of("text")
    assert extractor_of(len).function is len
    assert extractor_of(None).function is None


class Callable:
    """A key function that is an object."""

    def __call__(self, row):
        return row[0]


def test_objects_as_key_functions():
    """Any callable will do; it is called by its class."""
    assert extractor_of(Callable()).name == "custom Callable"
    assert len(set(keys_of(Callable(), x=["ab", "ac", "bc"]))) == 2


def test_classes_as_key_functions():
    """What makes a key of a row may be a class, of Python's own or of the user's."""
    assert keys_of(str, x=["ab", "ac", "ab"]) == keys_of(str, x=["ab", "ac", "ab"])
    assert len(set(keys_of(len, x=["ab", "ac", "a"]))) == 2
    assert len(set(keys_of(tuple, x=["ab", "ac", "ab"]))) == 2


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        ("texts", UsageError, "key must be one of 'text', 'path', 'tensor', 'tokens', .*; found 'texts'"),
        (7, UsageTypeError, "key must be a name, an extractor .*; found 7"),
        (keys.path, UsageTypeError, "found the function keys.path, which makes one: call it"),
        (keys.custom, UsageTypeError, "found the function keys.custom, which makes one: call it"),
        (Extractor, UsageTypeError, "key must be a name, an extractor .*; found <class .*Extractor'>"),
    ],
    ids=["name", "number", "maker", "custom", "class"],
)
def test_no_extractor(key, error, message):
    """What is no extractor is refused, when the module is wrapped."""
    with pytest.raises(error, match=message):
        extractor_of(key)
    with pytest.raises(error, match=message):
        cached_module(nn.Identity(), key=key)


def test_constructors_check():
    """`path` knows three checks, `custom` takes a function."""
    with pytest.raises(UsageError, match=r"path\(check=...\) must be one of 'content', 'stat', 'name'; found 'size'"):
        keys.path("size")
    with pytest.raises(UsageTypeError, match=r"custom\(...\) takes a function of one row; found 3"):
        keys.custom(3)


def test_reading():
    """An extractor knows whether there is anything in a batch that it is for."""

    def reads(extractor, value):
        return extractor.reads(split([("x", value)], frozenset(), is_row))

    assert [reads(keys.text(), value) for value in (["a"], "a", [1], X, [])] == [True, True, False, False, False]
    assert [reads(keys.tensor(), value) for value in (X, X.numpy(), ["a"])] == [True, True, False]
    assert [reads(keys.path(), value) for value in (["a"], [b"a"], "a", [1])] == [True, True, True, False]
    assert reads(Extractor(), [object()])
    assert reads(keys.custom(len), X)


def test_paths_beside_other_arguments():
    """Only paths are read as paths; numbers beside them stay in the key."""
    one = keys_of(keys.path("name"), x=["a", "a", "b"], n=torch.tensor([1, 2, 1]))
    assert len(set(one)) == 3
    assert keys_of(keys.path("name"), x="a") != keys_of(keys.path("name"), x="b")


def test_custom_keys_go_by_what_the_function_says():
    """Rows with one answer have one key, whatever else they hold; 1, True and "1" are three answers."""
    rows = [{"id": 1, "noise": 3}, {"id": True}, {"id": "1"}, {"id": 1}, {"id": None}, {"id": (1, "a")}, {"id": 1.0}]
    found = keys_of(lambda row: row["id"], x=rows)
    assert found[0] == found[3]
    assert len(set(found)) == 6


def test_custom_keys_of_several_arguments():
    """With several per-row arguments, the function gets a mapping of name to row; what is shared stays in the key."""
    seen = []

    def key(row):
        seen.append(row)
        return row["b"]

    first = keys_of(key, a=["x", "y"], b=[3, 4], s=2)
    assert seen == [{"a": "x", "b": 3}, {"a": "y", "b": 4}]
    assert keys_of(key, a=["z", "z"], b=[3, 4], s=2) == first
    assert keys_of(key, a=["z", "z"], b=[3, 4], s=3) != first


def test_custom_keys_of_whole_calls():
    """With per_row=False a key function gets the only argument, or a mapping of name to argument."""
    seen = []

    def by_sum(value):
        seen.append(value)
        return float(value["x"].sum() if isinstance(value, dict) else value.sum())

    cached = cached_module(Scaled(), freeze=True, per_row=False, key=by_sum)
    first = cached(X)
    assert torch.equal(cached(X.flip(0)), first)
    assert torch.equal(cached(X, 2), first)
    assert not torch.equal(cached(X + 1), first)
    assert seen[0] is X
    assert list(seen[2]) == ["x", "scale"]
    assert cache_of(cached).stats.hits == 2


WRONG_ANSWERS = {
    "a tensor": (lambda row: row, "returned a torch.Tensor; a key is a bool, int"),
    "an array": (lambda row: row.numpy(), "returned a numpy.ndarray"),
    "a numpy number": (lambda row: row.numpy()[0], "returned a numpy.float32"),
    "nan": (lambda row: float("nan"), "returned nan, which names no row"),
    "nan in a tuple": (lambda row: (1, float("nan")), "returned nan"),
    "a list": (lambda row: [1], "returned a builtins.list"),
    "a dict": (lambda row: {}, "returned a builtins.dict"),
    "an object": (lambda row: types.SimpleNamespace(), "returned a types.SimpleNamespace"),
    "an error": (lambda row: row["id"], "on row 0, raised IndexError"),
}


@pytest.mark.parametrize("kind", WRONG_ANSWERS)
def test_wrong_answers_of_a_key_function(kind):
    """A key function that gives no key is told so by row, and nothing is stored."""
    function, message = WRONG_ANSWERS[kind]
    module = cached_module(encoder(), freeze=True, key=function)
    with pytest.raises(KeyExtractionError, match=message) as found:
        module(torch.randn(2, 3))
    assert isinstance(found.value, TypeError)
    assert isinstance(found.value, ValueError)
    assert cache_of(module).stats.rows == 0
    assert cache_of(module).store.stats().rows == 0


def test_nothing_to_read_is_told_once():
    """key="text" on tensors works, by type, and says so."""
    module = cached_module(encoder(), freeze=True, key="text")
    batch = torch.randn(2, 3)
    with pytest.warns(CacheWarning, match=r"its key extractor \(text\) finds nothing that it reads .*\(x\)"):
        module(batch)
    module(batch)
    assert cache_of(module).stats.hits == 2


def test_position_and_keyword_are_one_call():
    """Arguments are named by the signature, so `m(x)` and `m(x=x)` agree, and `m(a, b)` and `m(b, a)` do not."""
    bind = Binder(Scaled().forward)

    def bound(*args, **kwargs):
        values = bind(args, kwargs).bound()
        return Extractor()(values, split(values, frozenset(), is_row)).keys

    assert bound(X, 2) == bound(X, scale=2) == bound(scale=2, x=X)
    assert bound(X, X + 1) != bound(X + 1, X)


def test_texts_are_never_their_characters():
    """A bare text is one row."""
    module = cached_module(TextEncoder(), freeze=True)
    plain = TextEncoder()
    plain.load_state_dict(module.state_dict())
    assert torch.equal(module(["ab", "\ud800"]), plain(["ab", "\ud800"]))
    assert len(keys_of(x="ab")) == 1


class Bare(CountingEncoder):
    """Encodes one text, not a list of them."""

    def forward(self, text):
        self.seen.sizes.append(1)
        return torch.full((1, 2), float(len(text)))


def test_a_bare_text_is_cached_as_one_row():
    """A module that takes one text at a time is cached, too."""
    module = Bare()
    cached_module(module, freeze=True, key="text")
    for _ in range(2):
        assert torch.equal(module("abc"), torch.full((1, 2), 3.0))
    assert module.calls == 1


REPRS = {
    "keys.text()": keys.text,
    "keys.path()": keys.path,
    "keys.path('stat')": lambda: keys.path("stat"),
    "keys.tensor()": keys.tensor,
    "keys.tokens()": keys.tokens,
    "keys.custom(<built-in function len>)": lambda: keys.custom(len),
    "keys.Extractor()": Extractor,
}


@pytest.mark.parametrize("said", REPRS)
def test_an_extractor_prints_as_it_is_made(said):
    """The repr of an extractor is the call that makes it."""
    assert repr(REPRS[said]()) == said


def test_only_the_public_names_are_exported():
    """`modcache.keys` offers what a user asks for; what the library uses of it stays out of `__all__`."""
    public = ["Extractor", "custom", "path", "register_key_extractor", "tensor", "text", "tokens"]
    assert keys.__all__ == public


def test_what_rows_share_is_not_remembered():
    """Seeds of calls with shared arguments are made each time: remembering these arguments would hold them for ever."""
    before = parts._seed.cache_info().currsize
    for number in range(20):
        keys_of(Extractor(), x=X, shared=["a"] * number + [str(number)])
    assert parts._seed.cache_info().currsize <= before + 1


OF_OWN = "give that type a key with register_key_extractor"
DENSE = "pass a plain, dense tensor"


@pytest.mark.parametrize(
    ("args", "ways"),
    [
        (([object(), object()],), f"{OF_OWN}, or pass cache_keys=."),
        ((X, object()), f"{OF_OWN}."),
        ((torch.eye(4).to_sparse(),), f"{DENSE}, or pass cache_keys=."),
        ((X, torch.eye(5).to_sparse()), f"{DENSE}."),
    ],
    ids=["an object per row", "a shared object", "sparse rows", "a shared sparse tensor"],
)
def test_the_way_out_of_a_value_without_a_key_is_one(args, ways):
    """Given keys stand for what is per row alone, and a tensor is no type to register."""

    class Constant(nn.Module):
        def forward(self, x, other=None):
            return torch.zeros(len(x), 1)

    cached = cached_module(Constant(), freeze=True)
    with pytest.warns(CacheWarning) as told:
        cached(*args)
    assert [str(warning.message).partition("What to do: ")[2] for warning in told] == [ways]
    if "cache_keys" in ways:
        for _ in range(2):
            cached(*args, cache_keys=range(len(args[0])))
        assert cache_of(cached).stats.hits == len(args[0])
