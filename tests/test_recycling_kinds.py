"""A call of plain tensors is told apart by the same facts, whichever way they are worked out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modcache.arguments import Arguments
from modcache.errors import CutError
from modcache.recycling.kinds import asked_of

NOBODY = frozenset({"no argument of this name"})
"""Named as broadcast, it changes nothing, but the call is looked at in full."""
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16])


@given(st.lists(st.tuples(SHAPES, DTYPES), min_size=1, max_size=4), st.booleans())
def test_the_short_way_agrees_with_the_long_one(made: list[tuple[tuple[int, ...], torch.dtype]], named: bool) -> None:
    """Rows, kinds and sizes of any tensors are the same both ways."""
    values = [torch.zeros(shape, dtype=dtype) for shape, dtype in made]
    names = tuple((f"x{place}", f"x{place}" if named else place) for place in range(len(values)))
    kwargs = {f"x{place}": value for place, value in enumerate(values)}
    arguments = Arguments((), kwargs, names) if named else Arguments(tuple(values), {}, names)
    if not any(value.dim() for value in values):
        with pytest.raises(CutError, match="no argument has rows"):
            asked_of(arguments, frozenset(), "Model")
        return
    short, long = (asked_of(arguments, broadcast, "Model") for broadcast in (frozenset[str](), NOBODY))
    assert short[2:] == long[2:]
    assert short.batch.size == long.batch.size
    assert [column[:2] for column in short.batch.columns] == [column[:2] for column in long.batch.columns]
    assert all(one.value is two.value for one, two in zip(short.batch.columns, long.batch.columns, strict=True))
    assert [path for path, _ in short.batch.shared] == [path for path, _ in long.batch.shared]
    assert short.tag == long.tag
