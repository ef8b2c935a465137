"""Arguments are named by the signature, however they were given."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modcache.arguments import Arguments, Binder
from modcache.batch import split
from modcache.keys.registry import is_row


def usual(x, y=1, *, z=2):
    """A forward as most are."""


def gathering(first, *rest, option=None, **more):
    """A forward that takes whatever comes."""


def names(function, *args, **kwargs):
    return Binder(function)(args, kwargs).bound()


@given(st.sampled_from(["xyz", "xzy", "yxz", "yzx", "zxy", "zyx"]), st.integers(0, 2))
def test_position_keyword_and_order_do_not_matter(order, positional):
    """All ways to write a call name its arguments alike, in the order of the signature."""
    values = {"x": 10, "y": 20, "z": 30}
    args = [values[name] for name in "xyz"[:positional]]
    kwargs = {name: values[name] for name in order if name not in "xyz"[:positional]}
    assert names(usual, *args, **kwargs) == [("x", 10), ("y", 20), ("z", 30)]


def test_defaults_are_left_out():
    """What was not given is not there: the signature is part of the module's code."""
    assert names(usual, 1) == [("x", 1)]


def test_gathered_arguments():
    """Further positions are numbered, further keywords sorted."""
    found = names(gathering, 1, 2, 3, b=5, a=4, option=6)
    assert found == [("first", 1), ("rest[0]", 2), ("rest[1]", 3), ("option", 6), ("a", 4), ("b", 5)]


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {}), ((1, 2, 3), {}), ((1,), {"w": 1}), ((1,), {"x": 1})],
    ids=["none", "many", "odd", "twice"],
)
def test_what_does_not_fit_is_a_type_error(args, kwargs):
    """Wrong arguments raise what calling the function would, each time."""
    bind = Binder(usual)
    for _ in range(2):
        with pytest.raises(TypeError):
            bind(args, kwargs)


def test_a_function_without_a_signature():
    """A builtin's arguments are named by their place."""
    assert Binder(type)((1,), {"b": 3, "a": 2}).bound() == [("args[0]", 1), ("a", 2), ("b", 3)]


def test_known_forms_are_remembered():
    """A form of call is worked out once, and values are never mixed up."""
    bind = Binder(usual)
    assert bind((1,), {"z": 3}).bound() == [("x", 1), ("z", 3)]
    assert bind((5,), {"z": 6}).bound() == [("x", 5), ("z", 6)]
    assert bind((1,), {"z": 3}).names is bind((5,), {"z": 6}).names


def test_taken_rows_stand_where_they_were():
    """The same call on some rows has its arguments in the same places; shared ones are the same objects."""
    x, flag = torch.arange(6).reshape(3, 2), object()
    arguments = Binder(gathering)((x, flag), {"a": ["p", "q", "r"]})
    batch = split(arguments.bound(), frozenset(), is_row)
    taken = arguments.taken(batch, [2, 0])
    assert isinstance(taken, Arguments)
    assert torch.equal(taken.args[0], x[[2, 0]])
    assert taken.args[1] is flag
    assert taken.kwargs == {"a": ["r", "p"]}
    assert arguments.kwargs == {"a": ["p", "q", "r"]}
