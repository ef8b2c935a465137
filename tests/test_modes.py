"""One switch for all cached modules of the process, and keys for those that are nested."""

import importlib.util
import sys
import threading

import pytest
import torch
from torch import nn

from modcache import CacheMissError, UsageError, UsageTypeError, cache_of, cached_module, keys_for, mode, modes
from modcache.modes import MODES, KeysAround, current_mode, keys_around

from .models import encoder

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def cached():
    module = encoder()
    return cached_module(module, freeze=True)


def outcome(module, batch=X):
    """What a call did: rows hit, computed, bypassed."""
    before = cache_of(module).stats
    assert torch.equal(module(batch), encoder()(batch))
    after = cache_of(module).stats
    return after.hits - before.hits, after.computed - before.computed, after.bypassed - before.bypassed


def test_read_write():
    """Stored rows are served, computed ones are stored."""
    module = cached()
    assert outcome(module) == (0, 4, 0)
    assert outcome(module) == (4, 0, 0)


def test_read_only():
    """Stored rows are served, nothing is stored."""
    module = cached()
    module(X[:2])
    with mode("read-only"):
        assert outcome(module) == (2, 2, 0)
        assert outcome(module) == (2, 2, 0)


def test_refresh():
    """Every row is computed, and what is stored is overwritten."""
    module = cached()
    module(X)
    store, namespace = cache_of(module).store, cache_of(module).namespace
    (found,) = store.get(namespace, store.row_keys(namespace))
    for tensor in found.rows.tensors:
        tensor.zero_()
    store.put(namespace, store.row_keys(namespace), found.rows)
    with mode("refresh"):
        assert outcome(module) == (0, 4, 0)
    assert outcome(module) == (4, 0, 0)


def test_require_hit():
    """Rows that are missing are named, and nothing is computed; all stored rows are served."""
    module = cached()
    module(X[:2])
    calls = module.calls
    with mode("require-hit"):
        assert torch.equal(module(X[:2]), encoder()(X[:2]))
        with pytest.raises(CacheMissError, match=r"but 2 of 4 are not stored: rows 2, 3") as found:
            module(X)
    assert isinstance(found.value, KeyError)
    assert module.calls == calls


def test_off():
    """Modules run as if they were not cached."""
    module = cached()
    module(X)
    with mode("off"):
        assert outcome(module) == (0, 0, 4)
    assert dict(cache_of(module).stats.reasons) == {"mode off": 4}
    assert outcome(module) == (4, 0, 0)


def test_a_mode_lasts_until_it_is_left():
    """As a statement for good, as a context until its end, nested and through errors."""
    mode("read-only")
    with mode("off"):
        with mode("refresh"):
            assert current_mode() == "refresh"
        with pytest.raises(ZeroDivisionError), mode("require-hit"):
            raise ZeroDivisionError
        assert current_mode() == "off"
    assert current_mode() == "read-only"


def test_modes_are_for_all_threads():
    """The mode is the process's."""
    seen = []
    with mode("off"):
        worker = threading.Thread(target=lambda: seen.append(current_mode()))
        worker.start()
        worker.join()
    assert seen == ["off"]


def test_one_mode_object_can_be_entered_later():
    """What `mode` gives switches again when it is entered."""
    later = mode("off")
    mode("refresh")
    with later as entered:
        assert entered is later
        assert current_mode() == "off"


def test_blocks_that_overlap():
    """Blocks of two threads or tasks end in any order, and leave the mode that was before both."""
    first, second = mode("off"), mode("read-only")
    first.__enter__()
    second.__enter__()
    assert current_mode() == "read-only"
    first.__exit__(None, None, None)
    assert current_mode() == "read-only"
    second.__exit__(None, None, None)
    assert current_mode() == "read-write"


def test_statements_around_and_within_blocks():
    """A statement is for good, one within a block lasts as long as the block; none are kept without need."""
    for _ in range(50):
        mode("refresh")
        mode("read-only")
    assert len(modes._switches) < 5
    with mode("off"):
        for _ in range(50):
            mode("require-hit")
        assert current_mode() == "require-hit"
        with mode("refresh"):
            mode("off")
        assert current_mode() == "require-hit"
        assert len(modes._switches) < 8
    assert current_mode() == "read-only"


def test_one_mode_object_entered_twice():
    """A block within a block of the same object is left twice."""
    both = mode("off")
    with both:
        with both:
            pass
        assert current_mode() == "off"
    assert current_mode() == "read-write"


@pytest.mark.parametrize(("name", "error"), [("on", UsageError), (None, UsageTypeError), (True, UsageTypeError)])
def test_no_mode(name, error):
    """An unknown mode is refused with the list of the known, and changes nothing."""
    with pytest.raises(error, match=r"mode\(...\) must be one of 'read-write', .*; found"):
        mode(name)
    assert current_mode() == "read-write"


def started_in(monkeypatch, name):
    """The mode of a process that starts with this environment, out of a second copy of the module."""
    monkeypatch.setenv("MODCACHE_MODE", name)
    spec = importlib.util.spec_from_file_location("modcache.modes_again", modes.__file__)
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "modcache.modes_again", again)
    spec.loader.exec_module(again)
    return again.current_mode()


@pytest.mark.parametrize("name", MODES)
def test_the_environment(name, monkeypatch):
    """MODCACHE_MODE is the mode that a process starts in."""
    assert started_in(monkeypatch, name) == name


def test_an_empty_environment(monkeypatch):
    """Set to nothing, as scripts do, it is as if it were not set."""
    assert started_in(monkeypatch, "") == "read-write"


def test_a_wrong_environment(monkeypatch):
    """A wrong MODCACHE_MODE says so at once."""
    with pytest.raises(UsageError, match=r"the environment variable MODCACHE_MODE must be one of .*; found 'on'"):
        started_in(monkeypatch, "on")


def test_keys_for_nested_modules():
    """A cached module inside of a model is keyed by what was given around the call."""
    inner = cached()
    model = nn.Sequential(inner, nn.Identity())
    ids = torch.tensor([3, 1, 4, 1])
    with keys_for(ids):
        first = model(X)
    with keys_for(ids):
        again = model(X + 1)
    assert torch.equal(first, again)
    assert keys_around() is None
    assert cache_of(inner).stats.computed == 3


def test_two_towers_have_keys_of_their_own():
    """The second call of a module in one block is about other rows; of another module, about its first."""
    inner = cached()
    with keys_for([1, 2, 3, 4]):
        first, second = inner(X), inner(-X)
    with keys_for([1, 2, 3, 4]):
        assert torch.equal(inner(X + 1), first)
        assert torch.equal(inner(X + 1), second)
    assert cache_of(inner).stats.computed == 8


def test_given_directly_wins():
    """`cache_keys=` is for this call, `keys_for` for the others; blocks nest."""
    inner = cached()
    with keys_for([1, 2, 3, 4]):
        inner(X)
        inner(X, cache_keys=[5, 6, 7, 8])
        with keys_for([9, 10, 11, 12]):
            assert keys_around().keys == [9, 10, 11, 12]
        assert keys_around().keys == [1, 2, 3, 4]
    assert cache_of(inner).contains(X, cache_keys=[1, 2, 5, 9]) == [True, True, True, False]


def test_numbers_of_calls():
    """Calls are counted by module."""
    given = KeysAround([1])
    assert [given.number("a"), given.number("b"), given.number("a")] == [0, 0, 1]


def test_keys_are_the_threads():
    """What is given in one thread is not given in another, and goes with an error."""
    seen = []
    with pytest.raises(ZeroDivisionError), keys_for([1]):
        worker = threading.Thread(target=lambda: seen.append(keys_around()))
        worker.start()
        worker.join()
        raise ZeroDivisionError
    assert seen == [None]
    assert keys_around() is None


def test_a_decorator_acts_while_its_function_runs():
    """``@mode(...)`` leaves the process as it is, and switches for each call, also when it raises."""

    @mode("off")
    def within(fails=False):
        """Says the mode."""
        if fails:
            raise ValueError("as asked")
        return current_mode()

    assert current_mode() == "read-write"
    assert (within(), current_mode()) == ("off", "read-write")
    with pytest.raises(ValueError, match="as asked"):
        within(fails=True)
    assert current_mode() == "read-write"
    assert within.__doc__ == "Says the mode."
