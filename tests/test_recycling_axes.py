"""Rows are found in a tensor wherever they lie, put first, and put back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modcache.recycling.axes import CoupledError, axis_of, from_rows, order_of, slopes_of, to_rows

COUNT = 4


def captures(make, rows):
    """What a trunk gives for all rows, in reverse, for the first, and for the rest."""
    return [make(part) for part in (rows, rows.flip(0), rows[:1], rows[1:])]


def axis(make, rows):
    return axis_of(*captures(make, rows), len(rows), 0.0)


def folded(rows_first, fold):
    def make(rows):
        parts = torch.stack([rows * (number + 1) for number in range(fold)], dim=1 if rows_first else 0)
        return parts.flatten(0, 1)

    return make


@given(
    st.integers(2, 5),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.data(),
)
def test_rows_come_back(count, sizes, data):
    """Whatever dimension holds the batch, rows are put first and back, and lie in memory as they did."""
    rows = torch.randn(count, *sizes, dtype=torch.float64)
    dim = data.draw(st.integers(0, len(sizes)))
    order = data.draw(st.permutations(range(len(sizes) + 1)))
    inverse = sorted(range(len(order)), key=order.__getitem__)

    def make(part):
        return part.movedim(0, dim).permute(order).contiguous().permute(inverse)

    found = axis(make, rows)
    full = make(rows)
    assert torch.equal(to_rows(full, found), rows)
    again = from_rows(to_rows(full, found).contiguous(), found)
    assert torch.equal(again, full)
    assert again.is_contiguous() == full.is_contiguous() or order_of(again) == order_of(full)


@pytest.mark.parametrize("rows_first", [True, False])
@pytest.mark.parametrize("fold", [2, 3, 4])
def test_folded_rows_come_back(rows_first, fold):
    """Windows and heads that are folded into the batch go with their row, also where sizes coincide."""
    rows = torch.randn(COUNT, 4)
    make = folded(rows_first, fold)
    found = axis(make, rows)
    assert (found.fold, found.rows_first) == (fold, rows_first)
    assert torch.equal(from_rows(to_rows(make(rows), found), found), make(rows))
    assert torch.equal(to_rows(make(rows), found)[:2], to_rows(make(rows[:2]), found))


def test_what_all_rows_share_has_no_axis():
    """A table that no row goes into is shared."""
    assert axis(lambda part: torch.arange(8.0).reshape(2, 4), torch.randn(COUNT, 4)) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda rows: rows - rows.mean(0),
        lambda rows: rows + 1e-8 * rows.mean(0),
        lambda rows: rows.cumsum(0),
        lambda rows: rows + torch.randn_like(rows),
        lambda rows: rows.sum(0),
        lambda rows: rows[:2] if len(rows) > 2 else rows,
        lambda rows: rows[None] if len(rows) > 1 else rows,
        lambda rows: rows @ rows.T,
    ],
    ids=["mean", "a tiny share", "by place", "noise", "summed", "some", "another rank", "pairs"],
)
def test_coupled_rows_are_refused(make):
    """Rows that depend on each other, on chance or on their place have no axis."""
    torch.manual_seed(0)
    with pytest.raises(CoupledError):
        axis(make, torch.randn(COUNT, 4, dtype=torch.float64))


def test_sizes_grow_evenly_or_not():
    """A size that grows by the same with each row is known for any number of rows."""
    assert slopes_of((4, 7), (1, 7), (3, 7), 4) == ((1, True), (0, False))
    assert slopes_of((12,), (3,), (9,), 4) == ((3, True),)
    assert slopes_of((5,), (2,), (4,), 4) == ((1, False),)
    assert slopes_of((5,), (1,), (4,), 4) is None
    assert slopes_of((4, 1), (1,), (3, 1), 4) is None
