"""Ghosts have shapes and no values; bound ones are the tensor that they are bound to."""

import pytest
import torch
from torch.nn import functional as F

from modcache import CutError
from modcache.recycling.ghosts import Ghost, unwrapped
from modcache.recycling.origins import Origin, Spec


class Sheet:
    """A call that was not resumed yet."""

    def __init__(self, **values):
        self.reached, self.derived, self.touched, self.values, self.errors = False, False, set(), values, []

    def value_of(self, origin, ghost):
        if origin.path in self.values:
            return self.values[origin.path]
        raise self.failed(CutError(f"{origin} is not stored"))

    def failed(self, error):
        self.errors.append(error)
        return error


def ghost(sheet, *shape, path="low", dtype=torch.float32):
    spec = Spec(shape, torch.empty(shape, device="meta").stride(), dtype, torch.device("cpu"))
    return Ghost(sheet, spec, Origin(path, 0, ()))


def test_it_knows_its_shape():
    """Shape, dtype and device are there without a value."""
    one = ghost(Sheet(), 2, 3, dtype=torch.float64)
    assert (one.shape, one.dtype, one.device, one.dim(), len(one)) == ((2, 3), torch.float64, torch.device("cpu"), 2, 2)
    assert isinstance(one, torch.Tensor)
    assert "low" in repr(one)
    assert "unbound" in f"{one}"


def test_it_is_asked_by_keyword():
    """What is asked with ``input=`` is answered, bound or not."""
    one = ghost(Sheet(), 2, 3)
    for _ in range(2):
        assert (torch.numel(input=one), torch.is_floating_point(input=one)) == (6, True)
        one.bind(torch.ones(2, 3))


OPERATIONS = [
    lambda x: x + 1,
    lambda x: x.transpose(0, 1).reshape(-1),
    lambda x: torch.cat([x, torch.zeros(2, 3)]),
    lambda x: F.layer_norm(x, (3,), torch.ones(3)),
    lambda x: x.to(torch.float64),
    lambda x: x.to("cpu"),
    lambda x: x[:, None].expand(-1, 4, -1),
    lambda x: x.split(1)[1],
    torch.zeros_like,
    lambda x: x.new_ones(4),
    lambda x: F.dropout(x, 0.5, training=False),
    lambda x: x.chunk(3, dim=-1)[0].contiguous(),
    lambda x: x.cpu(),
    lambda x: x.float().masked_fill(torch.eye(2, 3).bool(), 0.0),
]


@pytest.mark.parametrize("operation", range(len(OPERATIONS)))
def test_operations_before_the_cut_give_ghosts(operation):
    """What the model's own code makes of a ghost is a ghost of the right shape, and of the right value once bound."""
    sheet, value = Sheet(), torch.randn(2, 3)
    one = ghost(sheet, 2, 3)
    found, wanted = OPERATIONS[operation](one), OPERATIONS[operation](value)
    assert (found.shape, found.dtype, found.device) == (wanted.shape, wanted.dtype, wanted.device)
    one.value, sheet.reached = value, True
    torch.testing.assert_close(unwrapped(found), wanted, rtol=0, atol=0)
    torch.testing.assert_close(found * 1, wanted * 1, rtol=0, atol=0)
    assert sheet.errors == []


DEMANDS = [
    lambda x: bool(x.mean() > 0),
    lambda x: x.sum().item(),
    lambda x: x.tolist(),
    lambda x: x.numpy(),
    lambda x: float(x.max()),
    lambda x: x[x > 0],
    torch.nonzero,
    lambda x: torch.equal(x, x.clone()),
    lambda x: 1.0 in x,
    lambda x: range(x.long().sum()),
]


@pytest.mark.parametrize("demand", range(len(DEMANDS)))
def test_values_before_the_cut_are_refused(demand):
    """Python that asks a ghost for its value gets an error that names the module it comes from, and that is noted."""
    sheet = Sheet()
    with pytest.raises(CutError, match=r"low.*[Cc]ut at"):
        DEMANDS[demand](ghost(sheet, 2, 3))
    assert len(sheet.errors) == 1


def test_a_write_into_another_tensor_is_refused():
    """A tensor that is there cannot take in what is not computed."""
    table = torch.zeros(2, 3)
    with pytest.raises(CutError, match="in place"):
        table[:] = ghost(Sheet(), 2, 3)
    with pytest.raises(CutError, match="in place"):
        table.add_(ghost(Sheet(), 2, 3))


def test_an_operation_that_changes_nothing_gives_the_same_ghost():
    """Dropout in eval, or a cast to the dtype that is there, is no other tensor."""
    one = ghost(Sheet(), 2, 3)
    assert F.dropout(one, 0.5, training=False) is one
    assert one.to(torch.float32) is one
    assert one.contiguous() is one
    assert one.add_(1) is one


def test_what_was_written_by_another_name_is_refused():
    """A view of a ghost that was written in place meanwhile has no value."""
    sheet = Sheet()
    one = ghost(sheet, 2, 3)
    view = one[0]
    one += 1
    one.value, sheet.reached = torch.zeros(2, 3), True
    assert torch.equal(one + 0, torch.zeros(2, 3))
    with pytest.raises(CutError, match="in place"):
        view + 0


def test_an_unbound_ghost_is_refused_after_the_cut():
    """Its shape can be asked for, its value cannot, unless it is stored."""
    sheet = Sheet(kept=torch.ones(2, 3))
    one, kept = ghost(sheet, 2, 3), ghost(sheet, 2, 3, path="kept")
    derived = one + kept
    sheet.reached = True
    assert one.shape == (2, 3)
    assert torch.equal(torch.zeros_like(one), torch.zeros(2, 3))
    assert torch.equal(kept * 2, torch.full((2, 3), 2.0))
    for use in (lambda: one * 2, lambda: derived.sum(0), lambda: torch.stack([kept, one])):
        with pytest.raises(CutError, match="low"):
            use()


def test_a_bound_ghost_passes_gradients_on():
    """What trainable weights make of a bound ghost is differentiated, and so is its value if that asks for it."""
    sheet, weight = Sheet(), torch.ones(3, requires_grad=True)
    one = ghost(sheet, 2, 3)
    one.value, sheet.reached = torch.full((2, 3), 2.0, requires_grad=True), True
    (one * weight).sum().backward()
    assert torch.equal(weight.grad, torch.full((3,), 4.0))
    assert torch.equal(one.value.grad, torch.ones(2, 3))


def test_a_table_that_changed_is_refused():
    """What a ghost was made of must still be what it was."""
    sheet, table = Sheet(), torch.ones(3)
    one = ghost(sheet, 2, 3)
    derived = one * table
    table.add_(1)
    one.value, sheet.reached = torch.ones(2, 3), True
    with pytest.raises(CutError, match="changed"):
        derived + 0


MOVES = {
    "cuda": lambda x: x.cuda(0),
    "to": lambda x: x.to("cuda:1"),
    "by keyword": lambda x: x.to(device="cuda", dtype=torch.half),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_ghost_moves(move):
    """A ghost on another device is another ghost, which knows the device; no device is needed for that."""
    one = ghost(Sheet(), 2, 3)
    found = MOVES[move](one)
    assert found is not one
    assert found.device.type == "cuda"
    assert found.shape == (2, 3)
