"""A diskcache that holds texts under texts and nothing else, whatever somebody planted in its files."""

from __future__ import annotations

from typing import Any, Final, NoReturn

import diskcache

from .settings import SETTINGS

__all__ = ["TextCache"]

_RAW: Final = 1  # diskcache's mode of a value that is the column itself, not a file and not a pickle


class _Texts(diskcache.Disk):  # type: ignore[misc]  # diskcache ships no types
    """Reads and writes plain columns; where diskcache would take a pickle or a file, this refuses."""

    def put(self, key: object) -> tuple[str, bool]:
        if type(key) is not str:
            raise TypeError(f"a key of the catalogue is a text, not a {type(key).__name__}")
        return key, True

    def get(self, key: object, raw: object) -> str:
        if raw != 1 or type(key) is not str:
            raise ValueError("a row of the catalogue has a key that is no text")
        return key

    def store(self, value: object, read: bool, key: object = None) -> tuple[int, int, None, str]:
        if read or type(value) is not str:
            raise TypeError(f"a value of the catalogue is a text, not a {type(value).__name__}")
        return 0, _RAW, None, value

    def fetch(self, mode: object, filename: object, value: object, read: bool) -> str:
        if read or mode != _RAW or filename is not None or type(value) is not str:
            raise ValueError("a row of the catalogue has a value that is no text")
        return value

    def filename(self, key: object = None, value: object = None) -> NoReturn:
        raise ValueError("the catalogue has no files of values")

    def remove(self, file_path: object) -> None:
        """Nothing: a row with a file name was planted, and the name may point anywhere."""


class TextCache(diskcache.Cache):  # type: ignore[misc]
    """The cache in a directory, with the settings of the catalogue and no others.

    Args:
        directory: where it lies or shall lie.
        timeout: seconds to wait for another writer.

    Raises:
        ValueError: its file has a setting that is none of ours; diskcache would make an attribute or a pragma of it.
    """

    def __init__(self, directory: str, timeout: float) -> None:
        try:
            super().__init__(directory, timeout=timeout, disk=_Texts, **SETTINGS)
        except BaseException:
            self.close()  # nobody else can, and from Python 3.13 on a connection left open is warned of
            raise

    def reset(self, key: str, value: Any = diskcache.core.ENOVAL, update: bool = True) -> Any:
        """As diskcache's, which every setting goes through, also those that it found in the file."""
        if key not in (SETTINGS if value is not diskcache.core.ENOVAL else _READABLE):
            raise ValueError(f"the catalogue has no setting {key!r}")
        if value is not diskcache.core.ENOVAL and value != SETTINGS.get(key, value):
            raise ValueError(f"the setting {key!r} of the catalogue is not {value!r}")
        return super().reset(key, value, update)


_READABLE: Final = {*SETTINGS, *diskcache.core.METADATA}
