"""Where a model cannot be parted, or a call not resumed, the error names the module at fault and a way out."""

import types

import pytest
import torch
from torch import nn

from modcache import CacheWarning, CutError, MemoryStore, UsageTypeError, cache_of, cached_module, recycle, uncached

X = torch.arange(24.0).reshape(6, 4)


class Model(nn.Module):
    """Two layers below the cut, which is at ``mid``, and one above; the forward is given."""

    def __init__(self, forward=None, low=None, mid=None):
        super().__init__()
        torch.manual_seed(0)
        self.low = nn.Linear(4, 4) if low is None else low
        self.other = nn.Linear(4, 4)
        self.mid = nn.Linear(4, 4) if mid is None else mid
        self.high = nn.Linear(4, 2)
        self.given = forward

    def forward(self, x):
        return self.high(self.mid(self.low(x))) if self.given is None else self.given(self, x)


class Pair(nn.Module):
    """Gives its input, and something else that it makes of it."""

    def __init__(self, second):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.second = second

    def forward(self, x):
        return self.layer(x), self.second(x)


class Adds(nn.Module):
    """Adds what else it is given."""

    def forward(self, x, *others):
        return sum(others, x)


class Notes(nn.Module):
    """Keeps something about each batch in an attribute."""

    def __init__(self, note):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.note = note
        self.noted = 0

    def forward(self, x):
        self.noted = self.note(self.noted, x)
        return self.layer(x)


def frozen(model):
    return model.requires_grad_(False).eval()


class Placed(Model):
    """Adds what it is given for each of the places in a row, the same for all rows."""

    def forward(self, x, places):
        return self.high(self.mid(self.low(x) + places.float()[None]))


def placed(rows, length=5):
    return torch.arange(rows * length * 4.0).reshape(rows, length, 4).sin(), torch.arange(length)[:, None]


@pytest.mark.parametrize("rows", [3, 4, 7])
def test_what_all_rows_share_and_is_as_long_as_the_batch_is_named(rows):
    """A model that cannot take a part of such an argument is refused with its name, also where it worked before."""
    model = recycle(Placed(), "mid")
    model(*placed(rows + 1, rows))
    with pytest.raises(CutError, match=r"RuntimeError.*on all.*\bplaces\b.*broadcast="):
        model(*placed(rows, rows))
    told, plain = recycle(Placed(), "mid", broadcast=("places",)), Placed()
    for count in (rows, rows + 1, rows):
        assert torch.allclose(told(*placed(count, rows)), plain(*placed(count, rows)))


def test_what_the_model_raises_on_all_rows_comes_through():
    """An error that the un-recycled model raises as well is its own."""
    model = recycle(Placed(), "mid")
    for rows in (3, 6):
        with pytest.raises(RuntimeError, match="must match"):
            model(placed(rows)[0], placed(rows, 2)[1])


REFUSED = {
    "a module that only larger batches call": (
        lambda: Model(lambda m, x: m.high(m.mid(m.low(m.other(x) if len(x) > 2 else x)))),
        "other.*depends on which rows",
    ),
    "an input of the cut that only larger batches give": (
        lambda: Model(lambda m, x: m.high(m.mid(*([m.low(x)] if len(x) > 2 else [m.other(x)])))),
        "depends on which rows",
    ),
    "an argument of the cut that only larger batches give": (
        lambda: Model(lambda m, x: m.high(m.mid(m.low(x), *([m.low(x) * 2] if len(x) > 2 else []))), mid=Adds()),
        "depends on which rows are in the batch",
    ),
    "no rows at the cut": (
        lambda: Model(lambda m, x: m.high(m.mid(m.low(torch.ones(3, 4)))).sum() + x),
        "nothing that crosses the cut has rows",
    ),
    "a tensor that grows with the square of the rows": (
        lambda: Model(lambda m, x: m.high(m.mid(m.low(x)[0])), Pair(lambda x: x.new_zeros(len(x) ** 2))),
        "low.*returns a tensor whose shape depends on which rows",
    ),
    "a nested output": (
        lambda: Model(lambda m, x: torch.nested.as_nested_tensor(list(m.high(m.mid(m.low(x)))))),
        "returns a nested tensor",
    ),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_parted(what):
    """The first call says why, and the model is as it was once it is undone."""
    make, why = REFUSED[what]
    model = frozen(make())
    expected = model(X)
    recycle(model, at="mid")
    with pytest.raises(CutError, match=why):
        model(X)
    uncached(model)
    for found, right in zip(model(X).unbind(), expected.unbind(), strict=True):
        assert torch.equal(found, right)


def scaled_by_a_sign(model, x):
    hidden, sign = model.low(x)
    return model.high(model.mid(hidden) * sign)


def test_something_for_all_rows_that_is_made_of_them():
    """It is the same for all parts of the first batch, but may be another in the next one, so it is not stored."""
    model = frozen(Model(scaled_by_a_sign, Pair(lambda x: x.amax().sign())))
    with pytest.raises(CutError, match=r"the output of low.*made of x: rows depend on each other"):
        recycle(model, at="mid", extra=True, batch=X + 1)


OF_THE_BATCH = {
    "the number of rows": lambda before, x: len(x),
    "a count of rows": lambda before, x: before + len(x),
    "a sum": lambda before, x: float(x.sum()),
    "a shape": lambda before, x: x.shape,
    "a text": lambda before, x: f"{len(x)} rows",
    "a flag": lambda before, x: len(x) > 3,
}


@pytest.mark.parametrize("note", OF_THE_BATCH.values(), ids=OF_THE_BATCH)
def test_a_plain_value_of_the_batch_may_not_stay_behind(note):
    """Whoever reads it after a resumed call, outside of the model too, would find that of another batch."""
    with pytest.raises(CutError, match=r"low, .* keeps a value of the batch in its attribute noted"):
        recycle(frozen(Model(low=Notes(note))), at="mid", batch=(X,))


@pytest.mark.parametrize("note", [lambda before, x: before + 1, lambda before, x: x.shape[1]], ids=["calls", "width"])
def test_a_plain_value_that_says_nothing_of_the_batch_may_stay_behind(note):
    """A number that grows by the same with each run, or is the same in each, refuses no cut."""
    model = frozen(Model(low=Notes(note)))
    recycle(model, at="mid")
    assert torch.equal(model(X), model(X))
    assert cache_of(model).stats.hits == len(X)


ARGUMENTS = {
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(1, 4)]), "x is a nested, packed"),
    "sparse": (X.to_sparse, "x is a nested, packed or sparse tensor"),
    "hidden": (lambda: types.SimpleNamespace(tensor=X), "x is a SimpleNamespace with tensors inside"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("what", ARGUMENTS)
def test_arguments_whose_rows_nobody_can_tell(what):
    """The error names the argument."""
    make, why = ARGUMENTS[what]
    model = recycle(frozen(Model()), at="mid")
    with pytest.raises(CutError, match=why):
        model(make())


def test_a_cut_inside_of_a_cached_module():
    """It is refused when it is asked for; once the cache is undone it can be made."""
    model = frozen(Model(low=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))))
    expected = model(X)
    cached_module(model.low)
    with pytest.raises(CutError, match=r"low is cached.*uncached\(\.\.\.\)"):
        recycle(model, at="low.1")
    uncached(model.low)
    recycle(model, at="low.1")
    assert torch.equal(model(X), expected)


class Closed(type):
    """A metaclass whose classes take no subclasses."""

    def __new__(cls, name, bases, body):
        if any(isinstance(base, Closed) for base in bases):
            raise TypeError("it is final")
        return super().__new__(cls, name, bases, body)


class Final(Model, metaclass=Closed):
    pass


def test_a_class_that_takes_no_subclass():
    """The error says so, and the model is left alone."""
    model = Final()
    with pytest.raises(UsageTypeError, match="cannot derive from Final: it is final"):
        recycle(model, at="mid")
    assert type(model) is Final
    assert "_modcache" not in vars(model)


def test_a_cut_that_cannot_be_moved_stays_where_it_was():
    """Recycling again with a batch that shows the new cut to be impossible leaves the model recycled as before."""
    model = recycle(frozen(Model(lambda m, x: m.high(m.mid(m.low(x))))), at="mid", batch=X)
    expected = model(X)
    with pytest.raises(CutError, match="not called"):
        recycle(model, at="other", batch=X)
    assert torch.equal(model(X), expected)
    assert cache_of(model).stats.hits == len(X)


def test_a_new_instance_of_the_class_of_a_recycled_model_is_a_plain_one():
    """`type(model)(...)` makes another model of the user's class, which is not recycled."""
    model = recycle(frozen(Model()), at="mid")
    other = type(model)()
    assert type(other) is Model
    assert other(X).shape == (6, 2)


def test_a_directory_that_cannot_be_used(tmp_path):
    """The model is recycled in memory, and one warning says so."""
    (tmp_path / "file").write_text("")
    with pytest.warns(CacheWarning, match="file"):
        model = recycle(frozen(Model()), at="mid", store=tmp_path / "file" / "cache")
        expected = model(X)
    assert torch.equal(model(X), expected)
    assert cache_of(model).stats.hits == len(X)


def test_what_hangs_on_the_cache_of_a_recycled_model():
    """Hooks are told of each call until they are taken away; closing leaves a store of the user's as it is."""
    store, reports = MemoryStore(), []
    model = recycle(frozen(Model()), at="mid", store=store)
    handle = cache_of(model).add_hook(reports.append)
    model(X)
    model(X)
    handle.remove()
    model(X)
    assert [(report.hits, report.computed) for report in reports] == [(0, 6), (6, 0)]
    cache_of(model).close()
    assert torch.equal(model(X), frozen(Model())(X))
    assert sum(len(list(store.row_keys(name))) for name in store.namespaces()) == len(X)
