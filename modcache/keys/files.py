"""Keys of files: by content, by what the file system says of them, or by name."""

from __future__ import annotations

import os
import sys
import time

from ..digest import encode, frame, hasher
from ..locks import lock_of

__all__ = ["CHECKS", "path_key"]

CHECKS = ("content", "stat", "name")

_SETTLED = 2.0
"""Seconds: a younger file may change again within the same time stamp, so its digest is not remembered."""

_CHUNK = 1 << 20
_REMEMBERED = 1 << 20

_Stamp = tuple[int, int, int, int, int]
_digests: dict[_Stamp, bytes] = {}
_lock = lock_of(sys.modules[__name__])


def path_key(path: str | bytes | os.PathLike[str] | os.PathLike[bytes], check: str) -> bytes:
    """The framed key of a file.

    Raises:
        OSError: what opening the file would raise (`FileNotFoundError`, `IsADirectoryError`, ...).
    """
    if check == "name":
        return frame(b"file name", encode(os.fspath(path)))
    if check == "stat":
        stat = os.stat(path)
        return frame(b"file stat", encode((os.path.abspath(os.fspath(path)), *_stamp(stat))))
    return frame(b"file content", _content_digest(path))


def _stamp(stat: os.stat_result) -> _Stamp:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _content_digest(path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> bytes:
    try:
        found = _digests.get(_stamp(os.stat(path)))
    except FileNotFoundError:
        found = None  # let open() say it
    if found is not None:
        return found
    with open(path, "rb") as file:
        before = os.fstat(file.fileno())
        content = hasher()
        while chunk := file.read(_CHUNK):
            content.update(chunk)
        after = os.fstat(file.fileno())
    found = content.digest()
    settled = time.time() - max(after.st_mtime, after.st_ctime) > _SETTLED
    if settled and _stamp(before) == _stamp(after):
        with _lock:
            if len(_digests) >= _REMEMBERED:
                _digests.clear()
            _digests[_stamp(after)] = found
    return found
