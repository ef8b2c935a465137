"""What is found behind the last commit of a segment: damage is told once, what a killed writer leaves is not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from modcache import DiskStore
from modcache.stores.disk.directory import Directory
from tests.directories import have, put, quiet

NAMESPACE = "ab" * 16
BATCHES = [range(3), range(3, 6), range(6, 9)]


@pytest.fixture
def files(swift_path) -> tuple[Path, Path]:
    """A log of three commits and its rows, left by a writer that ended in order."""
    directory = swift_path / "cache"
    with DiskStore(directory) as store:
        for numbers in BATCHES:
            put(store, NAMESPACE, numbers)
            store.flush()
    (log,) = directory.glob("rows/*/*.log")
    return log, log.with_suffix(".rows")


def found(log: Path) -> tuple[int, list[str]]:
    """How many of the rows a store has, and what it warns of, however often it is asked."""
    with quiet() as texts, DiskStore(log.parents[2]) as store:
        count = len(have(store, NAMESPACE, range(9)))
        assert len(have(store, NAMESPACE, range(9))) == count
        store.row_keys(NAMESPACE)
    return count, texts


def leave_trace(log: Path) -> None:
    """As if the writer had been killed."""
    (log.parents[2] / "writers" / log.name.partition("-")[0]).touch()


def changed(path: Path, change: Callable[[bytes], bytes]) -> bytes:
    content = path.read_bytes()
    path.write_bytes(change(content))
    return content


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


def test_nothing_is_wrong(files):
    """A segment without damage is told nothing of, whether its writer ended or was killed."""
    assert found(files[0]) == (9, [])
    leave_trace(files[0])
    assert found(files[0]) == (9, [])


def test_each_byte_of_a_log(files):
    """A changed byte anywhere in a log costs rows, and is warned of once."""
    log, _ = files
    content = log.read_bytes()
    for place in range(0, len(content), 5):
        log.write_bytes(flipped(content, place))
        count, texts = found(log)
        assert count < 9, place
        assert len(texts) == 1, (place, texts)
        assert NAMESPACE in texts[0]
        assert log.name in texts[0]


@pytest.mark.parametrize("which", [0, 1], ids=["log", "rows"])
def test_each_end(files, which):
    """A file that was cut off behind its writer's back costs rows, and is warned of once."""
    content = files[which].read_bytes()
    for end in range(0, len(content), 7):
        files[which].write_bytes(content[:end])
        count, texts = found(files[0])
        assert count < 9, end
        assert len(texts) == 1, (end, texts)


def test_a_killed_writer(files):
    """Rows without a commit, the beginning of one, and zeros in its place are what a killed writer leaves."""
    log, rows = files
    leave_trace(log)
    content = log.read_bytes()
    with open(rows, "ab") as file:
        file.write(b"rows that nobody committed")
    frame = 32 + 3 * 24 + 8
    for end in range(len(content) - frame, len(content), 5):
        log.write_bytes(content[:end])
        assert found(log) == (6, []), end
    log.write_bytes(content[: len(content) - frame] + bytes(5000))
    assert found(log) == (6, [])


def test_damage_of_a_killed_writer(files):
    """A whole commit that is not right is no trace of a kill, wherever it stands."""
    log, _ = files
    leave_trace(log)
    content = log.read_bytes()
    for place in range(200, len(content) - 9, 11):
        log.write_bytes(flipped(content, place))
        count, texts = found(log)
        assert count < 9
        assert len(texts) == 1, place


@pytest.mark.parametrize("which", [0, 1], ids=["log", "rows"])
def test_damage_that_was_mended(files, which):
    """Who misses no row hears of no damage, so that rows that were put anew are warned of no more."""
    changed(files[which], lambda content: content[: len(content) - 20])
    with quiet(1) as texts, DiskStore(files[0].parents[2]) as store:
        assert len(have(store, NAMESPACE, range(6))) == 6
        assert len(have(store, NAMESPACE, range(9))) == 6
        put(store, NAMESPACE, range(6, 9))
    assert len(texts) == 1
    assert found(files[0]) == (9, [])


def test_a_writer_at_work(files):
    """As long as a writer lives, what is not right may become so, and nobody is warned."""
    log, _ = files
    writer = Directory(log.parents[2]).sign_in(log.name.partition("-")[0])
    try:
        changed(log, lambda content: flipped(content, len(content) - 20))
        assert found(log) == (6, [])
    finally:
        os.close(writer)
    count, texts = found(log)
    assert (count, len(texts)) == (6, 1)
