"""The shadow of a model looks like the model, calls what it is told to, and never touches it."""

import torch
from torch import nn

from modcache.recycling.gates import running
from modcache.recycling.shadow import Shadow, eval_twin


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.second(self.first(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        self.body = nn.ModuleList([Inner(), Inner()])
        self.same = self.stem[0]
        self.table = nn.Parameter(torch.ones(3))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.last = x
        for part in self.stem:
            x = part(x)
        x = self.same(x) * self.table
        for inner in self.body:
            x = inner(x)
        return x


class Through:
    """Runs what stands behind every gate, and notes its name."""

    passing = False

    def __init__(self):
        self.paths = []

    def called(self, place, args, kwargs):
        self.paths.append((place.path, place.bare, place.cut))
        return place.module(*args, **kwargs)


def shadowed():
    model = Model()
    return model, Shadow(model, model.body[1].second)


def test_gates_stand_around_the_cut():
    """Ancestors run their own code; everything else is called through a gate, shared modules by their first name."""
    model, shadow = shadowed()
    run, x = Through(), torch.randn(2, 3)
    shadow.follow()
    with running(run):
        found = shadow.root(x)
    assert torch.equal(found, model(x))
    assert run.paths == [
        ("stem.0", False, False),
        ("stem.1", True, False),
        ("stem.0", False, False),
        ("body.0", False, False),
        ("body.1.first", False, False),
        ("body.1.second", False, True),
    ]


def test_it_looks_like_the_model():
    """Classes, attributes, parameters and names are those of the model."""
    model, shadow = shadowed()
    shadow.follow()
    assert type(shadow.root) is Model
    assert isinstance(shadow.root.body[0], Inner)
    assert isinstance(shadow.root.stem[0], nn.Linear)
    assert shadow.root.body[0].first.in_features == 3
    assert shadow.root.table is model.table
    assert [name for name, _ in shadow.root.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(one is other for one, other in zip(shadow.root.parameters(), model.parameters(), strict=True))
    assert len(shadow.root.body) == 2


def test_attributes_go_over_and_back():
    """A forward of the shadow starts with the attributes of the model, and what it sets is handed back."""
    model, shadow = shadowed()
    model.calls = 5
    x = torch.randn(2, 3)
    shadow.follow()
    with running(Through()):
        shadow.root(x)
    assert (model.calls, hasattr(model, "last")) == (5, False)
    shadow.hand_back()
    assert model.calls == 6
    assert model.last is x
    assert shadow.written == {(id(model), "calls"), (id(model), "last")}


def test_exchanged_modules_are_noticed():
    """A shadow of other modules than the model has now is not current."""
    model, shadow = shadowed()
    assert shadow.follow()
    model.body[1].first = nn.Linear(3, 3)
    assert not shadow.follow()


def test_a_method_of_a_gate_calls_gates():
    """A module whose parts are called one by one is gated in its parts."""
    _, shadow = shadowed()
    run = Through()
    with running(run):
        shadow.root.body[0].forward(torch.randn(2, 3))
    assert [path for path, _, _ in run.paths] == ["body.0.first", "body.0.second"]


def test_after_the_forward_gates_are_the_modules():
    """Without a forward under way, as in a checkpoint's second run, a gate runs its module."""
    model, shadow = shadowed()
    x = torch.randn(2, 3)
    assert torch.equal(shadow.root.body[0](x), model.body[0](x))


def test_a_twin_is_in_eval_mode():
    """A twin shares everything but the mode; of a module in eval it is the module."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9), nn.BatchNorm1d(2))
    twin, x = eval_twin(module), torch.randn(4, 2)
    wanted = module[2].running_mean.clone()
    assert torch.equal(twin(x), twin(x))
    assert torch.equal(module[2].running_mean, wanted)
    assert module.training
    assert module[1].training
    assert eval_twin(module.eval()) is module
