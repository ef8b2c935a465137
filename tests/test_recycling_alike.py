"""Values are the same within the precision of their type, as wholes and row by row."""

import torch

from modcache.recycling.alike import agree, difference, floor_of, rows_agree


def test_agreement_knows_precision():
    """Values agree within the precision of their type, NaN with NaN, and never across shapes or types."""
    one = torch.tensor([1.0, float("nan"), float("inf")])
    assert agree(one, one.clone())
    assert agree(one, one + torch.tensor([1e-6, 0, 0]))
    assert not agree(one, one + torch.tensor([1e-2, 0, 0]))
    assert agree(one, one + torch.tensor([1e-2, 0, 0]), floor_of([torch.bfloat16]))
    assert not agree(one, one.nan_to_num())
    assert not agree(one.double(), one.double() + torch.tensor([1e-6, 0, 0]))
    assert not agree(one, one.double())
    assert not agree(torch.tensor([1]), torch.tensor([2]))
    assert agree(torch.empty(0, 3), torch.empty(0, 3))


def test_each_row_agrees_by_itself():
    """A row is measured against itself, however small it is beside others, unless it is nothing but rounding."""
    rows = torch.ones(3, 4) * torch.tensor([[1.0], [1e-5], [1e-9]])
    assert rows_agree(rows, rows * (1 + 1e-5))
    assert not rows_agree(rows, rows + torch.tensor([[0.0], [1e-6], [0.0]]))
    assert agree(rows, rows + torch.tensor([[0.0], [1e-6], [0.0]]))
    assert rows_agree(rows, rows + torch.tensor([[0.0], [0.0], [1e-8]]))
    assert not rows_agree(rows, rows + torch.tensor([[1e-2], [0.0], [0.0]]))
    assert rows_agree(torch.empty(3, 0), torch.empty(3, 0))
    assert not rows_agree(torch.tensor([1]), torch.tensor([2]))


class Kept:
    """An object with whatever it is given as attributes."""

    def __init__(self, **values):
        vars(self).update(values)


def test_objects_are_compared_by_what_they_hold():
    """Objects of one class whose attributes are the same are the same; what has none to be seen is not."""
    ones = torch.ones(2, 3)

    def kept(keys=ones, size=2, of=Kept, also=None):
        return {"out": ones, "cache": Kept(layers=[of(keys=keys, size=size)], kind=torch.nn.Linear, also=also)}

    assert difference(kept(), kept(ones + 1e-6), 0.0) is None
    assert difference(kept(), kept(ones * 2), 0.0) == "['cache']['layers'][0]['keys']: other values"
    assert difference(kept(), kept(size=3), 0.0) == "another structure"
    assert difference(kept(), kept(of=type("Other", (Kept,), {})), 0.0) == "another structure"
    assert difference(kept(also=(Kept(a=1),)), kept(also=[Kept(a=1)]), 0.0) == "another structure"
    assert difference(kept(also=object()), kept(also=object()), 0.0) == "another structure"
    assert difference(kept(also=[Kept()]), kept(also=[Kept()]), 0.0) == "another structure"


def test_a_difference_is_told_by_its_place():
    """Outputs differ in structure, in a shape, or in values, and it says where; within precision they do not."""
    one = {"logits": torch.ones(2, 3), "states": (torch.zeros(2),)}
    assert difference(one, {"logits": torch.ones(2, 3) + 1e-6, "states": (torch.zeros(2),)}, 0.0) is None
    assert difference(one, {"logits": torch.ones(2, 3)}, 0.0) == "another structure"
    assert "'states'][0]: shape (3,) for (2,)" in difference(one, {**one, "states": (torch.zeros(3),)}, 0.0)
    assert difference(one, {**one, "logits": torch.ones(2, 3) * 2}, 0.0) == "['logits']: other values"
    assert difference(torch.ones(2), torch.zeros(2), 0.0) == "the output: other values"
