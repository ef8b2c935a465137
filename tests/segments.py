"""Segments under test: whatever somebody may have written into a cache directory, without a store."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modcache import DiskStore
from modcache.digest import checksum
from modcache.rows import Layout
from modcache.stores.disk.directory import Directory
from modcache.stores.disk.frames import (
    DROPPED,
    ROWS,
    Frame,
    SegmentHeader,
    pack_frame,
    pack_log_header,
    pack_rows_head,
)
from modcache.stores.disk.names import SegmentName, folder_of, new_writer

__all__ = ["NUMBER", "alive", "content_of", "key_of", "plant", "value_of"]

NUMBER = Layout("{}", ((torch.int64, ()),))
"""A row is one whole number."""


def key_of(number: int) -> bytes:
    """Keys of which the first half is shared by pairs, as digests hardly ever are."""
    return b"K%7dk%7d" % (number // 2, number)


def value_of(number: int, version: int = 0, layout: Layout = NUMBER) -> bytes:
    """The bytes of the row of a number; every version has others."""
    return (
        (np.arange(layout.row_bytes, dtype=np.int64) * 7 + number * 31 + version * 101 + 1).astype(np.uint8).tobytes()
    )


Commit = tuple[int, Mapping[int, int] | Sequence[int]]
"""A stamp, and rows as number -> version, or the numbers that are dropped."""


def plant(
    path: Path,
    namespace: str,
    commits: Sequence[Commit],
    *,
    layout: Layout = NUMBER,
    writer: str | None = None,
    number: int = 0,
    tail: bytes = b"",
) -> SegmentName:
    """Writes a segment of these commits; its writer is dead, unless it is `alive`."""
    directory = Directory(path)
    directory.prepare("a test")
    folder = folder_of(namespace)
    directory.make_folder(("rows", folder))
    name, segment = SegmentName(writer or new_writer(), number), os.urandom(16)
    rows = bytearray(pack_rows_head(segment))
    log = bytearray(pack_log_header(SegmentHeader(segment, namespace, layout, name.writer, "today")))
    first = 0
    for stamp, what in commits:
        keys = b"".join(map(key_of, what))
        if isinstance(what, Mapping):
            values = [value_of(number, version, layout) for number, version in what.items()]
            sums = b"".join(checksum(value).to_bytes(8, "little") for value in values)
            frame = Frame(ROWS, stamp, first, keys, sums)
            rows += b"".join(values)
            first += len(values)
        else:
            frame = Frame(DROPPED, stamp, first, keys)
        log += pack_frame(frame, segment, len(log))
    place = directory.place_of(folder)
    (place / name.rows).write_bytes(rows + tail)
    (place / name.log).write_bytes(log + tail)
    return name


@contextlib.contextmanager
def alive(path: Path, writer: str) -> Iterator[None]:
    """A writer lives for the time of the block."""
    directory = Directory(path)
    directory.prepare("a test")
    sign = directory.sign_in(writer)
    try:
        yield
    finally:
        directory.sign_out(writer, sign)


def content_of(path: Path, namespace: str, numbers: Sequence[int]) -> dict[int, bytes]:
    """What a store serves of these numbers."""
    with DiskStore(path) as store:
        found: dict[int, bytes] = {}
        for part in store.get(namespace, [key_of(number) for number in numbers]):
            leaves: list[Any] = [tensor.reshape(len(tensor), -1).view(torch.uint8) for tensor in part.rows.tensors]
            joined = torch.cat(leaves, dim=1).numpy()
            found.update({numbers[at]: joined[row].tobytes() for row, at in enumerate(part.positions.tolist())})
        return found
