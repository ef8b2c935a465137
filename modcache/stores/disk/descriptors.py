"""Keep the files open that were used last, and no more than so many."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final

__all__ = ["Descriptors"]

_MOST: Final = 128  # of the 1024 that a process mostly may open; layouts by token count make hundreds of segments


class Descriptors:
    """Open files by name; the one that was not used for longest is closed for a new one.

    Not safe in threads: a descriptor that was got is right until as many others were.
    """

    def __init__(self, most: int = _MOST) -> None:
        self.most = most
        self._files: OrderedDict[Hashable, int] = OrderedDict()

    def known(self, name: Hashable) -> int | None:
        """The descriptor of a file if it is open; it counts as use only where files are about to be closed."""
        if len(self._files) * 2 > self.most and name in self._files:
            self._files.move_to_end(name)
        return self._files.get(name)

    def get(self, name: Hashable, open_file: Callable[[], int]) -> int:
        """The descriptor of a file, which is opened if it is not open."""
        file = self._files.get(name)
        if file is None:
            while len(self._files) >= self.most:
                self.drop(next(iter(self._files)))
            file = self._files[name] = open_file()
        else:
            self._files.move_to_end(name)
        return file

    def drop(self, name: Hashable) -> None:
        """Closes a file if it is open."""
        # First out of the table: a fork in between may leak a number, but must never close another file.
        file = self._files.pop(name, None)
        if file is not None:
            with contextlib.suppress(OSError):
                os.close(file)

    def close(self) -> None:
        """Closes all files."""
        for name in list(self._files):
            self.drop(name)

    def __del__(self) -> None:
        self.close()
