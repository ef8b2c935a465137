"""What is computed and what is served follows from the keys and from what was found."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from modcache.plan import CallPlan, distinct, plan_call, rows_to_serve
from modcache.rows import SINGLE, Layout, Rows
from modcache.stores import Found


def key(name):
    return name.encode() * 16


def found_at(*positions, width=1):
    rows = Rows(Layout(SINGLE, ((torch.float32, (width,)),)), (torch.zeros(len(positions), width),))
    return Found(np.array(positions, np.int64), rows)


names = st.lists(st.sampled_from("abcd"), min_size=1, max_size=8)


@given(names, st.sets(st.sampled_from("abcd")))
def test_exactly_what_is_missing_is_computed_once(row_names, stored):
    """Each key that was not found is computed at its first row, and every row has one place it comes from."""
    keys = [key(name) for name in row_names]
    there = [place for place, name in enumerate(row_names) if name in stored]
    found = (found_at(*there),) if there else ()
    plan = plan_call(keys, found, unchecked=False, ragged=False)
    missing = [name for name in dict.fromkeys(row_names) if name not in stored]
    assert [row_names[place] for place in plan.compute] == missing
    assert plan.compute == tuple(row_names.index(name) for name in missing)
    assert not plan.check
    places, numbers = rows_to_serve(keys, plan)
    assert sorted([*there, *places.tolist()]) == list(range(len(keys)))
    assert [row_names[plan.compute[number]] for number in numbers] == [row_names[place] for place in places]


@given(names)
def test_an_unchecked_batch_is_computed_whole(row_names):
    """Before a check, a batch of several rows is computed as a whole and checked, also where all are equal."""
    keys = [key(name) for name in row_names]
    found = (found_at(0),)
    plan = plan_call(keys, found, unchecked=True, ragged=False)
    if len(row_names) > 1:
        assert plan == CallPlan((), tuple(distinct(keys).values()), check=True)
    else:
        assert plan == CallPlan(found, (), check=False)


def test_rows_of_several_layouts():
    """Rows of two layouts are all computed anew, unless they may be padded into one batch."""
    keys = [key("a"), key("b"), key("c")]
    found = (found_at(0), found_at(2, width=3))
    assert plan_call(keys, found, unchecked=False, ragged=False) == CallPlan((), (0, 1, 2), check=False)
    assert plan_call(keys, found, unchecked=False, ragged=True) == CallPlan(found, (1,), check=False)


def test_everything_found():
    """Nothing is computed, and nothing is left to place."""
    keys = [key("a"), key("b")]
    plan = plan_call(keys, (found_at(0, 1),), unchecked=False, ragged=False)
    assert plan.compute == ()
    assert [array.tolist() for array in rows_to_serve(keys, plan)] == [[], []]
