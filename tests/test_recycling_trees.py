"""Tensors are found in arguments and outputs of any kind, and others are put in their places."""

import dataclasses
from collections import OrderedDict, UserDict, namedtuple

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from modcache.recycling.trees import fill_inside, hidden_tensors, located, mapped, same_but_tensors

Pair = namedtuple("Pair", "left right")  # noqa: PYI024 - as users write it


@dataclasses.dataclass(frozen=True)
class Box:
    """A dataclass of a user's."""

    left: torch.Tensor
    right: dict[str, torch.Tensor]


class Holder:
    """An object that is no structure."""

    def __init__(self, **inner):
        vars(self).update(inner)


T = torch.ones(2)
TREES = {
    "tensor": (T, [()]),
    "tuple": ((T, 1, None), [(0,)]),
    "list": ([1, [T, T]], [(1, 0), (1, 1)]),
    "dict": ({"a": T, "b": {"c": T}}, [("a",), ("b", "c")]),
    "ordered": (OrderedDict(a=T), [("a",)]),
    "user dict": (UserDict(a=T, b=2), [("a",)]),
    "named": (Pair(T, "x"), [(0,)]),
    "output": (BaseModelOutput(last_hidden_state=T, hidden_states=(T, T)), None),
    "nothing": (("x", 1.5, None), []),
}


@pytest.mark.parametrize("name", TREES)
def test_leaves_are_found_and_replaced(name):
    """Each tensor has a place; a changed tree is of the same kind, and one without a change is the very same."""
    tree, places = TREES[name]
    if places is not None:
        assert [step for step, _ in located(tree)] == places
    assert mapped(tree, lambda leaf: leaf) is tree
    other = mapped(tree, lambda leaf: leaf * 2)
    assert type(other) is type(tree)
    assert all(torch.equal(leaf, T * 2) for _, leaf in located(other))
    assert [step for step, _ in located(other)] == [step for step, _ in located(tree)]
    assert all(torch.equal(leaf, T) for _, leaf in located(tree))
    assert same_but_tensors(tree, other)


def test_dataclasses_are_structures():
    """The fields of a dataclass are parts."""
    tree = Box(T, {"inner": T})
    assert [step for step, _ in located(tree)] == [("left",), ("right", "inner")]
    other = mapped(tree, lambda leaf: leaf + 1)
    assert type(other) is Box
    assert torch.equal(other.right["inner"], T + 1)


@pytest.mark.parametrize(
    ("one", "other"),
    [((1,), (2,)), ((T,), (T, T)), ([T], (T,)), ({"a": 1}, {"b": 1}), (T, 1), (Holder(), Holder()), (1, True)],
    ids=str,
)
def test_trees_that_differ(one, other):
    """A structure, a number or an object that is another one is told."""
    assert not same_but_tensors(one, other)


def test_tensors_in_objects():
    """Tensors in an object that is no structure are found, and filled in where they lie."""
    tree = [Holder(inner=Holder(kept=[T])), 3]
    assert [id(tensor) for tensor in hidden_tensors(tree)] == [id(T)]
    assert list(hidden_tensors((T, {"a": T}))) == []
    fill_inside(tree, lambda leaf: leaf + 1, torch.Tensor)
    assert torch.equal(tree[0].inner.kept[0], T + 1)


def test_what_was_set_late_stays_last():
    """The keys of an output of transformers keep the order in which a forward set them."""
    output = BaseModelOutput(hidden_states=(T, T))
    output["last_hidden_state"] = T
    assert list(mapped(output, torch.clone)) == ["hidden_states", "last_hidden_state"]
