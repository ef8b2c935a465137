"""Which files that have the name of a segment's are somebody else's."""

from __future__ import annotations

import contextlib

from ..directory import Directory
from ..names import SegmentName

__all__ = ["is_there", "strange_files"]


def is_there(directory: Directory, folder: str, name: SegmentName) -> bool:
    """Whether there is such a segment, be it damaged: a single file that is somebody else's is none."""
    try:
        files = directory.files_of(folder, name)
    except OSError:
        return True
    return any(files.values()) or len(files) > 1


def strange_files(directory: Directory, folder: str) -> tuple[str, ...]:
    """Files that have the name of a segment's and are somebody else's."""
    strange = []
    for name in directory.segments(folder):
        with contextlib.suppress(OSError):
            strange += [file for file, ours in directory.files_of(folder, name).items() if not ours]
    return tuple(strange)
