"""A directory that somebody damaged: no wrong row is served, nothing is executed, no file of strangers is touched."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
import signal
import sqlite3
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from modcache import DiskStore, FormatVersionError, cache_of, cached_module
from modcache.digest import checksum
from modcache.rows import Layout
from modcache.stores.disk.frames import ROWS, Frame, SegmentHeader, pack_frame, pack_log_header, pack_rows_head
from modcache.stores.disk.names import SegmentName, folder_of
from tests.contracts import PAIR, VECTOR
from tests.directories import (
    LARGE,
    SOAK,
    WIDE,
    Child,
    command,
    files_in,
    fork,
    have,
    key_of,
    namespaces_of,
    needs_fork,
    put,
    quiet,
    snapshot,
)
from tests.models import TokenEncoder, encoder

HEX = "0123456789abcdef0123456789abcdef"
HOLD: dict[str, tuple[Layout, range]] = {
    HEX: (VECTOR, range(5)),
    "pairs": (PAIR, range(3)),
    "large": (LARGE, range(2)),
    "wide": (WIDE, range(2)),
}
"""What the directory holds that is damaged over and over."""
PLANTED = range(900, 904)
"""Numbers of rows that are made up by hand, with checksums that are right."""
BATCH = torch.arange(24.0).reshape(8, 3)


def fill(directory: Path) -> None:
    with DiskStore(directory) as store:
        for name, (layout, numbers) in HOLD.items():
            put(store, name, numbers, layout)
            store.describe(name, {"class": "tests.Held", "made": "long ago", "checked": {"ab" * 16: [[1]]}})


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A directory with nothing wrong."""
    directory = tmp_path_factory.mktemp("whole") / "cache"
    fill(directory)
    return directory


@pytest.fixture
def fresh(whole, swift_path) -> Callable[[], Path]:
    """Makes copies of that directory."""

    def copy() -> Path:
        place = swift_path / "copy"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(whole, place)
        return place

    return copy


def got(store: DiskStore) -> dict[str, set[int]]:
    """All rows of ours that are there; each is right, and there are no others."""
    for name, (_, numbers) in HOLD.items():
        assert set(store.row_keys(name)) <= {key_of(n) for n in [*numbers, *PLANTED]}, "a key that nobody put"
    return {name: have(store, name, numbers, layout) for name, (layout, numbers) in HOLD.items()}


def complete() -> dict[str, set[int]]:
    return {name: set(numbers) for name, (_, numbers) in HOLD.items()}


def survives(directory: Path, *, most: int = 2, writable: bool = True, **options) -> dict[str, set[int]]:
    """Lets a process find the damage, whatever it is, and mend it; the next one hits. What the first one had.

    Args:
        directory: that is damaged.
        most: warnings that may be shown.
        writable: whether rows can be put there in spite of the damage.
        options: of the store.
    """
    with quiet(most), DiskStore(directory, **options) as store:
        for name in HOLD:
            store.manifest(name)
        store.manifests()
        store.stats()
        store.namespaces()
        had = got(store)
        assert got(store) == had, "the same question twice"
        for name, (layout, numbers) in HOLD.items():
            lacking = sorted(set(numbers) - had[name])
            if lacking:
                put(store, name, lacking, layout)
            store.describe(name, {"class": "tests.Held"})
        mended = got(store)
        assert mended == complete() or not writable, "not even this process has what it put"
        store.flush()
    with quiet(most if not writable else 1), DiskStore(directory, **options) as store:
        assert got(store) == complete() or not writable, "the next process lacks what was put again"
    return had


def blocks(spot: Path) -> bool:
    """Whether no row can be written while something else is in this folder's place."""
    return spot.parts in (("rows",), ("writers",)) or (spot.parts[0] == "rows" and len(spot.parts) == 2)


def places(size: int, count: int, seed: int) -> list[int]:
    """Every byte of a small file, else some; all of many more files in the long form."""
    count *= 20 if SOAK else 1
    return list(range(size)) if size <= count else sorted(random.Random(seed).sample(range(size), count))


def of_kind(directory: Path, kind: str) -> list[Path]:
    return [path for path in files_in(directory) if path.name == kind or path.suffix == kind]


KINDS = [".rows", ".log", "manifest.json", "modcache.json", "cache.db", "made-by-modcache"]


# --- damage to single files -----------------------------------------------------------------------------


def test_there_is_something_to_damage(whole):
    """The directory has files of all kinds, and is served whole without a warning."""
    for kind in KINDS:
        assert of_kind(whole, kind), kind
    known = {path for kind in KINDS for path in of_kind(whole, kind)}
    rest = [path.name for path in files_in(whole) if path not in known and path.parent.name != "writers"]
    assert rest == [], "a kind of file that no test damages"
    with quiet(0), DiskStore(whole) as store:
        assert got(store) == complete()


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bytes(fresh, kind, mmap):
    """A byte that changed anywhere costs rows at most, and none of another namespace."""
    lost = 0
    for number in range(len(of_kind(fresh(), kind))):
        directory = fresh()
        path = of_kind(directory, kind)[number]
        content = path.read_bytes()
        namespace = path.parent.name
        for place in places(len(content), 30 if kind != ".log" else 80, number)[mmap :: 1 if mmap else 5]:
            path.write_bytes(
                content[:place] + bytes([content[place] ^ random.Random(place).randint(1, 255)]) + content[place + 1 :]
            )
            before = snapshot(path)
            try:
                with quiet(1):
                    store = DiskStore(directory, mmap=mmap)
                    had = got(store)
                    store.close()
            except FormatVersionError:
                assert kind == "modcache.json"
                continue
            finally:
                if kind in (".rows", ".log"):
                    assert snapshot(path) == before, "reading wrote"
            others = {name for name in HOLD if folder_of(name) != namespace}
            assert all(had[name] == complete()[name] for name in others)
            lost += had != complete()
            if kind not in (".rows", ".log"):
                assert had == complete(), f"{path.name} is not needed for rows"
        path.write_bytes(content)
    if kind in (".rows", ".log"):
        assert lost > 5, "no damage was ever noticed"


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bytes_are_mended(fresh, kind):
    """What a changed byte cost is put again, and the next process has it."""
    for number in range(len(of_kind(fresh(), kind))):
        size = of_kind(fresh(), kind)[number].stat().st_size
        for place in places(size, 6, number):
            directory = fresh()
            path = of_kind(directory, kind)[number]
            content = bytearray(path.read_bytes())
            content[place] ^= 0x40
            path.write_bytes(content)
            with contextlib.suppress(FormatVersionError):
                survives(directory)


@pytest.mark.parametrize("kind", KINDS)
def test_truncated(fresh, kind):
    """A file that ends anywhere too early, or goes on too long, costs rows at most."""
    for number in range(len(of_kind(fresh(), kind))):
        size = of_kind(fresh(), kind)[number].stat().st_size
        for end in {0, 8, 63, 64, size // 2, size - 1, size + 4096}:
            if 0 <= end != size:
                directory = fresh()
                os.truncate(of_kind(directory, kind)[number], end)
                had = survives(directory)
                if end > size and kind != "cache.db":
                    assert had == complete()


def test_every_end_of_a_log(fresh):
    """A log gives the rows of the frames that are whole, wherever it ends."""
    directory = fresh()
    (path,) = of_kind(directory / "rows" / HEX, ".log")
    with DiskStore(directory) as store:
        for start in range(100, 104):
            put(store, HEX, [start, start + 10])
            store.flush()
    (second,) = set(of_kind(directory / "rows" / HEX, ".log")) - {path}
    content = second.read_bytes()
    seen = set()
    for end in range(len(content)):
        second.write_bytes(content[:end])
        with quiet(1), DiskStore(directory) as store:
            there = have(store, HEX, [100, 110, 101, 111, 102, 112, 103, 113])
            assert have(store, HEX, range(5)) == set(range(5))
        seen.add(frozenset(there))
        assert len(there) % 2 == 0, "half a batch was believed"
    assert len(seen) == 4


REPLACEMENTS: dict[str, bytes] = {
    "nothing": b"",
    "text": b"these are my notes\n" * 40,
    "zeros": bytes(5000),
    "ones": b"\xff" * 5000,
    "json": b'{"format": 1}',
    "deep json": b"[" * 100_000,
    "a list": b"[1, 2, 3]",
    "a pickle": pickle.dumps({"weights": [1, 2, 3]}),
    "sqlite": b"SQLite format 3\0" + bytes(4000),
}


@pytest.mark.parametrize("what", REPLACEMENTS)
def test_replaced(fresh, what):
    """Something else in the place of any one file, or of all, costs rows at most."""
    for number in range(len(files_in(fresh()))):
        directory = fresh()
        files_in(directory)[number].write_bytes(REPLACEMENTS[what])
        survives(directory)
    directory = fresh()
    for path in files_in(directory):
        path.write_bytes(REPLACEMENTS[what])
    survives(directory, most=len(HOLD) * 2)


def test_removed(fresh):
    """Any one file or folder may be missing."""
    everything = sorted(path.relative_to(fresh()) for path in fresh().rglob("*"))
    for path in everything:
        directory = fresh()
        if (directory / path).is_dir():
            shutil.rmtree(directory / path)
        else:
            (directory / path).unlink()
        had = survives(directory, most=1)
        if path.suffix not in (".rows", ".log") and path.parts[0] != "rows":
            assert had == complete()


def test_swapped(fresh):
    """Any two files may have changed places, also between namespaces and with another directory's."""
    names = [path.relative_to(fresh()) for path in files_in(fresh())]
    segments = [name for name in names if name.suffix in (".rows", ".log")]
    pairs = [(a, b) for a in names for b in names if a < b and (a in segments) + (b in segments) > 0]
    for a, b in random.Random(1).sample(pairs, len(pairs) if SOAK else 25):
        directory = fresh()
        (directory / a).rename(directory / "x")
        (directory / b).rename(directory / a)
        (directory / "x").rename(directory / b)
        survives(directory)


def test_from_another_namespace_or_directory(fresh, swift_path):
    """Segments that were moved into another namespace's folder, or come from another directory, lie about nothing."""
    other = swift_path / "other"
    with DiskStore(other) as store:  # the same keys, other rows
        for name, (layout, numbers) in HOLD.items():
            store.put(name, [key_of(n) for n in numbers], rows_of_others(layout, len(numbers)))
    directory = fresh()
    mine, theirs = namespaces_of(directory), namespaces_of(other)
    for folder in mine:
        for source in mine:
            if source != folder:
                for path in files_in(source):
                    if path.suffix in (".rows", ".log"):
                        shutil.copy(path, folder / path.name)
    survives(directory, most=len(HOLD) + 1)
    # The rows file of one directory with the log of the other, in both ways.
    for suffix in (".rows", ".log"):
        directory = fresh()
        for folder, source in zip(namespaces_of(directory), theirs, strict=True):
            (target,), (path,) = of_kind(folder, suffix), of_kind(source, suffix)
            shutil.copy(path, target)
        survives(directory, most=len(HOLD) + 1)


def rows_of_others(layout: Layout, count: int):
    from modcache.rows import Rows

    return Rows(layout, tuple(torch.full((count, *shape), 77).to(dtype) for dtype, shape in layout.leaves))


def test_a_copy_of_a_segment_is_harmless(fresh):
    """A segment that lies there twice, as after a careless backup, gives its rows once."""
    directory = fresh()
    for folder in namespaces_of(directory):
        for path in files_in(folder):
            if path.suffix in (".rows", ".log"):
                shutil.copy(path, folder / f"{'ab' * 8}-000009{path.suffix}")
    assert survives(directory, most=0) == complete()
    with DiskStore(directory) as store:
        assert store.stats().rows == sum(len(numbers) for _, numbers in HOLD.values())


def test_damage_beneath_an_open_store(fresh):
    """Files that are cut, replaced or removed while a store has them open become misses, not faults."""
    for mmap in (True, False):
        for harm in ("cut", "empty", "unlink", "replace", "remove all"):
            directory = fresh()
            with quiet(3), DiskStore(directory, mmap=mmap) as store:
                assert got(store) == complete()
                for path in files_in(directory):
                    if path.suffix not in (".rows", ".log"):
                        continue
                    if harm == "cut":
                        os.truncate(path, 70)
                    elif harm == "empty":
                        os.truncate(path, 0)
                    elif harm == "unlink":
                        path.unlink()
                    elif harm == "replace":
                        path.unlink()
                        path.write_bytes(b"notes" * 1000)
                    elif harm == "remove all":
                        shutil.rmtree(directory, ignore_errors=True)
                        break
                got(store)
                for name, (layout, numbers) in HOLD.items():
                    put(store, name, numbers, layout)
                assert got(store) == complete()
            if harm != "remove all":
                with quiet(4), DiskStore(directory) as store:
                    assert got(store) == complete(), harm


# --- what is no file ------------------------------------------------------------------------------------


def spots(directory: Path) -> list[Path]:
    """Every file and folder within a directory, by its path from there."""
    return sorted(path.relative_to(directory) for path in directory.rglob("*"))


def test_a_folder_in_the_place_of_a_file(fresh):
    """A folder, empty or not, where a file should be, is left alone; so is a file where a folder should be."""
    for spot in spots(fresh()):
        directory = fresh()
        place = directory / spot
        if place.is_dir():
            shutil.rmtree(place)
            place.write_text("mine")
        else:
            place.unlink()
            place.mkdir()
            (place / "notes.txt").write_text("mine")
        before = snapshot(place if place.is_file() else place / "notes.txt")
        survives(directory, writable=not blocks(spot))
        assert snapshot(place if place.is_file() else place / "notes.txt") == before


def test_links_are_not_followed(fresh, swift_path):
    """A link in any place, to a file or folder of the right content elsewhere, is never read or written through."""
    for spot in spots(fresh()):
        directory = fresh()
        outside = swift_path / "outside"
        shutil.rmtree(outside, ignore_errors=True)
        outside.mkdir()
        (directory / spot).rename(outside / "thing")
        (directory / spot).symlink_to(outside / "thing")
        before = snapshot(outside)
        had = survives(directory, writable=not blocks(spot))
        assert snapshot(outside) == before, f"changed through {spot}"
        assert (directory / spot).is_symlink() or not (directory / spot).exists() or spot.name == "manifest.json"
        if spot.suffix in (".rows", ".log"):
            assert had != complete()


def test_dangling_links_make_nothing(fresh, swift_path):
    """A link to nowhere is not where a file is made."""
    nowhere = swift_path / "nowhere"
    nowhere.mkdir()
    for spot in spots(fresh()):
        directory = fresh()
        place = directory / spot
        shutil.rmtree(place) if place.is_dir() else place.unlink()
        place.symlink_to(nowhere / "thing")
        survives(directory, writable=not blocks(spot))
        assert list(nowhere.iterdir()) == []


@needs_fork
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_pipes_do_not_block(fresh):
    """A pipe in the place of any file blocks nobody."""

    def child(say):
        for spot in spots(fresh()):
            say(str(spot))
            directory = fresh()
            place = directory / spot
            shutil.rmtree(place) if place.is_dir() else place.unlink()
            os.mkfifo(place)
            survives(directory, writable=not blocks(spot))

    with Child(child) as waited:
        with contextlib.suppress(EOFError):
            while True:
                waited.hear()
        waited.wait()
        assert waited.status == 0


# --- claims ---------------------------------------------------------------------------------------------


def little_memory(act: Callable[[], object]) -> None:
    """Runs something in a child that may not have much more memory than it has."""
    resource = pytest.importorskip("resource")

    def child(say):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096 if Path("/proc").exists() else 4 << 30
        resource.setrlimit(resource.RLIMIT_AS, (used + (768 << 20), used + (768 << 20)))
        signal.alarm(600)
        act()

    fork(child)


@needs_fork
def test_huge_files(fresh):
    """A file that claims a terabyte, by its size, is not read into memory."""
    for spot in spots(fresh()):
        if (fresh() / spot).is_dir():
            continue
        directory = fresh()
        os.truncate(directory / spot, 1 << 40)
        little_memory(lambda directory=directory: survives(directory))


def segment(folder: Path, number: int, header: bytes, frames: list[bytes], rows: bytes, identity: bytes) -> None:
    name = SegmentName("ab" * 8, number)
    (folder / name.log).write_bytes(header + b"".join(frames))
    (folder / name.rows).write_bytes(pack_rows_head(identity) + rows)


IDENTITY = bytes(range(16))


def header_of(text: bytes, claimed: int | None = None) -> bytes:
    """The header of a log with this JSON, sealed as a true one is."""
    whole = pack_log_header(SegmentHeader(IDENTITY, HEX, VECTOR, "ab" * 8, "x"))
    start = whole[:12] + struct.pack("<I", len(text) if claimed is None else claimed) + whole[16:32]
    return start + struct.pack("<Q", checksum(start + text)) + text + bytes(-(40 + len(text)) % 8)


def header_json(**facts: object) -> bytes:
    base = {"namespace": HEX, "tree": "*", "leaves": [["float32", [3]]], "writer": "ab" * 8, "made": "x"}
    return json.dumps({**base, **facts}).encode()


LIES: dict[str, bytes] = {
    "a wide row": header_json(leaves=[["float32", [1 << 40]]]),
    "a row that overflows": header_json(leaves=[["float32", [1 << 31, 1 << 31, 1 << 31]]]),
    "nothing times a lot": header_json(leaves=[["float32", [0, 1 << 62]]]),
    "a negative size": header_json(leaves=[["float32", [-3]]]),
    "a size that is no number": header_json(leaves=[["float32", [True]]]),
    "a fraction": header_json(leaves=[["float32", [3.0]]]),
    "an unknown dtype": header_json(leaves=[["object", [3]]]),
    "a name of torch": header_json(leaves=[["load", [3]]]),
    "many leaves": header_json(leaves=[["float32", [1]]] * 100_000),
    "many sizes": header_json(leaves=[["float32", [1] * 5000]]),
    "leaves that are no list": header_json(leaves="float32"),
    "another namespace": header_json(namespace="pairs"),
    "a namespace that is a number": header_json(namespace=3),
    "a tree of another count": header_json(tree='["tuple",0,1,2]'),
    "a tree that runs": header_json(tree='["output","os","system",[["str","args"],["str","true"]]]'),
    "a deep tree": header_json(tree="[" * 50_000),
    "a tree that is a number": header_json(tree=7),
    "no rows at all": header_json(tree="null", leaves=[]),
    "deep json": b"[" * 50_000,
    "a list": b"[]",
    "no json": b"\xff\xfe",
    "not a number": header_json(leaves=[["float32", [float("nan")]]]),
}


@needs_fork
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_segments_that_lie(fresh):
    """A segment whose checksums are right and whose claims are mad takes neither rows nor memory nor the loop."""
    frames = [Frame(ROWS, 1 << 60, 0, b"".join(map(key_of, PLANTED)), bytes(32))]

    def all_of_them() -> None:
        for name, text in LIES.items():
            for claimed in (None, 0, 0xFFFFFFFF)[: 3 if name == "a wide row" else 1]:
                directory = fresh()
                header = header_of(text, claimed)
                packed = [pack_frame(frame, IDENTITY, len(header)) for frame in frames]
                segment(directory / "rows" / HEX, 0, header, packed, bytes(48), IDENTITY)
                had = survives(directory)
                assert had == complete(), name
                with quiet(2), DiskStore(directory) as store:
                    store.get(HEX, [key_of(PLANTED[0])])

    little_memory(all_of_them)


def test_frames_that_lie(fresh):
    """Counts and places that no file can bear out are not believed, though the checksum is right."""
    header = header_of(header_json())
    good = b"".join(map(key_of, PLANTED))
    sums = struct.pack("<4Q", *[checksum(struct.pack("<3f", 1, 2, 3))] * 4)
    rows = struct.pack("<3f", 1, 2, 3) * 4
    lies = {
        "rows that are not there": (Frame(ROWS, 5, 0, good * 1000, sums * 1000), rows),
        "rows from elsewhere": (Frame(ROWS, 5, 7, good, sums), rows * 9),
        "rows before the first": (Frame(ROWS, 5, (1 << 64) - 1, good, sums), rows),
        "wrong sums": (Frame(ROWS, 5, 0, good, bytes(32)), rows),
    }
    for name, (frame, body) in lies.items():
        directory = fresh()
        segment(directory / "rows" / HEX, 0, header, [pack_frame(frame, IDENTITY, len(header))], body, IDENTITY)
        assert survives(directory) == complete(), name
        with quiet(1), DiskStore(directory) as store:
            assert store.get(HEX, [key_of(PLANTED[0])]) == ()
    directory = fresh()
    honest = pack_frame(Frame(ROWS, 5, 0, good, sums), IDENTITY, len(header))
    segment(directory / "rows" / HEX, 0, header, [honest], rows, IDENTITY)
    with quiet(0), DiskStore(directory) as store:
        assert len(store.get(HEX, [key_of(PLANTED[0])])) == 1, "the lies would not have been believed in any case"


# --- nothing is executed --------------------------------------------------------------------------------


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_the_bomb_works(swift_path):
    """What is planted below would be noticed if anybody unpickled it."""
    pickle.loads(pickle.dumps(Bomb(swift_path / "mark")))
    assert (swift_path / "mark").exists()


def test_planted_pickles_are_not_executed(fresh, swift_path, monkeypatch):
    """A pickle in the place of any file, or of a row or setting of the catalogue, is never loaded."""
    mark = swift_path / "mark"
    bombs = [pickle.dumps(Bomb(mark), protocol) for protocol in (0, 5)]

    def explode(*_: object, **__: object) -> None:
        raise AssertionError("somebody unpickles")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, explode)
    monkeypatch.setattr(torch, "load", explode)
    for bomb in bombs:
        for number in range(len(files_in(fresh()))):
            directory = fresh()
            files_in(directory)[number].write_bytes(bomb)
            survives(directory)
            use_commands(directory)
    for statement, values in PLANTS(bombs[-1]):
        directory = fresh()
        (database,) = of_kind(directory, "cache.db")
        with contextlib.closing(sqlite3.connect(database)) as connection, contextlib.suppress(sqlite3.Error):
            connection.execute(statement, values)
            connection.commit()
        survives(directory)
        use_commands(directory)
    assert not mark.exists()


def PLANTS(bomb: bytes) -> list[tuple[str, tuple]]:
    insert = (
        "INSERT OR REPLACE INTO Cache (key, raw, store_time, expire_time, access_time, access_count, tag, size, mode,"
        " filename, value) VALUES (?, ?, 0, NULL, 0, 0, ?, 0, ?, ?, ?)"
    )
    setting = "INSERT OR REPLACE INTO Settings (key, value) VALUES (?, ?)"
    return [
        (insert, (HEX, 1, None, 4, None, bomb)),  # a value that is a pickle
        (insert, (bomb, 0, None, 1, None, "x")),  # a key that is a pickle
        (insert, ("a", 1, None, 4, "../planted.val", None)),  # a pickle in a file
        (insert, ("b", 1, bomb, 1, None, "text")),
        ("UPDATE Cache SET mode = 4, value = ?", (bomb,)),
        ("UPDATE Cache SET raw = 0, key = ?", (bomb,)),
        (setting, ("disk_pickle_protocol", 5)),
        (setting, ("disk_min_file_size", 0)),
        (setting, ("_disk", "planted")),
        (setting, ("eviction_policy", "planted")),
        (setting, ("sqlite_mmap_size", 1 << 40)),
        (setting, ("sqlite_journal_mode", "wal")),
        (setting, ("timeout", 10_000)),
        ("DROP TABLE Cache", ()),
        ("DROP TABLE Settings", ()),
    ]


# --- formats --------------------------------------------------------------------------------------------


def renumber(directory: Path, number: object) -> None:
    place = directory / "modcache.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "format": number}))


def test_a_newer_format_by_hand(fresh):
    """A directory of a format that is not known yet is refused by name and number, and nothing in it changes."""
    directory = fresh()
    renumber(directory, 2)
    before = snapshot(directory)
    with pytest.raises(FormatVersionError, match=r"format 2.* format 1"):
        DiskStore(directory)
    assert snapshot(directory) == before
    assert issubclass(FormatVersionError, ValueError)


def test_a_newer_format_in_a_loop(fresh):
    """In a loop it is one warning, and the module runs; its rows are kept in memory."""
    directory = fresh()
    renumber(directory, 99)
    before = snapshot(directory)
    model = encoder()
    with quiet(1) as texts:
        module = cached_module(model, freeze=True, store=str(directory))
        for _ in range(3):
            assert torch.equal(module(BATCH), encoder()(BATCH))
        cache_of(module).close()
    assert len(texts) == 1
    assert "format 99" in texts[0]
    assert snapshot(directory) == before


def test_segments_of_a_newer_format(fresh):
    """A single segment of another format is passed over."""
    directory = fresh()
    header = bytearray(header_of(header_json()))
    header[8] = 2
    header[32:40] = struct.pack("<Q", checksum(bytes(header[:32]) + header_json()))
    segment(directory / "rows" / HEX, 0, bytes(header), [], b"", IDENTITY)
    assert survives(directory) == complete()


# --- the module, whatever lies there --------------------------------------------------------------------


def tokens(seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 50, (4, 6), generator=torch.Generator().manual_seed(seed))
    lengths = torch.tensor([6, 2, 3, 1])
    mask = (torch.arange(6) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def token_encoder() -> TokenEncoder:
    torch.manual_seed(2)
    return TokenEncoder()


def through_the_module(directory: Path) -> None:
    """Runs a module over the directory; its results are the plain module's, and nothing is raised."""
    with quiet(3), torch.no_grad():
        module = cached_module(token_encoder(), freeze=True, key="tokens", store=str(directory))
        plain = token_encoder().eval()
        for seed in (0, 1, 0):
            batch = tokens(seed)
            out, want = module(**batch), plain(**batch)
            for name in want:
                assert torch.allclose(out[name], want[name], atol=1e-6), name
        cache_of(module).explain(**tokens())
        store = cache_of(module).store
        cache_of(module).close()
        store.close()


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> Path:
    """A directory that a module with token rows filled."""
    directory = tmp_path_factory.mktemp("spoken") / "cache"
    through_the_module(directory)
    return directory


def test_a_module_over_damaged_files(spoken, swift_path):
    """The loop's results are right with any file of the directory damaged at any place, manifests included."""
    for number, original in enumerate(files_in(spoken)):
        content = original.read_bytes()
        dense = original.name == "manifest.json"
        for place in places(len(content), 25 if dense else 6, number):
            for bit in (1, 0x10) if dense else (0x21,):
                directory = swift_path / "copy"
                shutil.rmtree(directory, ignore_errors=True)
                shutil.copytree(spoken, directory)
                changed = content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
                files_in(directory)[number].write_bytes(changed)
                through_the_module(directory)


@pytest.mark.parametrize("dims", [[], [[]], [[1]], [[0]], [[2]], [[63]], [[1], []], [[], [1]], [[0, 1]], None, 5])
def test_a_manifest_that_lies_about_token_dims(spoken, swift_path, dims):
    """What a manifest says of a form is checked against what is there."""
    directory = swift_path / "copy"
    shutil.copytree(spoken, directory)
    manifests = of_kind(directory, "manifest.json")
    assert manifests
    for path in manifests:
        facts = json.loads(path.read_text())
        assert facts["checked"]
        path.write_text(json.dumps({**facts, "checked": dict.fromkeys(facts["checked"], dims)}))
    through_the_module(directory)


# --- strangers' files -----------------------------------------------------------------------------------


def plant(directory: Path) -> list[Path]:
    """Files that somebody else keeps in the directory, at all of its levels."""
    folders = [directory, *(path for path in directory.rglob("*") if path.is_dir())]
    planted = []
    names = [
        "notes.txt",
        "weights.rows",
        "x.log",
        "modcache.json.bak",
        f"{'cd' * 8}-000001.rows",
        f"{'cd' * 8}-000001.log",
    ]
    for folder in folders:
        for name in [*names, ".hidden", "cache.db.bak", f"{'AB' * 8}-000001.log", f"{'cd' * 8}-1.log"]:
            place = folder / name
            place.write_bytes(b"somebody else's " * 20)
            planted.append(place)
        inner = folder / "pictures"
        inner.mkdir()
        (inner / "cat.jpg").write_bytes(b"\xff\xd8")
        planted.append(inner / "cat.jpg")
    return planted


def use_commands(directory: Path) -> None:
    """Lets every command go over a directory; whatever lies there, none raises."""
    key = key_of(2).hex()
    with tempfile.TemporaryDirectory() as elsewhere:
        for words in (
            "ls",
            "stats",
            "du",
            "verify",
            f"show {HEX}",
            f"export {HEX} --to {elsewhere}/rows.npy",
            "gc --dry-run",
            f"forget {key}",
            "verify --repair",
            "gc --older-than 1h",
            "gc --max-bytes 1",
            f"clear {HEX}",
            "gc",
        ):
            name, *rest = words.split()
            command(name, directory, *rest)


def test_strangers_files_are_not_touched(fresh):
    """Whatever is done with a directory, a file that is not ours stays as it was: byte, date and inode."""
    directory = fresh()
    planted = plant(directory)
    before = {path: snapshot(path) for path in planted}
    survives(directory, most=len(HOLD))
    with quiet(len(HOLD)), DiskStore(directory, max_bytes=1000) as store:
        put(store, "more", range(200))
        store.flush()
        for name in HOLD:
            store.delete(name, [key_of(0)])
            store.delete(name)
        store.flush()
    use_commands(directory)
    assert {path: snapshot(path) for path in planted} == before


def test_a_directory_of_somebody_else(swift_path):
    """A folder that already has files in it becomes a cache beside them."""
    for name in ("data.csv", "rows.txt", "cache.db"):
        (swift_path / name).write_text("mine")
    (swift_path / "pictures").mkdir()
    (swift_path / "pictures" / "cat.jpg").write_text("mine")
    theirs = files_in(swift_path)
    before = {path: snapshot(path) for path in theirs}
    fill(swift_path)
    assert survives(swift_path, most=0) == complete()
    use_commands(swift_path)
    assert {path: snapshot(path) for path in theirs} == before


@pytest.mark.parametrize("taken", ["rows", "writers", "catalogue", "modcache.json"])
def test_names_that_somebody_else_took(swift_path, taken):
    """Files or folders of our names that were there before us keep their content."""
    for kind in ("file", "folder"):
        directory = swift_path / kind
        directory.mkdir()
        place = directory / taken
        if kind == "file":
            place.write_text("mine")
        else:
            place.mkdir()
            (place / "notes.txt").write_text("mine")
            place /= "notes.txt"
        before = snapshot(place)
        with quiet(2):
            store = DiskStore(directory)
            for name, (layout, numbers) in HOLD.items():
                put(store, name, numbers, layout)
            store.flush()
            got(store)
            store.close()
        use_commands(directory)
        if taken != "modcache.json" or kind == "folder":
            assert snapshot(place) == before


def test_a_file_in_the_place_of_the_directory(swift_path):
    """The path of a file is a clear error, and the file stays."""
    place = swift_path / "file"
    place.write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        DiskStore(place)
    with pytest.raises(ValueError, match="found a file"):
        cached_module(encoder(), freeze=True, store=str(place))
    assert place.read_text() == "mine"
