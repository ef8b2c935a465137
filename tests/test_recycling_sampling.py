"""Rows of a batch are found again by their values."""

import numpy as np
import torch

from modcache.arguments import Binder
from modcache.recycling.kinds import asked_of
from modcache.recycling.sampling import distinct_rows, places_of


def asked(**arguments):
    def forward(x, other=None, text=None):
        """Takes these."""

    return asked_of(Binder(forward)((), arguments), frozenset(), "Model")


def test_rows_are_found_by_all_their_inputs():
    """A row is where all its inputs are; where there is none, it is nowhere."""
    x, other = torch.tensor([[1.0], [1.0], [float("nan")], [2.0]]), np.array([[1], [2], [3], [4]])
    call = asked(x=x, other=other, text=["a", "b", "c", "d"])
    order = [2, 0, 1]
    assert places_of(call, {"x": x[order], "other": other[order], "text": ["c", "a", "b"]}) == order
    assert places_of(call, {"x": x[order], "other": other[[2, 1, 1]], "text": ["c", "a", "b"]}) == [2, -1, 1]
    assert places_of(call, {"x": x[order]}) == [2, 0, 0]


def test_trimmed_token_rows_are_found():
    """A row without its padding is that row."""
    ids = torch.tensor([[1, 2, 0, 0], [1, 3, 4, 0], [5, 0, 0, 0]])
    call = asked(x=ids)
    assert places_of(call, {"x": ids[[2, 0], :2]}) == [2, 0]
    assert places_of(call, {"x": torch.tensor([[1, 3]])}) == [1]
    assert places_of(call, {"x": torch.tensor([[9, 9]])}) == [-1]


def test_distinct_rows_differ_in_some_input():
    """Of rows that are the same in all inputs one is taken."""
    call = asked(x=torch.tensor([[1.0], [1.0], [1.0], [2.0]]), text=["a", "a", "b", "a"])
    assert distinct_rows(call) == [0, 2, 3]


def test_rows_that_are_lists_of_tensors_are_told_apart():
    """A row of several tensors, as the images or the boxes of a sample, is compared tensor by tensor."""
    one, two = torch.ones(2), torch.zeros(2)
    rows = [[one, two], [one.clone(), two.clone()], [one], [two, one], [{"boxes": one}, two]]
    assert distinct_rows(asked(x=torch.zeros(5, 1), other=rows)) == [0, 2, 3, 4]
