"""What a store of a directory is made with, checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ...errors import UsageError, UsageTypeError

__all__ = ["Options"]


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a store, beside its directory.

    Args:
        max_bytes: bound of all files in the directory, or None.
        mmap: whether small rows are read through memory maps.
        keep_free: bytes of the file system that stay free, or None for the usual floor.

    Raises:
        UsageError: a number cannot be right.
        UsageTypeError: something is of the wrong type.
    """

    max_bytes: int | None
    mmap: bool
    keep_free: int | None

    def __post_init__(self) -> None:
        _check(self.max_bytes, "max_bytes", 1, "no bound")
        _check(self.keep_free, "keep_free", 0, "the smaller of 1 GiB and 5 % of the file system")
        if not isinstance(self.mmap, bool):
            raise UsageTypeError(f"mmap is True or False, but {self.mmap!r} was given.")

    def as_keywords(self) -> dict[str, Any]:
        """The same, to make another store with."""
        return asdict(self)


def _check(count: object, name: str, least: int, nothing: str) -> None:
    if count is None:
        return
    if isinstance(count, bool) or not isinstance(count, int):
        raise UsageTypeError(f"{name} is a number of bytes (an int) or None, but {count!r} was given.")
    if count < least:
        raise UsageError(f"{name}={count} cannot be kept. Give at least {least} bytes, or None for {nothing}.")
