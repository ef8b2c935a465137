"""Keys that the caller gives: the same key however it was handed over, and never another one's."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.data import default_collate

from modcache import UsageError, UsageTypeError, cache_of, cached_module, keys_for
from modcache.batch import split
from modcache.keys import given as given_module
from modcache.keys.given import given_digests, given_keys, given_rows
from modcache.keys.keyed import Given, given_keyed
from modcache.keys.registry import is_row

from .models import encoder


def digests(keys, count=None):
    return given_digests(given_rows(keys, len(keys) if count is None else count), 3)


INT_DTYPES = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


@given(st.sampled_from(INT_DTYPES), st.data())
def test_an_int_is_one_key_in_any_container_of_any_dtype(name, data):
    """A whole number is the same key in a list, a tuple, a tensor and an array of any dtype."""
    info = np.iinfo(name)
    numbers = data.draw(st.lists(st.integers(int(info.min), int(info.max)), min_size=1, max_size=5))
    expected = digests(numbers)
    array = np.array(numbers, dtype=name)
    assert digests(tuple(numbers)) == expected
    assert digests(array) == expected
    assert digests(list(array)) == expected
    assert digests(array.astype(array.dtype.newbyteorder())) == expected
    assert digests(np.repeat(array, 2)[::2]) == expected
    assert digests(array[::-1])[::-1] == expected
    tensor = torch.from_numpy(array)
    assert digests(tensor) == expected
    assert digests(list(tensor.unbind())) == expected


def test_hashes_of_64_bits():
    """Unsigned numbers beyond the signed range are the numbers that they are in a list."""
    numbers = [2**64 - 1, 2**63, 2**63 - 1]
    assert digests(np.array(numbers, np.uint64)) == digests(numbers)
    assert len(set(digests(numbers))) == 3


def test_many_ints_are_not_all_remembered(monkeypatch):
    """Digests of ints are remembered up to a number, and are the same ones afterwards."""
    monkeypatch.setattr(given_module, "_KNOWN", 3)
    columns = batch(("x", torch.zeros(2, 77)))
    for numbers in ([1, 2], [3, 4], [1, 2], [2, 1]):
        expected = given_digests(given_rows(numbers, 2), given_keyed(Given(numbers), columns).seed)
        assert given_keyed(Given(numbers), columns).keys == expected


def test_a_range_is_its_numbers():
    """A range is a list of ints."""
    assert digests(range(2, 5)) == digests([2, 3, 4])


atoms = st.integers() | st.sampled_from([2**63, -(2**63) - 1, 0, 1]) | st.text(max_size=3) | st.binary(max_size=9)
keys = st.recursive(atoms, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=4)


@given(st.lists(keys, min_size=1, max_size=6))
def test_equal_keys_have_equal_digests_and_no_others(rows):
    """Ints, strings, bytes and tuples are told apart by type and value, whatever else is in the list."""
    texts = all(isinstance(row, tuple) and all(isinstance(text, str | bytes) for text in row) for row in rows)
    assume(not (texts and {len(row) for row in rows} == {len(rows)} and len(rows) > 1))  # taken both ways, see below
    found = digests(rows)
    assert [found.index(digest) for digest in found] == [rows.index(row) for row in rows]
    assert found == [digests([row])[0] for row in rows]


@pytest.mark.parametrize("number", [0, 1, 7, 255, 2**31, 2**63 - 1])
def test_an_int_is_never_its_text(number):
    """1, "1", b"1", its eight bytes and (1,) are five keys."""
    alike = [number, str(number), str(number).encode(), number.to_bytes(8, "little"), (number,)]
    assert len(set(digests(alike))) == len(alike)


PAIRS = {
    "index and view": [(3, 1), (4, 1), (3, 0)],
    "name and view": [("a", 1), ("b", 1), ("a", 0)],
    "view and name": [(1, "a"), (1, "b"), (0, "a")],
    "three": [(1, 2, 3), (1, 2, 4), (0, 2, 3)],
}


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_as_collating_makes_them(kind):
    """What `default_collate` makes of pairs is the list of these pairs."""
    pairs = PAIRS[kind]
    collated = default_collate(pairs)
    assert digests(collated, 3) == digests(pairs)
    assert digests(tuple(collated), 3) == digests(pairs)


def test_arrays_in_pairs():
    """A tuple of arrays is a tuple of columns."""
    assert digests((np.array([1, 2]), np.array([3, 4])), 2) == digests([(1, 3), (2, 4)])


def test_numpy_numbers_inside_of_tuples():
    """A numpy number in a tuple is that number."""
    assert digests([(np.int32(1), "a")]) == digests([(1, "a")])


REFUSED = {
    "floats": [1.0, 2.0],
    "bools": [True, False],
    "none": [None, None],
    "lists": [[1], [2]],
    "a set": {1, 2},
    "a text": "ab",
    "a number": 3,
    "a float tensor": torch.zeros(2),
    "a bfloat16 tensor": torch.zeros(2, dtype=torch.bfloat16),
    "a bool tensor": torch.zeros(2, dtype=torch.bool),
    "a matrix": torch.zeros(2, 2, dtype=torch.int64),
    "a float array": np.zeros(2),
    "an array of texts": np.array(["a", "b"]),
    "0-d floats": [torch.tensor(1.0), torch.tensor(2.0)],
    "tuples of floats": [(1.0,), (2.0,)],
    "a tensor without values": torch.empty(2, dtype=torch.long, device="meta"),
    "a number among tensors": [torch.tensor([1, 2]), 3],
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_keys(kind):
    """Anything else is refused, saying what was found and what is accepted."""
    with pytest.raises(UsageTypeError, match=r"cache_keys must hold one key per row: ints, .*; found a"):
        given_rows(REFUSED[kind], 2)
    with pytest.raises(UsageTypeError, match="cache_keys must hold"):
        given_keys(REFUSED[kind], 2, 0, "cache_keys")


def test_a_wrong_number_of_keys():
    """There is one key per row, no more and no fewer."""
    with pytest.raises(UsageError, match=r"keys_for\(\.\.\.\) must hold .*; the call has 3 rows, found 2 keys"):
        given_rows([1, 2], 3, "keys_for(...)")
    with pytest.raises(UsageError, match="the call has 3 rows, found 0 keys"):
        given_rows([], 3)
    with pytest.raises(UsageError, match=r"members of a tuple of keys differ in length: \[2, 3\]"):
        given_rows((torch.arange(2), torch.arange(3)), 2)


def batch(*pairs):
    return split(pairs, frozenset(), is_row)


def test_what_stays_in_the_key():
    """Names, dtypes, trailing shapes, shared arguments and the number of the call stay in the key; values do not."""
    x = torch.zeros(2, 3)
    assert given_keyed(Given([1, 2]), batch(("x", x))).keys == given_keyed(Given([1, 2]), batch(("x", x + 1))).keys
    others = [
        given_keyed(Given([1, 2]), batch(("x", x))),
        given_keyed(Given([1, 2]), batch(("y", x))),
        given_keyed(Given([1, 2]), batch(("x", x.double()))),
        given_keyed(Given([1, 2]), batch(("x", x[:, :2]))),
        given_keyed(Given([1, 2]), batch(("x", x.numpy()))),
        given_keyed(Given([1, 2]), batch(("x", ["a", "b"]))),
        given_keyed(Given([1, 2]), batch(("x", x), ("scale", 2))),
        given_keyed(Given([1, 2]), batch(("x", x), ("scale", 2.0))),
        given_keyed(Given([1, 2]), batch(("x", x), ("scale", torch.tensor(2)))),
        given_keyed(Given([1, 2], 1), batch(("x", x))),
        given_keyed(Given([1, 2]), batch(("x", {"a": x}))),
    ]
    assert len({tuple(keyed.keys) for keyed in others}) == len(others)
    assert given_keyed(Given([1]), batch(("x", "text"))).keys != given_keyed(Given([1]), batch(("x", ["text"]))).keys


def test_a_module_is_not_asked_for_keys_that_were_given():
    """Inputs that differ hit under one key; the module runs once per key."""
    module = encoder()
    cached_module(module, freeze=True)
    first = module(torch.randn(3, 3), cache_keys=[1, 2, 3])
    again = module(torch.randn(2, 3), cache_keys=torch.tensor([3, 1]))
    assert torch.equal(again, first[[2, 0]])
    assert cache_of(module).stats.hits == 2


def test_wrong_keys_store_nothing():
    """A call with the wrong number of keys raises, and the next right one computes."""
    module = cached_module(encoder(), freeze=True)
    for _ in range(2):
        with pytest.raises(UsageError, match="the call has 3 rows, found 2 keys"):
            module(torch.randn(3, 3), cache_keys=[1, 2])
        with pytest.raises(UsageError, match=r"keys_for\(\.\.\.\) must hold"), keys_for([1, 2]):
            module(torch.randn(3, 3))
        assert cache_of(module).stats.computed == 0
    module(torch.randn(3, 3), cache_keys=[1, 2, 3])
    with pytest.raises(UsageError, match="the call has 3 rows, found 4 keys"):
        module(torch.randn(3, 3), cache_keys=[1, 2, 3, 4])
    assert cache_of(module).stats.rows == 3


def test_pairs_of_texts_as_collating_makes_them():
    """Texts in pairs arrive as one tuple per member: a row's key never depends on the rest of its batch alone."""
    first = default_collate([("a", "left"), ("b", "left"), ("c", "right")])
    assert digests(first, 3) == digests([("a", "left"), ("b", "left"), ("c", "right")])


def test_two_pairs_of_texts_are_taken_both_ways():
    """With as many members as rows, keys that one reading would confuse are told apart by the other."""
    one = default_collate([("a", "left"), ("b", "left")])
    other = default_collate([("a", "right"), ("b", "left")])
    assert digests(one, 2)[0] != digests(other, 2)[0]
    assert digests([("x",)]) == digests([("x",), ("y",)])[:1]
