"""Every error is ours and the built-in that a caller already catches."""

import inspect
import pickle

import pytest

from modcache import CacheMissError, CacheWarning, ModcacheError, errors

BUILT_IN = {
    "UsageError": ValueError,
    "UsageTypeError": TypeError,
    "NotCachedError": ValueError,
    "LayeredError": RuntimeError,
    "KeyExtractionError": TypeError,
    "CutError": ValueError,
    "FormatVersionError": ValueError,
    "CacheMissError": KeyError,
    "StaleRecordError": RuntimeError,
}


def test_all_errors_are_listed():
    """The tree in the docstring, the table here and the module hold the same errors."""
    found = {name for name, cls in vars(errors).items() if inspect.isclass(cls) and issubclass(cls, ModcacheError)}
    assert found - {"ModcacheError"} == BUILT_IN.keys()
    assert sorted(found | {"CacheWarning"}) == errors.__all__
    assert all(f" {name} " in errors.__doc__ for name in BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_error_is_the_built_in_one(name):
    """An error is caught as ours and as the built-in, says what it was given, and survives a pickle."""
    error = getattr(errors, name)("what was asked, what was found")
    assert isinstance(error, ModcacheError)
    assert isinstance(error, BUILT_IN[name])
    assert str(error) == "what was asked, what was found"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), str(error))


def test_a_miss_reads_as_a_sentence():
    """A KeyError would print the repr of its message."""
    assert str(CacheMissError("two words")) == "two words"


def test_a_warning_is_the_users():
    """A CacheWarning is a UserWarning, so that it is shown by default."""
    assert issubclass(CacheWarning, UserWarning)
