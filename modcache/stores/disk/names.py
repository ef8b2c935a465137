"""What everything in a cache directory is called."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Final

from ...digest import digest

__all__ = [
    "ADMISSION",
    "CATALOGUE",
    "FORMAT_FILE",
    "MANIFEST",
    "ROWS_FOLDER",
    "WRITERS_FOLDER",
    "SegmentName",
    "folder_of",
    "is_folder",
    "is_writer",
    "new_writer",
    "segment_of",
]

FORMAT_FILE: Final = "modcache.json"
"""The file that says which format the directory has."""
ROWS_FOLDER: Final = "rows"
"""The folder of the folders of namespaces."""
WRITERS_FOLDER: Final = "writers"
"""The folder of the files that writers hold locked while they live."""
CATALOGUE: Final = "catalogue"
"""The folder of the catalogue."""
MANIFEST: Final = "manifest.json"
"""The description of a namespace, within its folder."""
ADMISSION: Final = "admission"
"""The file in the folder of writers that is locked while room is made."""

_FOLDER: Final = re.compile(r"[0-9a-f]{32}|~[0-9a-f]{32}")
_WRITER: Final = re.compile(r"[0-9a-f]{16}")
_SEGMENT: Final = re.compile(r"([0-9a-f]{16})-([0-9]{6}|[1-9][0-9]{6,8})\.(rows|log)")


def folder_of(namespace: str) -> str:
    """The name of the folder that the rows of a namespace lie in; any text has one.

    >>> folder_of("0123456789abcdef0123456789abcdef"), folder_of("../..")
    ('0123456789abcdef0123456789abcdef', '~bb26f2090223423ccac58f912cc322fe')
    """
    if re.fullmatch(r"[0-9a-f]{32}", namespace):
        return namespace
    return "~" + digest(namespace.encode("utf-8", "surrogatepass")).hex()


def new_writer() -> str:
    """A name for one writing process, which nobody else has."""
    return os.urandom(8).hex()


@dataclass(frozen=True, slots=True, order=True)
class SegmentName:
    """What the two files of a segment are called.

    Args:
        writer: the process that writes it.
        number: the writer's own count.
    """

    writer: str
    number: int

    @property
    def rows(self) -> str:
        """The name of the file of rows."""
        return f"{self.writer}-{self.number:06d}.rows"

    @property
    def log(self) -> str:
        """The name of the log."""
        return f"{self.writer}-{self.number:06d}.log"


def is_folder(name: str) -> bool:
    """Whether the folder of a namespace may be called so."""
    return _FOLDER.fullmatch(name) is not None


def is_writer(name: str) -> bool:
    """Whether `new_writer` may have given this name."""
    return _WRITER.fullmatch(name) is not None


def segment_of(name: str) -> SegmentName | None:
    """The segment that a file of this name belongs to; None where it is none of ours.

    >>> segment_of("0123456789abcdef-000007.log"), segment_of("notes.log")
    (SegmentName(writer='0123456789abcdef', number=7), None)
    """
    found = _SEGMENT.fullmatch(name)
    return None if found is None else SegmentName(found[1], int(found[2]))
