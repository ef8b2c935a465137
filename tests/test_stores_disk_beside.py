"""Manifests and notes of use are written where there is room for them, and cost no row anything."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch

from modcache import DiskStore
from modcache.rows import Layout
from modcache.stores.disk import admission, room
from modcache.stores.disk.catalogue import Catalogue
from modcache.stores.disk.directory import Directory
from modcache.stores.disk.names import CATALOGUE, folder_of
from tests.directories import LARGE, files_in, have, later, put, quiet

KILO = Layout("*", ((torch.float32, (256,)),))
BOUND = 100_000
LONG = {"class": "x" * 2000}


def bytes_in(directory: Path) -> int:
    """The bytes of all that a bound counts."""
    return room.take_census(Directory(directory)).bytes


def noted(directory: Path) -> set[str]:
    """The namespaces that the catalogue knows of."""
    return set(Catalogue(directory / CATALOGUE, writable=False).entries())


def filled(directory: Path, **options) -> None:
    """Lets a store put rows until there is no room for any."""
    with quiet(1), DiskStore(directory, keep_free=0, **options) as store:
        for start in range(0, 120, 5):
            put(store, "a", range(start, start + 5), KILO)
            store.flush()


@pytest.mark.parametrize("max_bytes", [None, BOUND])
@pytest.mark.parametrize("gone", ["catalogue", "writers"])
def test_who_only_reads_makes_nothing_but_a_note(swift_path, max_bytes, gone):
    """Who reads rows leaves nothing but the note of that, and does not sign in as one who writes."""
    with DiskStore(swift_path) as store:
        put(store, "a", range(5))
    for name in {gone, "writers"}:
        shutil.rmtree(swift_path / name)
    (swift_path / "modcache.json").unlink()
    with DiskStore(swift_path, max_bytes=max_bytes) as store:
        assert have(store, "a", range(5)) == set(range(5))
    assert {path.name for path in swift_path.iterdir()} == {"rows", "catalogue"}
    assert noted(swift_path) == {"a"}


def test_no_namespace_goes_for_a_note(swift_path, monkeypatch):
    """Where there is no room to note that rows were read, no others are dropped for that."""
    with DiskStore(swift_path) as store:
        put(store, "old", range(5))
        put(store, "read", range(5))
    later(monkeypatch, 2)
    shutil.rmtree(swift_path / "catalogue")
    with quiet(0), DiskStore(swift_path, max_bytes=bytes_in(swift_path), keep_free=0) as store:
        assert have(store, "read", range(5)) == set(range(5))
    with DiskStore(swift_path) as store:
        assert have(store, "old", range(5)) == set(range(5))


def test_a_refused_manifest_keeps_no_row_out(swift_path, monkeypatch):
    """Rows find room by dropping what is old, also just after a manifest found none."""
    filled(swift_path, max_bytes=BOUND)
    later(monkeypatch, 2)
    with quiet(0), DiskStore(swift_path, max_bytes=BOUND, keep_free=0) as store:
        for number in range(10):  # `a` is spared for what is its own
            store.describe("a", {f"fact {number}": "x" * 2000})
        store.flush()
        put(store, "new", range(20), KILO)
        store.flush()
        assert have(store, "new", range(20), KILO) == set(range(20))


def test_a_manifest_that_grows_by_nothing_is_written(swift_path):
    """Where there is no room, what takes the place of as much is written all the same."""
    with DiskStore(swift_path) as store:
        put(store, "a", range(5))
        store.describe("a", LONG)
    with quiet(0), DiskStore(swift_path, max_bytes=bytes_in(swift_path), keep_free=0) as store:
        store.describe("a", {"class": "y" * 2000})
    with DiskStore(swift_path) as store:
        assert (store.manifest("a") or {}).get("class") == "y" * 2000


@pytest.mark.parametrize("content", [b"", b"text"])
def test_a_damaged_catalogue_is_rebuilt_where_there_is_room(swift_path, content):
    """A catalogue that somebody replaced by less is not rebuilt beyond the bound."""
    with DiskStore(swift_path) as store:
        put(store, "a", range(5))
    (swift_path / "catalogue" / "cache.db").write_bytes(content)
    bound = bytes_in(swift_path) + 10_000
    with quiet(0), DiskStore(swift_path, max_bytes=bound, keep_free=0) as store:
        assert have(store, "a", range(5)) == set(range(5))
    assert bytes_in(swift_path) <= bound
    with quiet(0), DiskStore(swift_path, max_bytes=bound + 30_000, keep_free=0) as store:
        assert have(store, "a", range(5)) == set(range(5))
    assert noted(swift_path) == {"a"}


def test_what_is_beside_the_rows_is_counted_once(swift_path):
    """A writer that was flushed holds nothing of the bound for itself, whatever it described and noted."""
    with DiskStore(swift_path, max_bytes=1 << 20, keep_free=0) as store:
        store.describe("a", LONG)
        put(store, "a", range(5))
        store.flush()
        while store._writing._queue._uses:  # the note waits until there is nothing else to do
            threading.Event().wait(0.001)
        store.flush()
        (writer,) = Directory(swift_path).writers()
        cap = int((swift_path / "writers" / writer).read_text())
        assert 0 <= cap - room.take_census(Directory(swift_path)).writers[writer] < 100, "a frame is guessed at"
    assert noted(swift_path) == {"a"}


def test_a_directory_that_fills_at_one_go_has_its_note(swift_path):
    """Rows leave room for the note that they were used, though it is written when no more of them wait."""
    bound, go = 2 << 20, threading.Event()
    with quiet(1), DiskStore(swift_path, max_bytes=bound, keep_free=0) as store:
        write = store._writing._write
        store._writing._write = lambda puts: (go.wait(60), write(puts))
        for number in range(40):
            put(store, "a", [number], LARGE)
        go.set()
        store.flush()
        assert store.stats().refused > 0
    assert noted(swift_path) == {"a"}
    assert bound * 0.9 < bytes_in(swift_path) <= bound


def test_what_was_refused_is_described_with_its_rows(swift_path):
    """A namespace that was deleted after its manifest was refused has none until it has rows again."""
    filled(swift_path, max_bytes=BOUND)
    with quiet(1), DiskStore(swift_path, max_bytes=BOUND, keep_free=0) as store:
        for name in ("b", "c"):
            store.describe(name, {"class": "x" * 10_000})
        assert store.delete("b") == 0
        store.flush()
        assert [path for path in files_in(swift_path) if path.name == "manifest.json"] == []
        store.delete("a")
        put(store, "c", range(5), KILO)
        store.flush()
        assert {path.parent.name for path in swift_path.rglob("manifest.json")} == {folder_of("c")}
        assert have(store, "c", range(5), KILO) == set(range(5))
    assert bytes_in(swift_path) <= BOUND


@pytest.mark.parametrize("bound", [BOUND, 1 << 30])
def test_a_thousand_manifests_are_not_a_thousand_counts(swift_path, monkeypatch, bound):
    """What lies there is not counted for each manifest, neither where there is no room, nor where there is."""
    filled(swift_path, max_bytes=BOUND)
    count = mock.Mock(side_effect=room.take_census)
    monkeypatch.setattr(room, "take_census", count)
    monkeypatch.setattr(admission, "_STUBBORN", 1e9)
    with quiet(0), DiskStore(swift_path, max_bytes=bound, keep_free=0) as store:
        for number in range(1000):
            store.describe(f"n{number}", LONG)
        store.flush()
        assert count.call_count < 20
    assert bytes_in(swift_path) <= bound
