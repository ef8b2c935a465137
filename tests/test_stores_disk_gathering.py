"""Rows out of files: the same bytes and checksums for any places, leaves, files and threads."""

from __future__ import annotations

import os
import threading
import time
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modcache.digest import checksum
from modcache.stores.disk import gathering
from modcache.stores.disk.frames import ROWS_HEAD_BYTES
from modcache.stores.disk.gathering import read_rows
from modcache.stores.disk.rowfiles import LostError
from modcache.stores.disk.window import ROW_BITS

ROWS = 20


class Files(dict):
    """Open files by number, so many of which may be used together."""

    together = 2


@pytest.fixture(scope="module", params=[1, 3, 64])
def written(request, tmp_path_factory):
    """Three files of rows of 12 bytes times something, and what is in them."""
    folder, size = tmp_path_factory.mktemp("files"), 12 * request.param
    rows = np.random.default_rng(size).integers(0, 256, (3, ROWS, size), np.uint8)
    files = Files()
    for number, matrix in enumerate(rows):
        path = folder / str(number)
        path.write_bytes(bytes(ROWS_HEAD_BYTES) + matrix.tobytes())
        files[number] = os.open(path, os.O_RDONLY)
    yield files, rows
    for file in files.values():
        os.close(file)


@pytest.fixture(params=[1, 2, 4])
def threads(request, monkeypatch):
    """So many threads, for as few and as small rows as there are."""
    monkeypatch.setattr(gathering, "processors", lambda: request.param)
    monkeypatch.setattr(gathering, "_LARGE", 0)
    monkeypatch.setattr(gathering, "_MANY", 0)
    return request.param


places = st.lists(st.tuples(st.integers(0, 2), st.integers(0, ROWS - 1)), min_size=1, max_size=40)


@pytest.mark.usefixtures("threads")
@settings(max_examples=40, deadline=None)
@given(places, st.sampled_from([(12,), (4, 8), (0, 5, 7, 0), (12, 0)]), st.randoms())
def test_what_is_read(written, wanted, leaves, chance):
    """Rows come in the order of their places, leaf by leaf, with the checksums of those that are asked for."""
    files, rows = written
    sizes = [size * rows.shape[2] // 12 for size in leaves]
    todo = np.array(sorted(chance.sample(range(len(wanted)), len(wanted) // 2)), np.int64)
    at = np.array([number << ROW_BITS | row for number, row in wanted], np.int64)
    columns, sums = read_rows(files, at, sizes, todo)
    expected = np.stack([rows[number, row] for number, row in wanted])
    assert np.array_equal(np.concatenate(columns, axis=1), expected)
    assert [column.shape[1] for column in columns] == sizes
    assert sums == [checksum(expected[place]) for place in todo.tolist()]


def test_rows_without_bytes():
    """Rows of no bytes need no file."""
    columns, sums = read_rows(Files(), np.arange(3), [0, 0], np.array([1]))
    assert [column.shape for column in columns] == [(3, 0), (3, 0)]
    assert sums == [checksum(b"")]


@pytest.mark.usefixtures("threads")
def test_a_file_that_is_too_short(written):
    """A row beyond the end of its file is lost, whoever reads it."""
    files, _ = written
    at = np.array([*range(ROWS), 1 << ROW_BITS | ROWS, *range(ROWS)])
    with pytest.raises(LostError) as lost:
        read_rows(files, at, [files_row_bytes(files)], np.arange(0))
    assert lost.value.args == ([1],)


def files_row_bytes(files):
    return (os.fstat(files[0]).st_size - ROWS_HEAD_BYTES) // ROWS


def test_other_threads_take_part():
    """What takes long is shared out."""
    seen, all_of_them = set(), threading.Barrier(3)

    def act(_):
        if threading.get_ident() not in seen:
            seen.add(threading.get_ident())
            all_of_them.wait(60)

    gathering._do_all(act, deque(range(200)), 2)
    assert len(seen) == 3


@pytest.mark.parametrize("failing", ["this thread", "another"])
def test_an_error_ends_all(failing):
    """What one thread raises is raised by all, and nothing is done any more when it is."""
    here, done = threading.get_ident(), []

    def act(number):
        if (threading.get_ident() == here) == (failing == "this thread") and len(done) > 5:
            raise LostError([number])
        time.sleep(0.001)
        done.append(number)

    with pytest.raises(LostError):
        gathering._do_all(act, deque(range(100_000)), 2)
    count = len(done)
    time.sleep(0.02)
    assert len(done) == count < 100_000


def test_an_interrupt_ends_all():
    """After an interrupt no other thread goes on."""
    here, done = threading.get_ident(), []

    def act(number):
        if threading.get_ident() == here and len(done) > 5:
            raise KeyboardInterrupt
        time.sleep(0.001)
        done.append(number)

    with pytest.raises(KeyboardInterrupt):
        gathering._do_all(act, deque(range(100_000)), 2)
    count = len(done)
    time.sleep(0.02)
    assert len(done) == count < 100_000


def test_no_thread_to_be_had(monkeypatch):
    """Where the system gives no thread, one does it all."""

    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(gathering._thread, "start_new_thread", refuse)
    done = []
    gathering._do_all(done.append, deque(range(10)), 3)
    assert done == list(range(10))
