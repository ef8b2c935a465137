"""What a tensor was made of is followed through operations, views, writes in place and Python."""

import pytest
import torch
from torch import nn

from modcache.recycling.trace import BY_PYTHON, Mark, Trace

A, B = Mark("input", "a"), Mark("parameter", "b")


def followed(forward):
    """The names that went into what a forward of two tensors gives."""
    a, b, trace = torch.ones(2, 3), torch.ones(2, 3), Trace()
    trace.mark([a], A, given=True)
    trace.mark([b], B, given=True)
    with torch.no_grad(), trace:
        found = forward(a, b)
    return {mark.name for mark in trace.all_marks(found)}, trace


def in_place(a, b):
    c = torch.zeros(2, 3)
    c[0] = a[1]
    return c


def by_view(a, b):
    c = torch.zeros(2, 3)
    view = c[0]
    view += a[0]
    return c


def by_number(a, b):
    return torch.ones(2) * a.sum().item()


def by_numpy(a, b):
    return torch.from_numpy(a.numpy() * 2)


def by_branch(a, b):
    return torch.ones(2) if a.sum() > 0 else torch.zeros(2)


FLOWS = {
    "sum": (lambda a, b: a + b, {"a", "b"}),
    "transposed": (lambda a, b: b.T, {"b"}),
    "data": (lambda a, b: b.data * 1, {"b"}),
    "detached": (lambda a, b: b.detach()[0], {"b"}),
    "in a list": (lambda a, b: [a * 2, torch.stack([b, b])], {"a", "b"}),
    "shapes only": (lambda a, b: torch.zeros_like(a) + b.new_ones(2, 3), set()),
    "sizes": (lambda a, b: torch.ones(a.shape[0]), set()),
    "unused": (lambda a, b: (a * 2, b)[1], {"b"}),
    "in place": (in_place, {"a"}),
    "by a view": (by_view, {"a"}),
    "by a number": (by_number, {"a"}),
    "by numpy": (by_numpy, {"a"}),
    "by a list": (lambda a, b: torch.tensor(a.tolist()) + 0, {"a"}),
    "by a branch": (by_branch, {"a"}),
    "by a count": (lambda a, b: torch.zeros(a.nonzero().shape[0]), {"a"}),
    "by the size of a choice": (lambda a, b: torch.ones(b[a > 0].numel()), {"a", "b"}),
    "by how many there are": (lambda a, b: torch.ones(len(a.unique())), {"a"}),
    "by repeats": (lambda a, b: torch.ones(torch.repeat_interleave(a.long()[0]).shape[0]), {"a"}),
    "by the largest": (lambda a, b: torch.ones(nn.functional.one_hot(a.long()).shape[-1]), {"a"}),
    "by its text": (lambda a, b: torch.ones(len(str(a))), {"a"}),
    "by its format": (lambda a, b: torch.ones(len(f"{a}")), {"a"}),
    "by membership": (lambda a, b: torch.ones(1) if 2.0 in a else torch.zeros(1), {"a"}),
    "by a length": (lambda a, b: torch.arange(a.long().sum()), {"a"}),
    "beside an index": (lambda a, b: (b[a.long()[0]], torch.ones(2))[1], set()),
    "indexed": (lambda a, b: b[a.long()[0]], {"a", "b"}),
}


@pytest.mark.parametrize("name", FLOWS)
def test_marks_follow_values(name):
    """Each way that a value can go hands its marks on, and sizes hand on none."""
    forward, wanted = FLOWS[name]
    assert followed(forward)[0] == wanted


def test_writes_into_what_was_there_are_noted():
    """Writing into an input or a parameter is told; into a new tensor it is not."""
    assert followed(in_place)[1].written == []
    assert [{mark.name for mark in marks} for marks in followed(lambda a, b: a.mul_(2))[1].written] == [{"a"}]
    assert followed(lambda a, b: b[0].fill_(1))[1].written != []


def test_what_python_asked_for_is_told_apart():
    """A mark that only came in by a branch is known as such."""
    a, trace = torch.ones(2), Trace()
    trace.mark([a], A)
    with trace:
        branched = torch.zeros(2) if a.sum() > 0 else torch.ones(2)
    assert trace.marks_of(branched) == {A._replace(number=BY_PYTHON)}
