"""What differs between two descriptions is told once, the important first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modcache.stores.differing import differences

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        ({}, {}, ()),
        ({"weights": "b" * 32}, {}, ("weights",)),
        ({"dtypes": ["torch.float16"]}, {"dtypes": ["torch.float32"]}, ("dtype float32 -> float16",)),
        (
            {"dtypes": ["torch.float16", "torch.float32"]},
            {"dtypes": ["torch.float32"]},
            ("dtype float32 -> float16, float32",),
        ),
        (
            {"made_with": {"torch": "2.9", "transformers": "5.0"}},
            {"made_with": {"torch": "2.9", "transformers": "4.56"}},
            ("transformers 4.56 -> 5.0",),
        ),
        ({"context": {"autocast (cpu)": "off"}}, {"context": {"autocast (cpu)": "on"}}, ("autocast (cpu) on -> off",)),
        ({"key": "text"}, {"key": "by type"}, ("key by type -> text",)),
        ({"version": "2"}, {"version": None}, ("version none -> 2",)),
        ({"key_scheme": 2}, {"key_scheme": 1}, ("key scheme 1 -> 2",)),
        ({"prepare": "decode"}, {}, ("prepare none -> decode",)),
        ({"rows": 3, "bytes": 4, "made": "today", "namespace": "x", "checked": {"y": []}}, {}, ()),
        ({"fingerprint": "1" * 32}, {"fingerprint": "2" * 32}, ("code or configuration",)),
        ({"fingerprint": "1" * 32, "weights": "1" * 32}, {"fingerprint": "2" * 32, "weights": "2" * 32}, ("weights",)),
        ({"parts": {"class of x": "1", "x.weight": "2"}}, {"parts": {"class of x": "2"}}, ("class of x",)),
        (
            {"parts": {f"class of {n}": "1" for n in range(5)}},
            {"parts": {}},
            ("class of 0, class of 1 and 3 more",),
        ),
        ({"not_fingerprinted": ["tokenizer"]}, {"not_fingerprinted": []}, ("not_fingerprinted  -> tokenizer",)),
        ({"key": "x" * 500}, {"key": "y"}, (f"key y -> {'x' * 57}...",)),
        ({"parts": 3, "context": "odd"}, {"parts": {}, "context": {}}, ("context {} -> odd",)),
    ],
)
def test_differences_are_told(mine, theirs, expected):
    """Each fact that differs is told once, from what was to what is; digests by their name alone."""
    assert differences(mine, theirs) == expected


@given(st.dictionaries(st.text(max_size=5), plain, max_size=4), st.dictionaries(st.text(max_size=5), plain, max_size=4))
def test_anything_can_be_compared(mine, theirs):
    """Whatever somebody wrote into a manifest, comparing raises nothing; the same differs in nothing."""
    assert all(isinstance(text, str) for text in differences(mine, theirs))
    assert differences(mine, mine) == ()


def test_the_important_comes_first():
    """The class and the weights are told before versions of libraries."""
    mine = {"made_with": {"torch": "3"}, "weights": "1" * 32, "class": "B", "added": 1}
    theirs = {"made_with": {"torch": "2"}, "weights": "2" * 32, "class": "A"}
    assert differences(mine, theirs) == ("class A -> B", "weights", "added none -> 1", "torch 2 -> 3")
