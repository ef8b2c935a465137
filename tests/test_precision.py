"""Two runs of one row agree within their precision, or it is told in what they differ."""

import pytest
import torch

from modcache.outputs import rows_of
from modcache.precision import difference, tolerance_of


def rows(output):
    return rows_of(output, 2, torch.device("cpu"))


def test_tolerances():
    """Each precision has its tolerance; whole numbers have none."""
    found = {
        dtype: tolerance_of(dtype)
        for dtype in (
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.float8_e5m2,
            torch.complex64,
            torch.int64,
            torch.bool,
        )
    }
    assert list(found.values()) == [1e-3, 1e-2, 5e-2, 2.5e-1, 1e-3, 0.0, 0.0]


ONE = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
SAME = {
    "equal": (ONE, ONE),
    "noise": (ONE, ONE * (1 + 5e-4)),
    "half": (ONE.half(), ONE.half() * 1.005),
    "bfloat16": (ONE.bfloat16(), ONE.bfloat16() * 1.03),
    "float8": (ONE.to(torch.float8_e4m3fn), (ONE * 1.1).to(torch.float8_e4m3fn)),
    "complex": (torch.complex(ONE, ONE), torch.complex(ONE, ONE * (1 + 5e-4))),
    "infinite and nan": (
        torch.tensor([[1.0, torch.inf], [torch.nan, 2.0]]),
        torch.tensor([[1.0, torch.inf], [torch.nan, 2.0]]),
    ),
    "scalars": (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])),
    "whole numbers": (torch.tensor([1, 2]), torch.tensor([1, 2])),
    "nothing": (torch.zeros(2, 0), torch.zeros(2, 0)),
    "all nan": (torch.full((2, 2), torch.nan), torch.full((2, 2), torch.nan)),
    "trees": ({"a": ONE, "b": (ONE, 1)}, {"a": ONE, "b": (ONE, 1)}),
}
APART = {
    "too far": (ONE, ONE * 1.01, "values differ by up to 0.0"),
    "zeros": (ONE, ONE + torch.tensor([[0.0], [1e-30]]), "values differ"),
    "one of many": (torch.ones(2, 100), torch.ones(2, 100) + torch.eye(100)[:2], "values differ by up to 1 of"),
    "whole numbers": (torch.tensor([1, 2]), torch.tensor([1, 3]), "whole numbers that should be equal differ"),
    "flags": (torch.tensor([True, True]), torch.tensor([True, False]), "whole numbers"),
    "not finite": (ONE, ONE / 0, "not finite"),
    "other infinity": (torch.full((2, 1), torch.inf), torch.full((2, 1), -torch.inf), "not finite"),
    "shapes": (ONE, ONE[:, :1], r"its output rows have shapes \(\(2,\),\) and \(\(1,\),\)"),
    "structure": ((ONE, 1), (ONE, 2), "the structure or a constant of its output differs"),
    "second tensor": ((ONE, ONE), (ONE, -ONE), "output tensor 1: values differ"),
}


@pytest.mark.parametrize("kind", SAME)
def test_agreement(kind):
    """Runs that differ by no more than their precision agree, both ways."""
    one, other = map(rows, SAME[kind])
    assert difference(one, other) is None
    assert difference(other, one) is None


@pytest.mark.parametrize("kind", APART)
def test_difference(kind):
    """Anything more is told in words."""
    one, other, message = APART[kind]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(difference(rows(one), rows(other)))


def test_the_floor_is_that_of_the_least_precise_arithmetic():
    """What was computed in bfloat16 and cast up is compared as bfloat16."""
    assert difference(rows(ONE), rows(ONE * 1.03)) is not None
    assert difference(rows(ONE), rows(ONE * 1.03), 5e-2) is None
