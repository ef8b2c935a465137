"""Read rows out of files to where they shall stand, each summed up while in the cache, by threads if that pays."""

from __future__ import annotations

import _thread
import contextlib
import functools
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from ...digest import checksum
from ...row_digests import processors
from .frames import ROWS_HEAD_BYTES
from .rowfiles import LostError
from .segment import read_into
from .tasks import closed_lock
from .window import ROW_BITS

if TYPE_CHECKING:
    from ..index import Places
    from .rowfiles import RowFiles

__all__ = ["read_rows"]

_RUN: Final = 1 << 20  # bytes that are read at once: what is still in the cache when it is summed up
_MOST_PARTS: Final = 512  # of one read
_LARGE: Final = 1 << 17  # bytes of a row from which on threads do not wait for each other all the time
_MANY: Final = 1 << 25  # bytes of all rows from which on a second thread pays
_ROW_MASK: Final = (1 << ROW_BITS) - 1

_Matrix = npt.NDArray[np.uint8]


def read_rows(files: RowFiles, places: Places, sizes: Sequence[int], todo: Places) -> tuple[list[_Matrix], list[int]]:
    """A matrix for each leaf, with the rows at some places, and the checksums of those that are to be checked.

    Args:
        files: that the rows are in.
        places: of the rows.
        sizes: the bytes of each leaf, or of a row as a whole.
        todo: which rows are to be summed up, ascending.

    Raises:
        LostError: a file is gone, or shorter than its rows.
    """
    columns = [np.empty((len(places), size), np.uint8) for size in sizes]
    leaves = [(memoryview(column.data).cast("B"), column.shape[1]) for column in columns if column.size]
    if not leaves:
        return columns, [checksum(b"")] * len(todo)
    row_bytes, sums = sum(sizes), dict.fromkeys(todo.tolist(), 0)
    runs = _runs(places, max(1, _RUN // row_bytes) if len(leaves) == 1 else 1)
    threads = processors() if row_bytes >= _LARGE and len(places) * row_bytes >= _MANY else 1
    for reads in _reads(runs, places, row_bytes, leaves, files):
        _do_all(functools.partial(_read, row_bytes, sums), deque(reads), threads - 1)
    return columns, list(sums.values())


_Read = tuple[int, int, int, int, list[memoryview]]
"""Rows that stand one behind the other: segment, file, offset, the first one in the answer, and where they go."""


def _read(row_bytes: int, sums: dict[int, int], read: _Read) -> None:
    """Reads rows; of more than one leaf it is one row.

    Raises:
        LostError: the file ends before.
    """
    number, file, offset, first, views = read
    # As little as can be between what lets go of the interpreter: threads wait for each other there.
    whole = views[0]
    if len(views) == 1 and os.preadv(file, views, offset) == whole.nbytes:
        if whole.nbytes == row_bytes:
            if first in sums:
                sums[first] = checksum(whole)
            return
    elif not _read_all(file, views, offset):
        raise LostError([number])
    if len(views) > 1:
        if first in sums:
            sums[first] = checksum(b"".join(views))
        return
    for at in range(whole.nbytes // row_bytes if sums else 0):
        if first + at in sums:
            sums[first + at] = checksum(whole[at * row_bytes : (at + 1) * row_bytes])


def _read_all(file: int, views: list[memoryview], offset: int) -> bool:
    """Fills these views, one after the other, however much comes at a time; False where the file ends before."""
    for start in range(0, len(views), _MOST_PARTS):
        part = views[start : start + _MOST_PARTS]
        if not read_into(file, offset, part):
            return False
        offset += sum(view.nbytes for view in part)
    return True


def _reads(
    runs: Sequence[tuple[int, int]],
    places: Places,
    row_bytes: int,
    leaves: Sequence[tuple[memoryview, int]],
    files: RowFiles,
) -> Iterator[list[_Read]]:
    """What is to be read, as many files at a time as can be open together."""
    starts = places[[first for first, _ in runs]]
    numbers, rows = (starts >> ROW_BITS).tolist(), (starts & _ROW_MASK).tolist()
    found: list[_Read] = []
    opened: dict[int, int] = {}
    for (first, last), number, row in zip(runs, numbers, rows, strict=True):
        if number not in opened:
            if len(opened) == files.together:
                yield found
                found, opened = [], {}
            opened[number] = files[number]
        views = [flat[first * size : last * size] for flat, size in leaves]
        found.append((number, opened[number], ROWS_HEAD_BYTES + row * row_bytes, first, views))
    yield found


def _runs(places: Places, most: int) -> list[tuple[int, int]]:
    """Where rows stand one behind the other in their file, at most so many in one run.

    >>> _runs(np.array([4, 5, 6, 9, 3]), 2)
    [(0, 2), (2, 3), (3, 4), (4, 5)]
    """
    breaks = np.flatnonzero(np.diff(places) != 1) + 1
    edges = [0, *breaks.tolist(), len(places)]
    return [(start, min(start + most, b)) for a, b in itertools.pairwise(edges) for start in range(a, b, most)]


# --- threads --------------------------------------------------------------------------------------------


def _do_all(act: Callable[[_Read], None], runs: deque[_Read], helpers: int) -> None:
    """Does this for all runs; other threads take some of them as soon as they get to it, and nobody waits for that.

    Raises:
        Exception: what the first that failed raised.
    """
    begun: list[threading.Lock] = []
    failed: list[Exception] = []

    def work() -> None:
        while not failed:
            try:
                run = runs.popleft()
            except IndexError:
                return
            act(run)

    def help_out() -> None:
        done = closed_lock()
        begun.append(done)  # before anything is taken: who finds nothing left sees who took it
        try:
            work()
        except Exception as error:
            failed.append(error)
        finally:
            done.release()

    # Not by `threading`, which waits for a thread to begin: on a busy machine that takes milliseconds.
    with contextlib.suppress(RuntimeError):
        for _ in range(min(helpers, len(runs) - 1)):
            _thread.start_new_thread(help_out, ())
    try:
        work()
    finally:
        runs.clear()  # after an interrupt nothing more is begun
        for done in begun:
            done.acquire()
    if failed:
        raise failed[0]
