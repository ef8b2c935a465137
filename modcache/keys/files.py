"""Keys of files: by content, by what the file system says of them, or by name."""

from __future__ import annotations

import os
import stat
import sys
import time

from ..digest import encode, frame, hasher
from ..locks import lock_of
from ..tensors import NoContentError

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
        NoContentError: it is a pipe or a device: what was read of it is gone, or never ends.
    """
    if check == "name":
        return frame(b"file name", encode(os.fspath(path)))
    if check == "stat":
        return frame(b"file stat", encode((os.path.abspath(os.fspath(path)), *_stamp(os.stat(path)))))
    return frame(b"file content", _content_digest(path))


def _stamp(found: os.stat_result) -> _Stamp:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _content_digest(path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> bytes:
    try:
        told = os.stat(path)
    except FileNotFoundError:
        pass  # let open() say it
    else:
        if (found := _digests.get(_stamp(told))) is not None:
            return found
        if not stat.S_ISREG(told.st_mode) and not stat.S_ISDIR(told.st_mode):
            raise NoContentError(f"{os.fspath(path)!r} is a pipe or a device, which has no content to make a key of")
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
