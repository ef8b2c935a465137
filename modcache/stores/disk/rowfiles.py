"""The rows files of some segments: whether they are whole, and open."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

from .frames import DamageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .descriptors import Descriptors
    from .directory import Directory
    from .segment import Segment

__all__ = ["LostError", "RowFiles", "is_whole", "opened"]


class LostError(Exception):
    """Segments are gone, or shorter than their rows; the first argument has their numbers."""


class RowFiles:
    """Descriptors of the rows of some segments, by number; each is right until so many others were got.

    Args:
        used: the segments.
        directory: that they lie in.
        descriptors: that are open, and for how many more there is room.
    """

    def __init__(self, used: Iterable[Segment], directory: Directory, descriptors: Descriptors) -> None:
        self._used = {segment.number: segment for segment in used}
        self._directory, self._descriptors = directory, descriptors

    @property
    def together(self) -> int:
        """How many can be got one after the other and are all right then."""
        return self._descriptors.most

    def __getitem__(self, number: int) -> int:
        """The descriptor of a segment.

        Raises:
            LostError: it cannot be opened.
        """
        try:
            return opened(self._used[number], self._directory, self._descriptors)
        except (OSError, DamageError):
            raise LostError([number]) from None


def is_whole(segment: Segment, directory: Directory, descriptors: Descriptors, *, linked: bool) -> bool:
    """Whether the committed rows of a segment may be touched: a page beyond the end of its file kills the process.

    Args:
        segment: that is meant.
        directory: that it lies in.
        descriptors: of open files.
        linked: nobody needs to look whether the file was unlinked, which takes four times as long.
    """
    try:
        file = descriptors.known(segment)
        if file is None:
            file = opened(segment, directory, descriptors)
        elif linked:
            return os.lseek(file, 0, os.SEEK_END) >= segment.file_bytes
        found = os.fstat(file)
    except (OSError, DamageError):
        return False
    return found.st_nlink > 0 and found.st_size >= segment.file_bytes


def opened(segment: Segment, directory: Directory, descriptors: Descriptors) -> int:
    """A descriptor of the rows of a segment.

    Raises:
        OSError: it cannot be opened.
        DamageError: it is not what it should be.
    """
    return descriptors.get(segment, functools.partial(segment.open_rows, directory))
