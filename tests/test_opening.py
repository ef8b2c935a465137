"""The option ``store=``: a path, a store, or nothing."""

import os
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from modcache import (
    CacheWarning,
    DiskStore,
    MemoryStore,
    TieredStore,
    UsageError,
    UsageTypeError,
    cache_of,
    cached_module,
)

from .models import CountingEncoder

BATCH = torch.arange(12.0).reshape(4, 3)


def encoder(seed=0):
    torch.manual_seed(seed)
    return CountingEncoder()


def test_a_path_that_cannot_be_one_is_refused():
    """No file system has a null character in a name, and opening such a path says nothing of a store."""
    with pytest.raises(UsageError, match="null character"):
        cached_module(encoder(), freeze=True, store="a\0b")


@pytest.mark.parametrize("kind", [str, Path, os.fsencode])
def test_a_path_is_memory_in_front_of_a_directory(tmp_path, kind):
    """Rows lie in the directory when the module is closed, and another module of the same content computes nothing."""
    cached = cached_module(encoder(), freeze=True, store=kind(str(tmp_path / "cache")))
    expected = cached(BATCH)
    store = cache_of(cached).store
    assert isinstance(store, TieredStore)
    assert isinstance(store.front, MemoryStore)
    assert isinstance(store.back, DiskStore)
    cache_of(cached).close()
    later = encoder()
    again = cached_module(later, freeze=True, store=str(tmp_path / "cache"))
    assert torch.equal(again(BATCH), expected)
    assert later.calls == 0


def test_a_path_is_made_absolute_at_once(tmp_path, monkeypatch):
    """Changing the working directory after wrapping moves no rows."""
    monkeypatch.chdir(tmp_path)
    cached = cached_module(encoder(), freeze=True, store="cache")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    cached(BATCH)
    cache_of(cached).flush()
    assert (tmp_path / "cache").is_dir()
    assert not (tmp_path / "elsewhere" / "cache").exists()


def test_a_path_in_the_home_directory(tmp_path, monkeypatch):
    """``~`` is what a shell makes of it; nobody wants a directory of that name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    cached = cached_module(nn.Linear(3, 2), freeze=True, store="~/cache")
    cached(BATCH)
    cache_of(cached).close()
    assert (tmp_path / "cache").is_dir()


def test_two_modules_on_one_path_share_the_directory(tmp_path):
    """A process has one disk store for a directory, so that a module finds what another one just stored."""
    first = cached_module(encoder(), freeze=True, store=tmp_path / "cache")
    first(BATCH)
    later = encoder()
    second = cached_module(later, freeze=True, store=tmp_path / "cache")
    second(BATCH)
    assert cache_of(first).store.back is cache_of(second).store.back
    assert later.calls == 0


def test_wrapping_again_with_the_same_path_changes_nothing(tmp_path, monkeypatch):
    """A path is compared by what it means."""
    monkeypatch.chdir(tmp_path)
    cached = cached_module(encoder(), freeze=True, store="cache")
    assert cached_module(cached, freeze=True, store=tmp_path / "cache") is cached
    with pytest.raises(UsageError, match="is cached already"):
        cached_module(cached, freeze=True, store="other")


def test_a_path_of_a_file(tmp_path):
    """A file is no cache directory, and stays what it was."""
    file = tmp_path / "weights.bin"
    file.write_bytes(b"precious")
    with pytest.raises(UsageError, match=r"found a file at .*weights\.bin"):
        cached_module(encoder(), freeze=True, store=file)
    assert file.read_bytes() == b"precious"


@pytest.mark.parametrize("wrong", ["", 3, MemoryStore, object()])
def test_what_is_no_store(wrong):
    """Anything else is refused with what would do."""
    with pytest.raises((UsageError, UsageTypeError), match=r"store (must be|is the path)"):
        cached_module(encoder(), freeze=True, store=wrong)


def test_a_newer_format_warns_and_passes_through(tmp_path):
    """A directory of a later version is left alone: one warning, and rows are kept in memory."""
    directory = tmp_path / "cache"
    directory.mkdir()
    (directory / "modcache.json").write_text('{"format": 99}')
    with pytest.warns(CacheWarning, match="99") as caught:
        cached = cached_module(encoder(), freeze=True, store=directory)
    assert caught[0].filename == __file__
    assert torch.equal(cached(BATCH), encoder()(BATCH))
    cached(BATCH)
    assert cache_of(cached).stats.hits == 4


def test_statistics_count_no_rows_of_others(tmp_path, monkeypatch):
    """Whoever prints statistics after each batch does not read the logs of all that others write there."""
    encoder = cached_module(nn.Linear(4, 3), freeze=True, store=str(tmp_path / "cache"))
    encoder(torch.randn(8, 4))
    cache_of(encoder).flush()
    monkeypatch.setattr("modcache.stores.disk.counting.Counts.of", None)
    time.sleep(1.1)
    assert cache_of(encoder).stats.bytes > 8 * 12
    assert "8 rows" in repr(cache_of(encoder))
    cache_of(encoder).close()
