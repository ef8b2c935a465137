"""A defect of this package does not end a loop; an error of the user's own code reaches the user as it is."""

import gc
import re
import traceback
import weakref

import pytest
import torch
from torch import nn

from modcache import CacheWarning, KeyExtractionError, UsageError, cache_of, cached_module
from modcache.attached import _own_failure  # before a fixture takes the net away
from tests.hazards import frozen

X = torch.randn(4, 3)


class Failing(nn.Module):
    """Raises what it is told to."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        if self.error is not None:
            raise self.error
        return x * 2


@pytest.fixture(autouse=True)
def _net(monkeypatch, _no_net):
    monkeypatch.setattr("modcache.attached._own_failure", _own_failure)


@pytest.mark.parametrize("where", ["modcache.attached.hit", "modcache.attached.call", "modcache.attached.context"])
def test_a_defect_of_ours_is_a_warning(where, monkeypatch, caplog):
    """Whatever fails within, the call gives what the module gives; it is counted, told once, and logged."""
    module = cached_module(frozen(nn.Linear(3, 3)))
    expected = nn.functional.linear(X, module.weight, module.bias)

    def fail(*_):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(where, fail)
    with pytest.warns(CacheWarning, match="ZeroDivisionError: a defect.*report it") as caught:
        assert torch.equal(module(X), expected)
    assert torch.equal(module(X), expected)
    assert len(caught) == 1
    assert cache_of(module).stats.reasons == {"modcache failed": 8}
    assert "ZeroDivisionError" in caplog.text


REFUSED = [OSError(24, "Too many open files"), MemoryError("no room"), torch.OutOfMemoryError("no room")]


@pytest.mark.parametrize("error", REFUSED, ids=repr)
@pytest.mark.parametrize("where", ["modcache.attached.context_facts", "modcache.call.batch_of"])
def test_what_the_system_refuses_us_is_a_warning(where, error, monkeypatch):
    """What a call takes beside its forward may be refused: the forward runs, and nobody is told of a defect."""
    module = cached_module(frozen(nn.Linear(3, 3)))
    expected = nn.functional.linear(X, module.weight, module.bias)

    def refuse(*_):
        raise error

    monkeypatch.setattr(where, refuse)
    with pytest.warns(CacheWarning, match=f"system refused.*{re.escape(str(error))}") as caught:
        assert torch.equal(module(X), expected)
    assert torch.equal(module(X), expected)
    assert len(caught) == 1
    assert cache_of(module).stats.reasons == {"the system refused something": 8}


def test_a_file_that_cannot_be_read_reaches_the_user(tmp_path):
    """It is their file, so they see what opening it raises."""
    module = cached_module(frozen(Failing(None)), key="path", prepare=lambda paths: torch.ones(len(paths), 3))
    for path, error in ((tmp_path / "absent", FileNotFoundError), (tmp_path, IsADirectoryError)):
        with pytest.raises(error, match=str(path)):
            module([str(path)])


@pytest.mark.parametrize("error", [ValueError("mine"), KeyError("mine"), RuntimeError("mine"), StopIteration()])
def test_errors_of_a_forward_reach_the_user(error):
    """The very same error, with no other error as its context, and the module works afterwards."""
    module = cached_module(frozen(Failing(error)))
    with pytest.raises(type(error)) as caught:
        module(X)
    assert caught.value is error
    assert error.__context__ is None
    assert "Bypass" not in "".join(traceback.format_exception(error))
    module.error = None
    assert torch.equal(module(X), X * 2)


def test_errors_of_a_bypassed_forward_reach_the_user():
    """A call that is run as if uncached fails as if uncached."""
    error = ValueError("mine")
    with pytest.warns(CacheWarning, match="training mode"):
        module = cached_module(nn.Sequential(Failing(error), nn.Dropout()))
    with pytest.raises(ValueError, match="mine") as caught:
        module(X)
    assert caught.value.__context__ is None


def test_errors_of_what_prepares_reach_the_user():
    """So do those of ``prepare=`` and, as an error of keys, those of a key function."""

    def broken(*_):
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        cached_module(frozen(nn.Linear(3, 3)), prepare=broken)(X)
    with pytest.raises(KeyExtractionError, match="LookupError: mine"):
        cached_module(frozen(nn.Linear(3, 3)), key=broken)(X)


def test_misuse_reaches_the_user():
    """A wrong number of keys is theirs to mend."""
    with pytest.raises(UsageError, match="4 rows, found 1"):
        cached_module(frozen(nn.Linear(3, 3)))(X, cache_keys=[1])


def test_no_error_is_kept_alive():
    """What its frames hold may be large."""
    module = cached_module(frozen(Failing(LookupError)))  # the class: an error in an attribute would be held by it
    batch = X.clone()
    gone = weakref.ref(batch)
    with pytest.raises(LookupError):
        module(batch)
    del batch
    gc.collect()
    assert gone() is None
