"""Tell damage at the end of a segment from what a writer leaves there that is at work or was killed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from .frames import ROWS, ROWS_HEAD_BYTES, frames_behind, is_whole, parse_frames
from .segment import read_all, read_header

if TYPE_CHECKING:
    from .directory import Directory
    from .names import SegmentName
    from .segment import Segment

__all__ = ["damage_behind", "is_cut_off"]

_MANY: Final = 1 << 62
_PIECE: Final = 1 << 25  # bytes that are looked at: more than any commit has


def damage_behind(directory: Directory, segment: Segment) -> str | None:
    """What was damaged behind the last commit of a segment that can be believed; None where nothing was.

    A writer that was killed leaves rows without a commit, and perhaps the beginning of a commit. A whole commit that
    is not right, or whose rows are not there, is damage; and so are rows without a commit of a writer that ended in
    order.

    Raises:
        OSError: it cannot be read, or is gone.
    """
    writer = segment.name.writer
    if directory.is_alive(writer):
        return None
    with directory.opened_segment(segment.folder, segment.name.log) as log:
        data = read_all(log, segment.log_end, min(_PIECE, os.fstat(log).st_size - segment.log_end))
    with directory.opened_segment(segment.folder, segment.name.rows) as file:
        rows_bytes = os.fstat(file).st_size
    most = (rows_bytes - ROWS_HEAD_BYTES) // segment.row_bytes if segment.row_bytes else _MANY
    here = segment.segment, segment.log_end
    if parse_frames(data, *here, segment.committed, most)[0]:
        return None  # it ended just now; the next look finds the rest
    lost = segment.committed < most < _MANY and writer not in directory.writers()
    if not data.strip(b"\0"):  # a system that lost power may leave zeros
        return "commits are missing at the end of its log" if lost else None
    behind = frames_behind(data, *here, _MANY)
    ends = (ROWS_HEAD_BYTES + (frame.first + frame.count) * segment.row_bytes for frame in behind if frame.kind == ROWS)
    if any(end > rows_bytes for end in ends):
        return "its rows file is cut off"
    return "a commit in its log is damaged or cut off" if lost or behind or is_whole(data) else None


def is_cut_off(directory: Directory, folder: str, name: SegmentName) -> bool:
    """Whether a log that has no whole header had one: whoever has rows, or ended in order, wrote one.

    Raises:
        OSError: it cannot be read, or is gone.
    """
    if directory.is_alive(name.writer):
        return False
    with directory.opened_segment(folder, name.rows) as file:
        has_rows = os.fstat(file).st_size > ROWS_HEAD_BYTES
    return has_rows and read_header(directory, folder, name) is None
