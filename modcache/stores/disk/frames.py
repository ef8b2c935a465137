"""The bytes of segment files, to frozen facts and back: heads, headers and commit frames.

A segment is two files. The rows file is a head and then rows, nothing else; the log is a header and then
commit frames, each of which says which keys the next rows have. All numbers are little endian.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import Any, Final

import torch

from ...digest import checksum
from ...rows import Layout
from ..index import KEY_BYTES

__all__ = [
    "DROPPED",
    "FORMAT",
    "LOG_MAGIC",
    "LOG_START_BYTES",
    "MOST_KEYS",
    "ROWS",
    "ROWS_HEAD_BYTES",
    "ROWS_MAGIC",
    "SEGMENT_ID_BYTES",
    "SUM_BYTES",
    "DamageError",
    "Frame",
    "SegmentHeader",
    "frames_behind",
    "is_whole",
    "log_header_bytes",
    "pack_frame",
    "pack_log_header",
    "pack_rows_head",
    "parse_frames",
    "parse_log_header",
    "parse_rows_head",
]

FORMAT: Final = 1
"""Number of the format; it is in the directory and in every file."""

ROWS_MAGIC: Final = b"\x89mcrows\n"
LOG_MAGIC: Final = b"\x89mclogs\n"
SEGMENT_ID_BYTES: Final = 16
SUM_BYTES: Final = 8

ROWS_HEAD_BYTES: Final = 64
_ROWS_HEAD: Final = struct.Struct("<8sII16s24s")  # magic, format, zero, segment, zeros; then the checksum

LOG_START_BYTES: Final = 40
_LOG_START: Final = struct.Struct("<8sII16s")  # magic, format, bytes of JSON, segment; then the checksum

ROWS: Final = 1
"""Kind of a frame that commits rows."""
DROPPED: Final = 2
"""Kind of a frame that drops keys: rows of an earlier stamp do not count, in any segment."""

_FRAME_MAGIC: Final = 0x4D46434D  # "MCFM"
_FRAME: Final = struct.Struct("<IIIIQQ")  # magic, kind, count, zero, stamp, first row; keys, sums, checksum follow
_SUM: Final = struct.Struct("<Q")
MOST_KEYS: Final = 1 << 20
"""Keys in one frame, so that a reader never needs more than 24 MiB at a time."""
_PER_KEY: Final = {ROWS: KEY_BYTES + SUM_BYTES, DROPPED: KEY_BYTES}

_MOST_JSON: Final = 1 << 24
_MOST_ROW: Final = 1 << 48
_MOST_DIMENSIONS: Final = 63  # an array has 64, one of which counts the rows
_MOST_STAMP: Final = 1 << 63

_DTYPES: Final[dict[str, torch.dtype]] = {
    name: dtype
    for dtype in {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    if not (name := str(dtype).removeprefix("torch.")).startswith(("q", "bits"))  # quantized rows are never stored
}


class DamageError(Exception):
    """Bytes that are not what this format has there; the message says what is wrong."""


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """What all rows of a segment have in common.

    Args:
        segment: 16 random bytes that both files of the segment carry.
        namespace: of the rows.
        layout: of the rows.
        writer: name of the process that wrote them.
        made: when the segment was begun, as text for reading.
    """

    segment: bytes
    namespace: str
    layout: Layout
    writer: str
    made: str


@dataclass(frozen=True, slots=True)
class Frame:
    """One commit: rows with their keys, or keys whose rows were dropped.

    Args:
        kind: `ROWS` or `DROPPED`.
        stamp: nanoseconds; of two statements about one key the later one counts.
        first: number of the first row, which is the number of rows before it.
        keys: 16 bytes for each row, joined.
        sums: 8 bytes for each row, joined: the xxh3-64 of its bytes; nothing where keys are dropped.
    """

    kind: int
    stamp: int
    first: int
    keys: bytes
    sums: bytes = b""

    @property
    def count(self) -> int:
        """How many keys there are."""
        return len(self.keys) // KEY_BYTES

    @property
    def size(self) -> int:
        """The bytes that the frame takes in the log."""
        return _FRAME.size + len(self.keys) + len(self.sums) + _SUM.size


def pack_rows_head(segment: bytes) -> bytes:
    """The first bytes of a rows file.

    >>> parse_rows_head(pack_rows_head(b"0123456789abcdef"))
    b'0123456789abcdef'
    """
    return _sealed(_ROWS_HEAD.pack(ROWS_MAGIC, FORMAT, 0, segment, b""))


def parse_rows_head(data: bytes) -> bytes:
    """The segment that a rows file belongs to.

    Raises:
        DamageError: these are not the first bytes of a rows file of this format.
    """
    if len(data) < ROWS_HEAD_BYTES:
        raise DamageError(f"the rows file is shorter than its head ({len(data)} bytes)")
    magic, version, _, segment, _ = _ROWS_HEAD.unpack_from(data)
    _check_start("rows file", magic, ROWS_MAGIC, version)
    if _sealed(data[: _ROWS_HEAD.size]) != data[:ROWS_HEAD_BYTES]:
        raise DamageError("the head of the rows file does not have its checksum")
    return bytes(segment)


def pack_log_header(header: SegmentHeader) -> bytes:
    """The first bytes of a log."""
    layout = header.layout
    facts = {
        "namespace": header.namespace,
        "tree": layout.tree,
        "leaves": [[str(dtype).removeprefix("torch."), list(shape)] for dtype, shape in layout.leaves],
        "writer": header.writer,
        "made": header.made,
    }
    text = json.dumps(facts, separators=(",", ":")).encode("ascii")
    start = _LOG_START.pack(LOG_MAGIC, FORMAT, len(text), header.segment)
    return start + _SUM.pack(checksum(start + text)) + text + bytes(-len(text) % 8)


def log_header_bytes(data: bytes) -> int:
    """How long the header of a log is, by its first `LOG_START_BYTES` bytes.

    Raises:
        DamageError: these are not the first bytes of a log of this format.
    """
    if len(data) < LOG_START_BYTES:
        raise DamageError(f"the log is shorter than its header ({len(data)} bytes)")
    magic, version, claimed, _ = _LOG_START.unpack_from(data)
    _check_start("log", magic, LOG_MAGIC, version)
    length = int(claimed)
    if length > _MOST_JSON:
        raise DamageError(f"the header of the log claims {length} bytes")
    return LOG_START_BYTES + length + -length % 8


def parse_log_header(data: bytes) -> SegmentHeader:
    """What the header of a log says; ``data`` is all of it, and may go on.

    Raises:
        DamageError: this is not the header of a log of this format.
    """
    size = log_header_bytes(data)
    if len(data) < size:
        raise DamageError(f"the log is shorter than its header ({len(data)} of {size} bytes)")
    _, _, length, segment = _LOG_START.unpack_from(data)
    text = data[LOG_START_BYTES : LOG_START_BYTES + length]
    if _SUM.unpack_from(data, _LOG_START.size)[0] != checksum(data[: _LOG_START.size] + text):
        raise DamageError("the header of the log does not have its checksum")
    if any(data[LOG_START_BYTES + length : size]):
        raise DamageError("the header of the log does not end in zeros")
    try:
        facts = json.loads(text)
        names = [_text(facts[name]) for name in ("namespace", "writer", "made")]
        layout = Layout(_text(facts["tree"]), tuple(_leaf(leaf) for leaf in facts["leaves"]))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamageError(f"the header of the log cannot be read: {error!r}") from None
    if layout.row_bytes >= _MOST_ROW:
        raise DamageError(f"the header of the log claims rows of {layout.row_bytes} bytes")
    return SegmentHeader(bytes(segment), names[0], layout, names[1], names[2])


def pack_frame(frame: Frame, segment: bytes, offset: int) -> bytes:
    """The bytes of a frame at this offset of the log of this segment; they are right nowhere else."""
    start = _FRAME.pack(_FRAME_MAGIC, frame.kind, frame.count, 0, frame.stamp, frame.first)
    body = b"".join((start, frame.keys, frame.sums))
    return body + _SUM.pack(checksum(body, _seed(segment, offset)))


def parse_frames(data: bytes, segment: bytes, offset: int, rows: int, most_rows: int) -> tuple[list[Frame], int]:
    """The frames that can be believed, in their order, and the offset in the log after them.

    It stops at the first frame that is torn, damaged, or not written for this place: there the log may go on
    later, or not.

    Args:
        data: the log from the offset on.
        segment: that the log belongs to.
        offset: of the data in the log.
        rows: committed by the frames before.
        most_rows: that the rows file is long enough for.
    """
    view, frames, place = memoryview(data), [], 0
    while place + _FRAME.size + _SUM.size <= len(view):
        magic, kind, count, zero, stamp, first = _FRAME.unpack_from(view, place)
        if magic != _FRAME_MAGIC or zero or kind not in _PER_KEY or not 0 < count <= MOST_KEYS or stamp >= _MOST_STAMP:
            break
        keys_end = place + _FRAME.size + count * KEY_BYTES
        body_end = place + _FRAME.size + count * _PER_KEY[kind]
        if body_end + _SUM.size > len(view) or (kind == ROWS and (first != rows or rows + count > most_rows)):
            break
        if _SUM.unpack_from(view, body_end)[0] != checksum(view[place:body_end], _seed(segment, offset + place)):
            break
        keys, sums = bytes(view[place + _FRAME.size : keys_end]), bytes(view[keys_end:body_end])
        frames.append(Frame(kind, stamp, first, keys, sums))
        rows += count if kind == ROWS else 0
        place = body_end + _SUM.size
    return frames, offset + place


def frames_behind(data: bytes, segment: bytes, offset: int, most_rows: int) -> list[Frame]:
    """The frames that are whole somewhere behind the end of what can be believed, where a log was damaged.

    A frame says by itself where its rows lie, so what comes after damage is not lost; but what was damaged may
    have said something else about the same keys, and the rows may be gone, so no reader believes these.

    Args:
        data: the log from that end on.
        segment: that the log belongs to.
        offset: of the data in the log.
        most_rows: that the rows file is long enough for.
    """
    magic, found, place = _FRAME_MAGIC.to_bytes(4, "little"), [], 0
    while (place := data.find(magic, place)) >= 0 and place + _FRAME.size <= len(data):
        first = _FRAME.unpack_from(data, place)[5]
        frames, end = parse_frames(data[place:], segment, offset + place, first, most_rows)
        found += frames
        place = max(place + 1, end - offset)
    return found


def is_whole(data: bytes) -> bool:
    """Whether there is at least as much as the frame claims that begins here, or what is no frame at all."""
    if len(data) < _FRAME.size + _SUM.size:
        return False
    magic, kind, count, zero, _, _ = _FRAME.unpack_from(data)
    if magic != _FRAME_MAGIC or zero or kind not in _PER_KEY:
        return True
    return bool(_FRAME.size + count * _PER_KEY[kind] + _SUM.size <= len(data))


def _sealed(body: bytes) -> bytes:
    return body + _SUM.pack(checksum(body))


def _seed(segment: bytes, offset: int) -> int:
    return int.from_bytes(segment[:8], "little") ^ offset


def _check_start(what: str, magic: bytes, expected: bytes, version: int) -> None:
    if magic != expected:
        raise DamageError(f"this is no {what} of modcache")
    if version != FORMAT:
        raise DamageError(f"the {what} has format {version}, and this modcache reads format {FORMAT}")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _leaf(value: Any) -> tuple[torch.dtype, tuple[int, ...]]:
    name, sizes = value
    if len(sizes) > _MOST_DIMENSIONS or not all(type(size) is int and 0 <= size < _MOST_ROW for size in sizes):
        raise ValueError(f"{sizes!r} is no shape")
    dtype, shape = _DTYPES[name], tuple(sizes)
    if math.prod(shape) * dtype.itemsize >= _MOST_ROW:
        raise ValueError(f"{sizes!r} is too large a shape")
    return dtype, shape
