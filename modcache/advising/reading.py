"""Measure what reading rows takes: a gather out of memory, and the disk that a directory lies on."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["Disk", "disk_of", "gather_seconds"]

_POOL = 64 << 20  # more than the caches of a processor hold
_MOST_ROWS = 1 << 14  # of tiny rows
_PIECE = 4 << 20
_FILE = 64 << 20
_ROUNDS = 7


class Disk(NamedTuple):
    """Bytes per second of a disk, its cache in memory put aside.

    Args:
        reading: a file, one after the other.
        writing: the same, until it is there.
    """

    reading: float
    writing: float


def disk_of(directory: Path) -> Disk:
    """How fast the disk is that a directory lies on, or would lie on: a file is written there, read and deleted.

    Raises:
        OSError: nothing can be written there.
    """
    place = directory
    while not place.exists() and place != place.parent:
        place = place.parent
    piece = os.urandom(_PIECE)  # a disk that compresses would be too fast with zeros
    with tempfile.TemporaryFile(dir=place, prefix=".modcache-") as file:
        began = time.perf_counter()
        for _ in range(_FILE // _PIECE):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - began
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.perf_counter()
        while file.read(_PIECE):
            pass
        return Disk(_FILE / (time.perf_counter() - began), _FILE / written)


def gather_seconds(row_bytes: int, rows: int, device: torch.device) -> float:
    """How long it takes to gather rows of this size out of memory, and to take them where they are needed."""
    if row_bytes == 0:
        return 0.0
    size = min(row_bytes, _POOL // 2)
    count = min(rows, _POOL // (2 * size), _MOST_ROWS)
    stored = torch.full(
        (min(_POOL // size, _MOST_ROWS), size), 1, dtype=torch.uint8
    )  # pages of zeros would all be one page
    generator = torch.Generator().manual_seed(0)
    taken = []
    for _ in range(_ROUNDS):
        places = torch.randperm(len(stored), generator=generator)[:count]
        began = time.perf_counter()
        found = stored.index_select(0, places).to(device)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        taken.append(time.perf_counter() - began)
        del found
    return min(taken) * (row_bytes * rows) / (size * count)
