"""A directory that is full, read-only, failing or gone: one warning, the loop goes on, what was committed stays."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

from modcache import DiskStore, MemoryStore, TieredStore, cache_of, cached_module
from modcache.rows import Layout, Rows
from modcache.stores.disk import admission, catalogue
from tests.directories import (
    ERRORS,
    LARGE,
    LAYOUTS_ON_DISK,
    SOAK,
    Child,
    Faults,
    files_in,
    fork,
    have,
    key_of,
    later,
    needs_fork,
    put,
    quiet,
    sizes_in,
    snapshot,
)
from tests.models import encoder

BATCH = torch.arange(24.0).reshape(8, 3)
KILO = Layout("*", ((torch.float32, (256,)),))
PLENTY = 1 << 50
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def usable(directory: Path, names: dict[str, Layout], numbers: range) -> dict[str, set[int]]:
    """What a later process has of these rows; none is wrong."""
    with quiet(0), DiskStore(directory) as store:
        return {name: have(store, name, numbers, layout) for name, layout in names.items()}


# --- max_bytes ------------------------------------------------------------------------------------------


def test_the_bound_holds(swift_path):
    """Once the files are as large as allowed, rows are refused with one warning, and those that are there stay."""
    bound = 100_000
    with quiet(1) as texts:
        store = DiskStore(swift_path, max_bytes=bound, keep_free=0)
        for start in range(0, 300, 10):
            put(store, "a", range(start, start + 10), KILO)
            store.flush()
            assert sizes_in(swift_path) <= bound
        stats = store.stats()
        first = have(store, "a", range(300), KILO)
        store.close()
    assert len(texts) == 1
    assert "max_bytes" in texts[0] or "bytes" in texts[0]
    assert stats.max_bytes == bound
    assert stats.refused == 300 - len(first) > 0
    assert stats.bytes <= bound
    assert {*range(60)} <= first, "it refused long before it was full"
    assert usable(swift_path, {"a": KILO}, range(300))["a"] == first
    assert sizes_in(swift_path) > bound * 0.7


def all_bytes_in(directory: Path) -> int:
    """The bytes of everything in a cache directory that grows with what is stored."""
    return sum(path.stat().st_size for part in ("rows", "catalogue") for path in (directory / part).rglob("*"))


def test_the_bound_is_of_all_files(swift_path):
    """The note of when a namespace was used counts, too, though it is written after the rows."""
    bound = 100_000
    with quiet(1), DiskStore(swift_path, max_bytes=bound, keep_free=0) as store:
        for start in range(0, 300, 10):
            put(store, "a", range(start, start + 10), KILO)
    assert bound * 0.7 < all_bytes_in(swift_path) <= bound


def test_the_bound_is_of_manifests_too(swift_path):
    """What is described of a namespace that has no room is written as soon as there is room for its rows."""
    bound, long = 100_000, {"class": "x" * 2000}
    with quiet(1), DiskStore(swift_path, max_bytes=bound, keep_free=0) as store:
        put(store, "a", range(90), KILO)
        store.flush()
        for number in range(20):
            store.describe(f"n{number}", long)
        store.flush()
        assert all_bytes_in(swift_path) <= bound
        put(store, "n19", range(100, 110), KILO)
        store.flush()
        store.delete("a")
        put(store, "n19", range(10), KILO)
    with DiskStore(swift_path) as store:
        assert (store.manifest("n19") or {}).get("class") == long["class"]
        assert have(store, "n19", range(10), KILO) == set(range(10))
    assert all_bytes_in(swift_path) <= bound


def test_the_bound_holds_over_restarts(swift_path):
    """What earlier processes wrote counts."""
    bound = 100_000
    for start in range(0, 300, 10):
        with quiet(1), DiskStore(swift_path, max_bytes=bound, keep_free=0) as store:
            put(store, "a", range(start, start + 10), KILO)
        assert sizes_in(swift_path) <= bound
    assert len(usable(swift_path, {"a": KILO}, range(300))["a"]) >= 60


@needs_fork
def test_the_bound_holds_for_several_writers(swift_path):
    """Four writers at once keep it together, within one batch of each."""
    bound, batch = 400_000, 10

    def writer(say, seed):
        with quiet(1), DiskStore(swift_path, max_bytes=bound, keep_free=0) as store:
            for start in range(seed * 1000, seed * 1000 + 300, batch):
                put(store, "a", range(start, start + batch), KILO)
                time.sleep(0.0005)

    writers = [Child(lambda say, seed=seed: writer(say, seed)) for seed in range(4)]
    most = 0
    for child in writers:
        with child:
            child.wait()
            assert child.status == 0
        most = max(most, sizes_in(swift_path))
    assert most <= bound + 4 * batch * (KILO.row_bytes + 24)
    numbers = [n for seed in range(4) for n in range(seed * 1000, seed * 1000 + 300)]
    with DiskStore(swift_path) as store:
        there = [
            n for start in range(0, len(numbers), 300) for n in have(store, "a", numbers[start : start + 300], KILO)
        ]
    assert len(there) * KILO.row_bytes > bound * 0.7


def test_a_bound_is_more_than_nothing(swift_path):
    """A bound that leaves room for nothing is a mistake, told at once."""
    for bound in (0, -1):
        with pytest.raises(ValueError, match="max_bytes"):
            DiskStore(swift_path, max_bytes=bound)
    with pytest.raises((TypeError, ValueError), match="max_bytes"):
        DiskStore(swift_path, max_bytes="1GB")
    with pytest.raises(ValueError, match="keep_free"):
        DiskStore(swift_path, keep_free=-1)


def test_the_least_recently_used_namespaces_go(swift_path, monkeypatch):
    """Room is made by dropping other namespaces whole, the one that was used longest ago first."""
    bound = 200_000
    for name in ("oldest", "old", "new"):
        with DiskStore(swift_path, max_bytes=bound, keep_free=0) as store:
            put(store, name, range(50), KILO)
            have(store, name, range(50), KILO)
        later(monkeypatch, 2)
    with quiet(0), DiskStore(swift_path, max_bytes=bound, keep_free=0) as store:
        have(store, "oldest", range(50), KILO)  # a read is a use
    later(monkeypatch, 2)
    with quiet(0), DiskStore(swift_path, max_bytes=bound, keep_free=0) as store:
        put(store, "now", range(100, 180), KILO)
        store.flush()
        assert have(store, "now", range(100, 180), KILO) == set(range(100, 180))
        assert sizes_in(swift_path) <= bound
        assert have(store, "old", range(50), KILO) == set(), "it was used longest ago"
        assert have(store, "oldest", range(50), KILO) == set(range(50))
        assert store.stats().evicted >= 50


def test_what_one_process_used_hours_ago_may_go(swift_path, monkeypatch):
    """A process that lives for days does not hold on to what it used in the morning."""
    bound = 200_000
    with quiet(0), DiskStore(swift_path, max_bytes=bound, keep_free=0) as store:
        for name in "abcdefgh":
            put(store, name, range(50), KILO)
            store.flush()
            assert have(store, name, range(50), KILO) == set(range(50))
            later(monkeypatch, 2)
        assert sizes_in(swift_path) <= bound
        assert have(store, "a", range(50), KILO) == set()
        assert have(store, "h", range(50), KILO) == set(range(50))


def test_namespaces_in_use_do_not_go(swift_path):
    """What was used within the hour is never dropped for new rows: these are refused."""
    bound = 150_000
    with quiet(1) as texts:
        with DiskStore(swift_path, max_bytes=bound, keep_free=0) as store:
            put(store, "a", range(50), KILO)
        with DiskStore(swift_path, max_bytes=bound, keep_free=0) as store:
            put(store, "b", range(50), KILO)
            store.flush()
            put(store, "c", range(50), KILO)
            store.flush()
            assert have(store, "c", range(50), KILO) != set(range(50))
            assert have(store, "a", range(50), KILO) == set(range(50))
            assert have(store, "b", range(50), KILO) == set(range(50))
    assert len(texts) == 1


def test_a_row_beyond_the_bound(swift_path):
    """A batch that can never fit is refused, and the smaller ones after it are not."""
    with quiet(1), DiskStore(swift_path, max_bytes=100_000, keep_free=0) as store:
        put(store, "a", range(5), LARGE)
        store.flush()
        put(store, "b", range(5), KILO)
        store.flush()
        assert have(store, "b", range(5), KILO) == set(range(5))
    assert sizes_in(swift_path) <= 100_000


def test_the_free_space_floor(swift_path):
    """Nothing is written when that would leave less free space than asked for."""
    with quiet(1) as texts, DiskStore(swift_path, keep_free=PLENTY) as store:
        for start in range(0, 50, 10):
            put(store, "a", range(start, start + 10))
            store.flush()
        assert store.stats().refused >= 10
    assert len(texts) == 1
    assert sum(path.stat().st_size for path in files_in(swift_path) if path.suffix == ".rows") < 200
    assert usable(swift_path, {"a": KILO}, range(50))["a"] == set()


# --- disks that are full --------------------------------------------------------------------------------


def loop(directory: Path, batches: int = 6, **options) -> tuple[list[str], int]:
    """An epoch over a module in front of a directory: the plain results, however it goes; warnings, rows computed."""
    model = encoder()
    plain = encoder()
    with quiet() as texts, torch.no_grad():
        store = TieredStore(MemoryStore(), DiskStore(directory, **options))
        module = cached_module(model, freeze=True, store=store)
        for number in range(batches):
            batch = BATCH + 100 * number
            assert torch.allclose(module(batch), plain(batch))
            store.flush()
        assert torch.allclose(module(BATCH), plain(BATCH))
        store.close()
    return texts, model.rows


def fill_until_refused(directory: Path, say, layout: Layout = KILO) -> None:
    """Puts batches, far more than there is room for; says which were flushed without a word."""
    with quiet(1) as texts:
        store = DiskStore(directory, keep_free=0)
        written = []
        for start in range(0, 400, 10):
            numbers = range(start, start + 10)
            put(store, "a", numbers, layout)
            store.flush()
            with DiskStore(directory) as other:
                if have(other, "a", numbers, layout) == set(numbers):
                    written.append(start)
            assert have(store, "a", [n for s in written for n in range(s, s + 10)], layout) >= {0}
        store.close()
    say({"texts": texts, "written": written})


@needs_fork
def test_files_that_may_not_grow(swift_path):
    """Where the system lets no file grow beyond a size, it is one warning, and what was committed stays readable."""
    resource = pytest.importorskip("resource")

    def child(say):
        (swift_path / "big").write_bytes(bytes(200_000))  # sqlite's file may be larger
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        fill_until_refused(swift_path / "cache", say)

    (told,) = fork(child)
    assert len(told["texts"]) == 1
    assert len(told["written"]) >= 5
    numbers = [n for start in told["written"] for n in range(start, start + 10)]
    with quiet(0), DiskStore(swift_path / "cache") as store:
        assert have(store, "a", numbers, KILO) == set(numbers)
        put(store, "a", range(400, 420), KILO)
    assert usable(swift_path / "cache", {"a": KILO}, range(400, 420))["a"] == set(range(400, 420))


CLONE_NEWNS, MS_RDONLY, MS_REMOUNT, MS_REC, MS_PRIVATE, MS_BIND = 0x20000, 1, 32, 16384, 1 << 18, 4096


def mounted(place: Path, kind: str | None, flags: int, options: str = "", source: str = "none") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.mount(source.encode(), str(place).encode(), kind.encode() if kind else None, flags, options.encode())
    if done:
        raise OSError(ctypes.get_errno(), "mount")


def alone(place: Path) -> None:
    """From now on this process's mounts are its own, and end with it."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    mounted(Path("/"), None, MS_REC | MS_PRIVATE)


def can_mount() -> bool:
    def child(say):
        try:
            with tempfile.TemporaryDirectory() as place:
                alone(Path(place))
                mounted(Path(place), "tmpfs", 0, "size=64k")
                ctypes.CDLL(None).umount2(place.encode(), 2)
        except (OSError, AttributeError):
            return False
        return True

    return IS_ROOT and hasattr(os, "fork") and fork(child) == [True]


needs_mount = pytest.mark.skipif(not can_mount(), reason="needs to be root in a place where mounting is allowed")


@needs_mount
def test_a_file_system_that_is_full(swift_path):
    """On a file system of 300 KB the disk is really full: one warning, and what was committed stays readable."""

    def child(say):
        alone(swift_path)
        mounted(swift_path, "tmpfs", 0, "size=300k")
        fill_until_refused(swift_path / "cache", say)
        with quiet(0), DiskStore(swift_path / "cache", keep_free=0) as store:
            say(sorted(have(store, "a", range(400), KILO)))
        texts, _ = loop(swift_path / "cache", keep_free=0)
        say(len(texts))
        used = os.statvfs(swift_path)
        say(used.f_bavail * used.f_frsize)

    told, later, warned, _ = fork(child)
    assert len(told["texts"]) == 1
    assert len(told["written"]) >= 10
    assert {n for start in told["written"] for n in range(start, start + 10)} <= set(later)
    assert warned <= 2


@needs_mount
def test_room_that_comes_back(swift_path, monkeypatch):
    """When the disk has room again, writing goes on after a while."""

    def child(say):
        alone(swift_path)
        mounted(swift_path, "tmpfs", 0, "size=400k")
        ballast = swift_path / "ballast"
        ballast.write_bytes(bytes(300_000))
        with quiet(1), DiskStore(swift_path / "cache", keep_free=0) as store:
            for start in range(0, 200, 10):
                put(store, "a", range(start, start + 10), KILO)
                store.flush()
            ballast.unlink()
            real = time.monotonic
            time.monotonic = lambda: real() + 3600
            put(store, "b", range(20), KILO)
            store.flush()
        with quiet(0), DiskStore(swift_path / "cache", keep_free=0) as store:
            assert have(store, "b", range(20), KILO) == set(range(20))

    fork(child)


@needs_mount
def test_the_floor_comes_before_the_end(swift_path):
    """By default some of a file system is left free."""

    def child(say):
        alone(swift_path)
        mounted(swift_path, "tmpfs", 0, "size=4m")
        with quiet(1) as texts:
            store = DiskStore(swift_path / "cache")
            for start in range(0, 8000, 100):
                put(store, "a", range(start, start + 100), KILO)
            store.close()
        assert len(texts) == 1
        room = os.statvfs(swift_path)
        return [room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize]

    ((free, size),) = fork(child)
    assert 0.04 * size <= free <= 0.3 * size


# --- directories that cannot be written -----------------------------------------------------------------


def serves_only(directory: Path) -> None:
    """The directory has the eight rows of BATCH; they are served, and nothing else is written, with one warning."""
    before = snapshot(directory)
    model = encoder()
    with quiet(1) as texts, torch.no_grad():
        module = cached_module(model, freeze=True, store=str(directory))
        assert torch.allclose(module(BATCH), encoder()(BATCH))
        assert model.calls == 0, "hits are served"
        assert cache_of(module).stats.hits == 8
        other = BATCH + 50
        for _ in range(3):
            assert torch.allclose(module(other), encoder()(other))
        cache_of(module).flush()
        cache_of(module).close()
    assert len(texts) == 1
    assert str(directory) in texts[0] or "read-only" in texts[0].lower() or "permission" in texts[0].lower()
    with quiet(1), DiskStore(directory) as store:
        (name,) = store.namespaces()
        assert put(store, name, [1, 2]) == 0
        store.flush()
        assert store.stats().refused == 2
        assert store.manifest(name)["class"].endswith("CountingEncoder")
        assert store.stats().rows == 8
    assert snapshot(directory) == before, "something was written"


@needs_mount
def test_a_file_system_that_is_read_only(swift_path):
    """A cache on a read-only mount serves its hits; its first put warns, and that is all."""

    def child(say):
        alone(swift_path)
        mounted(swift_path, "tmpfs", 0)
        loop(swift_path / "cache", batches=1)
        mounted(swift_path, None, MS_REMOUNT | MS_RDONLY)
        with pytest.raises(OSError, match="Read-only"):
            (swift_path / "x").touch()
        serves_only(swift_path / "cache")
        # Nothing there yet: the loop goes on without.
        with quiet(1):
            module = cached_module(encoder(), freeze=True, store=str(swift_path / "none" / "cache"))
            assert torch.allclose(module(BATCH), encoder()(BATCH))
            cache_of(module).close()

    fork(child)


@needs_fork
def test_a_directory_of_another_user(swift_path):
    """A cache that this user may only read serves its hits."""
    top = Path(tempfile.mkdtemp(prefix="modcache-test-"))
    try:
        directory = top / "cache"
        loop(directory, batches=1)
        for path in [top, *top.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)

        def child(say):
            if IS_ROOT:
                os.setgid(65534)
                os.setuid(65534)
            with pytest.raises(PermissionError):
                (directory / "x").touch()
            serves_only(directory)

        fork(child)
    finally:
        for path in [top, *top.rglob("*")]:
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(top)


@needs_fork
def test_files_that_cannot_be_read(swift_path):
    """Where another user keeps everything private, the loop goes on without."""
    top = Path(tempfile.mkdtemp(prefix="modcache-test-"))
    try:
        top.chmod(0o755)
        directory = top / "cache"
        loop(directory, batches=1)

        def child(say):
            if IS_ROOT:
                os.setgid(65534)
                os.setuid(65534)
            else:
                directory.chmod(0)
            with quiet(1) as texts:
                module = cached_module(encoder(), freeze=True, store=str(directory))
                for _ in range(3):
                    assert torch.allclose(module(BATCH), encoder()(BATCH))
                cache_of(module).close()
            return len(texts)

        assert fork(child) == [1]
    finally:
        top.joinpath("cache").chmod(0o700)
        shutil.rmtree(top)


# --- faults ---------------------------------------------------------------------------------------------


def life(directory: Path, names: dict[str, Layout], numbers: range) -> None:
    """A store's life: opened, written, read, flushed, described, deleted from, closed."""
    try:
        store = DiskStore(directory, keep_free=0)
    except OSError:
        return  # by hand, a directory that cannot be opened may be told at once
    for name, layout in names.items():
        put(store, name, numbers, layout)
        have(store, name, numbers, layout)
        store.describe(name, {"class": "tests.Fault"})
    store.flush()
    for name, layout in names.items():
        have(store, name, range(numbers.start, numbers.stop + 5), layout)
        store.delete(name, [key_of(numbers.start)])
    store.stats(), store.namespaces(), store.manifests()
    store.flush()
    store.close()


NAMES = {"a": LAYOUTS_ON_DISK["vector"], "b": LAYOUTS_ON_DISK["large"]}


def count_calls(swift_path: Path) -> list[str]:
    with Faults(lambda number, name: None) as faults:
        life(swift_path / "count", NAMES, range(4))
    return faults.calls


def test_each_write_takes_half(swift_path):
    """A system that takes only half of what it is given at each write gets all of it in the end."""
    with quiet(0), Faults(lambda number, name: "short") as faults:
        life(swift_path / "cache", NAMES, range(4))
    assert faults.calls.count("pwritev") > 10
    with quiet(0), DiskStore(swift_path / "cache") as store:
        for name, layout in NAMES.items():
            assert have(store, name, range(4), layout) == {1, 2, 3}


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_each_call_of_the_system_fails(swift_path, lasting):
    """Whichever call of the system fails: no error, no wrong row, and earlier rows stay for those who come later."""
    calls = count_calls(swift_path)
    assert {"open", "pwritev", "fsync", "mkdir"} <= set(calls)
    assert len(calls) > 60
    step = 1 if SOAK else 9 if lasting else 5
    whole = swift_path / "whole"
    life(whole, NAMES, range(50, 54))
    for number in range(0, len(calls), step):
        error = ERRORS[number % len(ERRORS)]
        directory = swift_path / "copy"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(whole, directory)

        def decide(at, name, number=number, error=error):
            return error if at == number or (lasting and at > number) else None

        with quiet(3), Faults(decide):
            life(directory, NAMES, range(4))
        with quiet(0), DiskStore(directory) as store:
            for name, layout in NAMES.items():
                there = have(store, name, [*range(4), 50, 51, 52, 53], layout)
                assert there >= {51, 52, 53}, f"call {number} ({calls[number]}) cost what was committed before"
                assert 50 not in there, "a row that was deleted came back"
        life(directory, NAMES, range(4))
        with quiet(0), DiskStore(directory) as store:
            for name, layout in NAMES.items():
                assert have(store, name, [1, 2, 3], layout) == {1, 2, 3}, f"after call {number}, nothing could be put"


@pytest.mark.parametrize("error", ERRORS, ids=[errno.errorcode[error] for error in ERRORS])
def test_a_loop_while_calls_fail(swift_path, error):
    """In a loop, whichever change of the file system fails from then on, results are right and one warning is shown."""
    with Faults(lambda number, name: None, names=Faults.CHANGES) as faults:
        loop(swift_path / "count", batches=3)
    calls = faults.calls
    for number in range(0, len(calls), 4):
        directory = swift_path / str(number)

        def decide(at, name, number=number):
            return error if at >= number else None

        with Faults(decide, names=Faults.CHANGES):
            try:
                texts, _ = loop(directory, batches=3)
            except OSError:
                assert not (directory / "modcache.json").exists(), "a DiskStore made by hand may say so at once"
                continue
        assert len(texts) <= 1, texts
        again, _ = loop(directory, batches=3)
        assert again == []
        assert loop(directory, batches=3) == ([], 0), "and afterwards everything hits"


def test_a_directory_that_vanishes(swift_path):
    """When the directory is removed in the middle, the loop goes on with at most one warning, and no row is wrong."""
    directory = swift_path / "cache"
    with quiet(1), torch.no_grad():
        store = TieredStore(MemoryStore(10_000, eviction="lru"), DiskStore(directory))
        module = cached_module(encoder(), freeze=True, store=store)
        for number in range(12):
            batch = BATCH + 100 * (number % 4)
            assert torch.allclose(module(batch), encoder()(batch))
            store.flush()
            if number in (3, 7):
                shutil.rmtree(directory, ignore_errors=True)
                assert torch.allclose(module(BATCH), encoder()(BATCH))
        store.close()
    loop(directory)
    assert loop(directory) == ([], 0)


def test_folders_that_vanish(swift_path):
    """The same with each folder within it."""
    for inner in ("rows", "writers", "catalogue"):
        directory = swift_path / inner
        with quiet(1), DiskStore(directory) as store:
            put(store, "a", range(5))
            store.flush()
            shutil.rmtree(directory / inner, ignore_errors=True)
            put(store, "a", range(10))
            put(store, "b", range(10))
            store.flush()
            have(store, "a", range(12))
            have(store, "b", range(12))
        with quiet(0), DiskStore(directory) as store:
            put(store, "a", range(10))
        assert usable(directory, {"a": LAYOUTS_ON_DISK["vector"]}, range(10))["a"] == set(range(10))


def test_writing_is_bounded(swift_path):
    """While the disk takes nothing, puts wait for it: what is queued does not grow without end."""
    layout, batch = Layout("*", ((torch.uint8, (1 << 20,)),)), 16
    go = threading.Event()
    put_so_far: list[int] = []
    rows = Rows(layout, (torch.full((batch, 1 << 20), 7, dtype=torch.uint8),))
    batches = [[key_of(n) for n in range(start, start + batch)] for start in range(0, 30 * batch, batch)]

    def decide(number, name):
        go.wait(600)

    with Faults(decide, names=Faults.WRITES), DiskStore(swift_path, keep_free=0) as store:

        def fill() -> None:
            for keys in batches:
                store.put("a", keys, rows)
                put_so_far.append(batch << 20)

        thread = threading.Thread(target=fill)
        thread.start()
        end = time.monotonic() + 60
        while not put_so_far and time.monotonic() < end:
            time.sleep(0.01)
        thread.join(1)
        stalled = sum(put_so_far)
        go.set()
        thread.join()
        store.flush()
        assert (batch << 20) <= stalled <= (256 + 2 * batch) << 20, f"{stalled >> 20} MB were queued"
        (found,) = store.get("a", [keys[-1] for keys in batches])
        assert len(found.positions) == len(batches)
        assert found.rows.tensors[0].eq(7).all()


def test_a_put_waits_for_no_other_process(swift_path, monkeypatch):
    """While another process holds every lock there is, gets and puts go on."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(admission, "_PATIENCE", 600.0)
    monkeypatch.setattr(catalogue, "_WAIT", 600.0)
    with DiskStore(swift_path, max_bytes=1 << 20, keep_free=0) as store:
        put(store, "a", range(5))
        store.flush()
        held = []
        for path in [*files_in(swift_path), swift_path / "writers" / "admission"]:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            held.append(file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
        begin = time.monotonic()
        for start in range(0, 100, 5):
            put(store, "a", range(start, start + 5))
            assert have(store, "a", range(start, start + 5)) == set(range(start, start + 5))
            have(store, "a", [1000 + start])
        assert time.monotonic() - begin < 300, "who writes waits longer than that"
        for file in held:
            os.close(file)


def threads() -> set[threading.Thread]:
    return set(threading.enumerate())


def test_closed_twice_and_dropped(swift_path) -> None:
    """Closing ends the thread and gives back every descriptor, and so does letting go of a store."""
    before = threads(), set(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else set()
    for closes in (0, 1, 2):
        store = DiskStore(swift_path / str(closes))
        put(store, "a", range(5))
        for _ in range(closes):
            store.close()
        del store
    end = time.monotonic() + 60
    while threads() != before[0] and time.monotonic() < end:
        time.sleep(0.01)
    assert threads() == before[0]
    for closes in (0, 1, 2):
        assert usable(swift_path / str(closes), {"a": LAYOUTS_ON_DISK["vector"]}, range(5))["a"] == set(range(5))
