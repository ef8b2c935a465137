"""The copies of a cut's ancestors have the attributes that these have, whatever is done to them between calls."""

import functools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modcache import recycle
from modcache.classes import ATTACHED

NAMES = st.sampled_from(["width", "scale", "note", "table"])
ACTIONS = st.one_of(
    st.tuples(st.just("set"), NAMES, st.sampled_from([1, 1.0, True, "1", None])),
    st.tuples(st.just("delete"), NAMES, st.none()),
    st.tuples(st.just("rename"), NAMES, NAMES),
    st.tuples(st.just("write"), NAMES, st.sampled_from([2, 3])),
    st.tuples(st.just("forget"), st.none(), st.none()),
    st.tuples(st.just("call"), st.none(), st.none()),
)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
        self.shift = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return self.layers(x + self.shift)


def attributes(module):
    """Of a module of the user's, but for what torch keeps in each."""
    inner = {*vars(nn.Module()), ATTACHED}
    return {name: value for name, value in vars(module).items() if name not in inner}


@functools.cache
def parted_model():
    model = recycle(Outer(), "layers.2", batch=(torch.eye(2),))
    (parted,) = vars(model)[ATTACHED].parted.values()
    return model, parted


@settings(max_examples=300)
@given(st.lists(ACTIONS, min_size=4, max_size=12))
def test_copies_are_kept_in_step(actions):
    """Set, deleted, renamed: a copy has the very same, but what a forward was seen to set stays as it was."""
    model, parted = parted_model()
    copied, fields, written = parted.trunk.model, vars(model), set()
    for name in attributes(model):
        del fields[name]
    parted.take_over(written)
    for action, name, value in [*actions, ("call", None, None)]:
        if action == "set":
            fields[name] = value
        elif action == "delete":
            fields.pop(name, None)
        elif action == "rename" and name in fields:
            fields[value] = fields.pop(name)
        elif action == "write":  # by a forward
            written.add((id(model), name))
            fields[name] = value
        elif action == "forget":  # another cut, another probe
            written.clear()
        else:
            before = attributes(copied)
            parted.take_over(written)
            wanted = attributes(model)
            for number, noted in written:
                assert number == id(model)
                wanted.pop(noted, None)
                if noted in before and noted in fields:
                    wanted[noted] = before[noted]
            found = attributes(copied)
            assert found.keys() == wanted.keys()
            assert all(found[key] is wanted[key] for key in wanted)


def test_exchanged_parameters_of_ancestors_are_taken_over():
    """A parameter of an ancestor that feeds the cut may be another object at the next call."""
    model = recycle(Outer(), "layers.2", batch=(torch.eye(2),))
    (parted,) = vars(model)[ATTACHED].parted.values()
    parted.take_over(set())
    model.shift = nn.Parameter(torch.ones(2), requires_grad=False)
    parted.take_over(set())
    assert parted.trunk.model.shift is model.shift
    plain = Outer()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(torch.eye(2)), plain(torch.eye(2)))


def test_exchanged_modules_are_noticed():
    """A trunk of which a module was exchanged is no longer that of the model."""
    model = recycle(Outer(), "layers.2", batch=(torch.eye(2),))
    (parted,) = vars(model)[ATTACHED].parted.values()
    assert parted.is_current()
    first = model.layers[0]
    model.layers[0] = nn.Linear(2, 2)
    assert not parted.is_current()
    model.layers[0] = first
    assert parted.is_current()
    model.layers[2] = nn.Linear(2, 1)  # the head's
    assert parted.is_current()
