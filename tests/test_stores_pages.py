"""Memory straight from the system: zeros that go back when they are dropped."""

from __future__ import annotations

import mmap
import sys

import numpy as np
import pytest

from modcache.stores.pages import reserve, zeros


def owner(array):
    """What an array's memory belongs to in the end; None where it is its own."""
    while isinstance(array, np.ndarray | memoryview):
        array = array.base if isinstance(array, np.ndarray) else array.obj
    return array


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="pages cannot be given back here")
@pytest.mark.parametrize(("count", "by_system"), [(0, False), (1000, False), (1 << 15, True), (1 << 17, True)])
def test_what_the_allocator_would_keep_is_the_systems(count, by_system):
    """From a quarter of a megabyte on, an array is no part of the heap, which would grow by it for good."""
    made = zeros((count, 1), np.int64)
    assert made.shape == (count, 1)
    assert not made.any()
    assert isinstance(owner(made), mmap.mmap) == by_system


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is counted when it is asked for")
def test_more_than_there_is():
    """Pages for more bytes than there is memory can be had, as long as they are not touched."""
    pages = reserve(1 << 42, 1 << 42)
    if pages is None:
        pytest.skip("this system does not promise more than it has")
    assert pages[1 << 41] == 0
    assert reserve(0, 0) is None
