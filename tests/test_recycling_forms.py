"""A call that is known by its form alone is answered as the model is now, whatever was changed since the one before."""

import pytest
import torch
from torch import nn

from modcache import MemoryStore, cache_of, mode, recycle


class Scaled(nn.Module):
    """A layer with a factor of its own."""

    def __init__(self, factor):
        super().__init__()
        self.layer, self.factor = nn.Linear(3, 3), factor

    def forward(self, x):
        return self.layer(x) * self.factor

    def __eq__(self, other):
        return isinstance(other, Scaled) and self.factor == other.factor

    def __hash__(self):
        return hash(self.factor)


class Model(nn.Module):
    """What feeds the cut `body.1.layer`: a stem, a table and an attribute of the model, and one of an ancestor."""

    def __init__(self):
        super().__init__()
        self.stem, self.shift, self.power = nn.Linear(3, 3), nn.Parameter(torch.ones(3)), 1
        self.body = nn.ModuleList([Scaled(2.0), Scaled(3.0), Scaled(4.0)])
        self.top = nn.Linear(3, 2)

    def forward(self, x, flag=None, count=1):
        x = (self.stem(x) + self.shift) ** self.power
        for part in self.body:
            x = part(x)
        return self.top(x) * (2 if flag else 1) + count


BATCH = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
AT = "body.1.layer"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().double()


def changed(model, change):
    """The same model, changed."""
    {
        "attribute of the model": lambda: setattr(model, "power", 2),
        "attribute of an ancestor": lambda: setattr(model.body[1], "factor", 7.0),
        "parameter of the model": lambda: setattr(model, "shift", nn.Parameter(torch.full((3,), 5.0).double())),
        "child of the trunk": lambda: setattr(model, "stem", nn.Linear(3, 3).double()),
        "equal child of the trunk": lambda: model.body.__setitem__(0, Scaled(2.0).double()),
        "equal child of the head": lambda: model.body.__setitem__(2, Scaled(4.0).double()),
        "child of the head": lambda: setattr(model, "top", nn.Linear(3, 2).double()),
        "weights of the trunk": lambda: model.stem.weight.data.mul_(2),
        "weights of the head": lambda: model.top.weight.data.mul_(2),
        "order of children": lambda: model.body.__init__([model.body[0], model.body[1], Scaled(9.0).double()]),
        "one more child": lambda: model.body.append(Scaled(5.0).double()),
        "attribute deleted": lambda: (setattr(Model, "power", 3), delattr(model, "power")),
        "mode": model.eval,
        "dtype": model.float,
    }[change]()


CHANGES = [
    "attribute of the model",
    "attribute of an ancestor",
    "parameter of the model",
    "child of the trunk",
    "equal child of the trunk",
    "equal child of the head",
    "child of the head",
    "weights of the trunk",
    "weights of the head",
    "order of children",
    "one more child",
    "attribute deleted",
    "mode",
    "dtype",
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_between_two_calls_counts(model, change):
    """The third call of a form gives what the model, as it was changed since the second, gives by itself."""
    recycle(model, at=AT, store=MemoryStore(1 << 20))
    with torch.no_grad():
        for _ in range(2):
            model(BATCH)
        try:
            changed(model, change)
            batch = BATCH.float() if change == "dtype" else BATCH
            again = [model(batch) for _ in range(2)]
        finally:
            power = vars(Model).get("power")
            if power is not None:
                del Model.power
        plain = Model().double()
        plain.body, plain.stem, plain.shift, plain.top = model.body, model.stem, model.shift, model.top
        plain.power = vars(model).get("power", power)
        for output in again:
            torch.testing.assert_close(output, plain(batch))


def test_calls_of_other_flags_and_sizes_are_other_calls(model):
    """True and 1, None and 0, another number of rows: each call is answered for what it was given."""
    plain, recycled = Model().double(), recycle(model, at=AT, batch=(BATCH,), store=MemoryStore(1 << 20))
    plain.load_state_dict(recycled.state_dict())
    calls = [((BATCH, flag), {}) for flag in (None, 0, False, 1, True, "text")]
    calls += [((BATCH,), {"count": count}) for count in (0, 1, True, 2)]
    calls += [((BATCH[:rows],), {}) for rows in (4, 3, 2, 1)] + [((), {"x": BATCH.flip(0)})]
    for _ in range(2):
        for args, kwargs in calls:
            with torch.no_grad():
                torch.testing.assert_close(recycled(*args, **kwargs), plain(*args, **kwargs))


def test_a_known_call_is_looked_at_no_closer(model, monkeypatch):
    """Once a call of a form was a hit, rows are found without being told apart from other arguments anew."""
    recycle(model, at=AT, batch=(BATCH,), store=MemoryStore(1 << 20))
    with torch.no_grad():
        first, *_ = [model(BATCH) for _ in range(3)]
        monkeypatch.setattr("modcache.recycling.recycled.asked_of", lambda *given: pytest.fail("looked at"))
        monkeypatch.setattr("modcache.recycling.trunk.Parted.take_over", lambda *given: pytest.fail("taken over"))
        with mode("require-hit"):
            assert torch.equal(model(BATCH.clone()), first)


def test_who_looked_in_between_does_not_hide_a_change(model):
    """An attribute changed, asked about and put back: rows are those of the attribute that the model has now."""
    recycle(model, at=AT, store=MemoryStore(1 << 20))
    with torch.no_grad():
        first, *_ = [model(BATCH) for _ in range(3)]
        model.power = 2
        assert cache_of(model).contains(BATCH) == [False] * 4
        model.power = 1
        with mode("require-hit"):
            assert torch.equal(model(BATCH), first)
        assert cache_of(model).contains(BATCH) == [True] * 4


def test_an_argument_that_needs_grad_is_refused_in_a_known_call(model):
    """What a known form of call does not tell is looked at in each call."""
    recycle(model, at=AT, batch=(BATCH,))
    model(BATCH)
    with pytest.raises(Exception, match="needs grad"):
        model(BATCH.clone().requires_grad_())


class Counting(Model):
    """Notes its calls on itself in its forward; a hook of its head notes them from outside."""

    def __init__(self):
        super().__init__()
        self.calls, self.noted = 0, 0

        def note(*_):
            self.noted += 1
            self.late = self.noted

        self.top.register_forward_hook(note)

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_what_hooks_note_on_the_model_is_not_taken_back():
    """Attributes that a hook sets on the model itself stay, beside those that the forward sets."""
    torch.manual_seed(0)
    model, plain = Counting().double(), Counting().double()
    recycle(model, at=AT, batch=(BATCH,), store=MemoryStore(1 << 20))
    noted, calls = model.noted, model.calls  # the probe runs the model, too
    for _ in range(3):
        with torch.no_grad():
            model(BATCH)
            plain(BATCH)
        assert (model.noted - noted, model.late - noted) == (plain.noted, plain.late)
        assert model.calls - calls == plain.calls
