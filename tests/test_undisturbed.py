"""A run that nobody asked for leaves what a module notes on itself as it was."""

from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

from modcache import CacheWarning, cached_module
from modcache.contents import contents_of, is_changed
from modcache.undisturbed import undisturbed


class Notes(nn.Module):
    """Notes each call in every way that a module may."""

    def __init__(self):
        super().__init__()
        self.count = 0
        self.seen = []
        self.by_name = {"kept": 1}
        self.kinds = {1}
        self.latest = deque(maxlen=2)
        self.gone = "there at first"
        self.before = None
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.inner = nn.Identity()

    def forward(self, x):
        self.count += 1
        self.seen.append(float(x.sum()))
        self.by_name["last"] = self.by_name["kept"] = x
        self.kinds.add(self.count + 1)
        self.latest.append(self.count)
        self.before = x
        self.new = x
        if hasattr(self, "gone"):
            del self.gone
        self.calls += 1
        self.inner.count = self.count
        return x * 2


def noted(module):
    return {
        "count": module.count,
        "seen": list(module.seen),
        "by_name": dict(module.by_name),
        "kinds": set(module.kinds),
        "latest": list(module.latest),
        "gone": getattr(module, "gone", None),
        "before": module.before,
        "new": getattr(module, "new", None),
        "calls": int(module.calls),
        "inner": getattr(module.inner, "count", None),
    }


def test_everything_is_put_back():
    """Attributes, items, counters, what was removed and what is new; containers stay the same objects."""
    module = Notes()
    before, containers = noted(module), [module.seen, module.by_name, module.kinds, module.latest]
    with undisturbed(module):
        module(torch.ones(2))
        assert module.count == 1
    assert noted(module) == before
    assert all(
        one is other
        for one, other in zip(containers, [module.seen, module.by_name, module.kinds, module.latest], strict=True)
    )


def test_it_is_put_back_after_an_error_too():
    """A forward that fails half-way leaves no half of a note."""
    module = Notes()
    with pytest.raises(ZeroDivisionError), undisturbed(module):
        module(torch.ones(2))
        raise ZeroDivisionError
    assert module.count == 0
    assert module.seen == []


def test_what_was_not_changed_is_not_written():
    """Another thread may be at work: a list that the run left alone is not emptied and filled again."""

    class Untouchable(list):
        def clear(self):
            raise AssertionError("written")

    module = Notes()
    module.seen = Untouchable([1])
    version = module.calls._version
    with undisturbed(module):
        module.count += 1
    assert module.seen == [1]
    assert module.calls._version == version


class Counting(nn.Module):
    """Multiplies by the number of the call."""

    def __init__(self):
        super().__init__()
        self.step = 0

    def forward(self, x):
        self.step += 1
        return x * self.step


class Remembering(nn.Module):
    """Adds what it saw in all calls before."""

    def __init__(self):
        super().__init__()
        self.history = []

    def forward(self, x):
        self.history.append(float(x.sum()))
        return x + sum(self.history)


class Recurring(nn.Module):
    """Goes on from the state that it was left in."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(3, 3)
        self.state = torch.zeros(1, 3)

    def forward(self, x):
        self.state = self.cell(x, self.state.expand(len(x), -1)).mean(0, keepdim=True)
        return self.state.expand(len(x), -1).clone()


@pytest.mark.parametrize("kind", [Counting, Remembering, Recurring])
def test_a_module_with_a_state_goes_on_as_if_it_had_not_been_checked(kind):
    """It is found out and bypassed; each of its outputs is that of the same call of a plain one."""
    torch.manual_seed(0)
    plain, module = (kind().requires_grad_(False).eval() for _ in range(2))
    module.load_state_dict(plain.state_dict())
    cached_module(module)
    with pytest.warns(CacheWarning, match="run again on a few rows"):
        for _ in range(4):
            batch = torch.randn(4, 3)
            torch.testing.assert_close(module(batch), plain(batch))
            torch.testing.assert_close(module(batch), plain(batch))


def test_what_an_argument_holds_is_compared():
    """Lists, dicts and arrays, however deep; a text or a tuple holds nothing that could be changed."""
    inner, array = [1.0, 2.0], np.zeros(3)
    table = {"inner": (inner, array), "text": ["a", "b"]}
    table["table"] = table
    contents = contents_of(table)
    assert not is_changed(contents)
    array[1] = -0.0
    assert is_changed(contents)
    array[1] = 0.0
    assert not is_changed(contents)
    inner[1] = float("2.0")
    assert is_changed(contents), "another object, of which the forward may have made the old one"
    assert contents_of("text") == contents_of((1, "a")) == []
