"""KeyIndex: any keys, in any order of setting, finding and deleting, against a dict."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modcache.stores.index import KeyIndex, cut_keys
from modcache.stores.pages import reserve, zeros

# Keys that fight for slots: the bucket comes from bytes 4 to 7, the tag from bytes 12 to 15.
fighting = st.builds(
    lambda low, bucket, middle, tag: bytes([low, 0, 0, 0]) + bucket + bytes([middle, 0, 0, 0]) + tag,
    st.integers(0, 3),
    st.sampled_from([bytes(4), b"\xff" * 4, b"\x00\x00\x00\x80"]),
    st.integers(0, 3),
    st.sampled_from([bytes(4), b"\x01\x00\x00\x00", b"\xff" * 4]),
)
ordinary = st.integers(0, 200).map(lambda seed: np.random.default_rng(seed).bytes(16))
counted = st.integers(0, 300).map(lambda number: number.to_bytes(16, "little"))
batches = st.sampled_from([fighting, ordinary, counted]).flatmap(
    lambda kind: st.lists(
        st.tuples(st.sampled_from(["set", "set joined", "delete", "find"]), st.lists(kind, max_size=40)), max_size=25
    )
)


@settings(max_examples=150, deadline=None)
@given(batches, st.sampled_from([0, 1, 8, 100]))
def test_like_a_dict(steps, newest):
    """Setting, deleting and finding give what a dict gives, for keys of one bucket and of one tag, too."""
    index, model, clock = KeyIndex(newest), {}, 0
    for what, wanted in steps:
        if what.startswith("set"):
            places = np.arange(clock, clock + len(wanted)) << 20
            clock += len(wanted)
            if what == "set":
                index.set(wanted, places)
            else:
                index.set_joined(b"".join(wanted), places)
            model.update(zip(wanted, places.tolist(), strict=True))
        elif what == "delete":
            assert index.delete(wanted).tolist() == [model.pop(key, -1) for key in wanted]
        else:
            there = [model.get(key, -1) for key in wanted]
            assert index.find(wanted).tolist() == index.find_joined(b"".join(wanted)).tolist() == there
        assert len(index) == len(model)
    assert sorted(index.keys()) == sorted(model)
    assert index.find(list(model)).tolist() == list(model.values())


def random_keys(count: int, seed: int = 0) -> list[bytes]:
    return cut_keys(np.random.default_rng(seed).bytes(16 * count))


def test_many_keys():
    """Half a million keys in batches are all found, before and after half of them are deleted."""
    wanted = random_keys(500_000)
    index = KeyIndex()
    for start in range(0, len(wanted), 10_000):
        index.set(wanted[start : start + 10_000], np.arange(start, start + 10_000))
    assert (index.find(wanted) == np.arange(len(wanted))).all()
    assert (index.find(random_keys(10_000, 1)) == -1).all()
    assert (index.delete(wanted[::2]) == np.arange(0, len(wanted), 2)).all()
    assert len(index) == 250_000
    assert (index.find(wanted[::2]) == -1).all()
    assert (index.find(wanted[1::2]) == np.arange(1, len(wanted), 2)).all()
    assert set(index.keys()) == set(wanted[1::2])


def test_entries_are_used_again():
    """An index whose keys come and go does not grow."""
    index = KeyIndex(100)
    for seed in range(40):
        come = random_keys(500, seed)
        index.set(come, np.arange(500))
        assert (index.find(come) == np.arange(500)).all()
        index.delete(come)
    assert len(index) == 0
    assert len(index._old._keys) < 3000
    assert index._old._table.size < 6000


def test_keys_of_one_bucket_stay_cheap():
    """Keys that all want one bucket go to the dict, and are not tried again at each merge."""
    index = KeyIndex(100)
    merges = []
    original = index._merge
    index._merge = lambda: (merges.append(len(index)), original())
    crowd = [number.to_bytes(4, "little") + bytes(4) + number.to_bytes(8, "big") for number in range(20_000)]
    for start in range(0, len(crowd), 50):
        index.set(crowd[start : start + 50], np.arange(start, start + 50))
    assert (index.find(crowd) == np.arange(len(crowd))).all()
    assert len(merges) < 12


def test_bytes_that_are_half_a_key_are_not_found():
    """A run of bytes over the border of two stored keys is no key."""
    stored = random_keys(100)
    index = KeyIndex(10)
    index.set(stored, np.arange(100))
    joined = b"".join(stored)
    assert (index.find(cut_keys(joined[8:-8])) == -1).all()


@pytest.mark.parametrize("size", [0, 1 << 62])
def test_memory_that_is_not_to_be_had(size):
    """A reservation of nothing, or of more than an address space, is None."""
    assert reserve(size, 0) is None


def test_zeros():
    """Small and large arrays are zeros that can be written to."""
    for count in (10, 1 << 18):
        array = zeros((count, 2), np.uint64)
        assert array.shape == (count, 2)
        assert not array.any()
        array[-1] = 5
