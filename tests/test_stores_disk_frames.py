"""Bytes of segment files: what is packed is parsed, and nothing else is believed."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modcache.digest import checksum
from modcache.rows import Layout
from modcache.stores.disk.frames import (
    DROPPED,
    FORMAT,
    LOG_START_BYTES,
    ROWS,
    DamageError,
    Frame,
    SegmentHeader,
    log_header_bytes,
    pack_frame,
    pack_log_header,
    pack_rows_head,
    parse_frames,
    parse_log_header,
    parse_rows_head,
)

SEGMENT = bytes(range(16))
LEAVES = ((torch.float32, (2, 3)), (torch.bfloat16, ()), (torch.bool, (0,)), (torch.complex64, (1,)))
HEADER = SegmentHeader(SEGMENT, "ns", Layout('["tuple",[{},{},{},{}]]', LEAVES), "0123456789abcdef", "2026-01-02")
EVERY_ROW = 1 << 40

names = st.text(max_size=20) | st.just("\ud800 lone") | st.just("../..")
shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.float8_e4m3fn, torch.bool])
layouts = st.builds(Layout, names, st.lists(st.tuples(dtypes, shapes), max_size=3).map(tuple))
headers = st.builds(SegmentHeader, st.binary(min_size=16, max_size=16), names, layouts, names, names)


@st.composite
def logs(draw):
    """Frames as a writer commits them: each begins at the row where the one before ended."""
    frames, rows = [], 0
    for kind, count in draw(st.lists(st.tuples(st.sampled_from([ROWS, DROPPED]), st.integers(1, 5)), max_size=6)):
        keys = draw(st.binary(min_size=16 * count, max_size=16 * count))
        sums = draw(st.binary(min_size=8 * count, max_size=8 * count)) if kind == ROWS else b""
        frames.append(Frame(kind, draw(st.integers(0, (1 << 63) - 1)), rows, keys, sums))
        rows += count if kind == ROWS else 0
    return frames


def packed(frames, offset=LOG_START_BYTES):
    data = b""
    for frame in frames:
        data += pack_frame(frame, SEGMENT, offset + len(data))
    return data


def parsed(data, offset=LOG_START_BYTES, rows=0, most_rows=EVERY_ROW):
    return parse_frames(data, SEGMENT, offset, rows, most_rows)


def flips(data):
    """The data with one byte changed, for each byte, in its lowest and in its highest bit."""
    for place in range(len(data)):
        for bit in (1, 128):
            changed = bytearray(data)
            changed[place] ^= bit
            yield bytes(changed)


@given(st.binary(min_size=16, max_size=16))
def test_rows_head(segment):
    """A head of 64 bytes names the segment; what follows it does not matter."""
    head = pack_rows_head(segment)
    assert len(head) == 64
    assert parse_rows_head(head) == parse_rows_head(head + b"rows") == segment


def test_damaged_rows_heads():
    """Every strict prefix and every changed byte of a head is rejected."""
    head = pack_rows_head(SEGMENT)
    for wrong in [*(head[:end] for end in range(len(head))), *flips(head)]:
        with pytest.raises(DamageError):
            parse_rows_head(wrong)


@given(headers, st.binary(max_size=20))
def test_log_header(header, more):
    """What is packed is parsed: any text as namespace, any layout, whatever follows."""
    data = pack_log_header(header)
    assert len(data) % 8 == 0
    assert log_header_bytes(data[:LOG_START_BYTES]) == len(data)
    assert parse_log_header(data + more) == header


def test_damaged_log_headers():
    """Every strict prefix and every changed byte of a header is rejected."""
    data = pack_log_header(HEADER)
    for wrong in [*(data[:end] for end in range(len(data))), *flips(data)]:
        with pytest.raises(DamageError):
            parse_log_header(wrong)


def log_of(facts, version=FORMAT):
    """A log header of any JSON, with the right checksum."""
    text = facts if isinstance(facts, bytes) else json.dumps(facts).encode()
    start = struct.pack("<8sII16s", b"\x89mclogs\n", version, len(text), SEGMENT)
    return start + struct.pack("<Q", checksum(start + text)) + text + bytes(-len(text) % 8)


FACTS = {"namespace": "n", "tree": "{}", "leaves": [["float32", [3]]], "writer": "w", "made": "m"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"namespace": 3},
        {"tree": None},
        {"leaves": [["float32", [-1]]]},
        {"leaves": [["float32", [True]]]},
        {"leaves": [["float32", [2**40, 2**40]]]},
        {"leaves": [["float32", [2**45]]] * 9},
        {"leaves": [["qint8", [3]]]},
        {"leaves": [["os.system", [3]]]},
        {"leaves": [["float32"]]},
        {"leaves": [[["float32"], [3]]]},
        {"leaves": 3},
    ],
)
def test_headers_that_say_what_cannot_be(wrong):
    """A header with a right checksum is read only when its facts can be."""
    assert parse_log_header(log_of(FACTS)).layout == Layout("{}", ((torch.float32, (3,)),))
    with pytest.raises(DamageError, match="header of the log"):
        parse_log_header(log_of({**FACTS, **wrong}))


@pytest.mark.parametrize("text", [b"[]", b"3", b"{}", b"\xff", b"[" * 100_000, b'{"namespace": '])
def test_headers_that_are_no_object(text):
    """Other JSON, and no JSON, are damage and nothing worse."""
    with pytest.raises(DamageError, match="cannot be read"):
        parse_log_header(log_of(text))


def test_other_formats():
    """A newer format is not read by guessing; the message names both numbers."""
    with pytest.raises(DamageError, match="format 2, and this modcache reads format 1"):
        parse_log_header(log_of(FACTS, version=2))


def test_a_huge_claim_is_not_believed():
    """A header that claims gigabytes of JSON is rejected before anything is read."""
    with pytest.raises(DamageError, match="claims"):
        log_header_bytes(struct.pack("<8sII16sQ", b"\x89mclogs\n", FORMAT, 2**32 - 1, SEGMENT, 0))


@given(logs(), st.integers(0, 1 << 40))
def test_frames(frames, offset):
    """What is packed is parsed, and the offset behind it is told."""
    data = packed(frames, offset)
    assert parsed(data, offset) == (frames, offset + len(data))
    assert sum(frame.size for frame in frames) == len(data)


@given(logs(), st.data())
def test_a_torn_log_ends_at_its_last_whole_frame(frames, data):
    """Of a log that breaks off anywhere, exactly the whole frames are believed."""
    whole = packed(frames)
    end = data.draw(st.integers(0, len(whole)))
    sizes = [sum(frame.size for frame in frames[:count]) for count in range(len(frames) + 1)]
    count = max(count for count, size in enumerate(sizes) if size <= end)
    assert parsed(whole[:end]) == (frames[:count], LOG_START_BYTES + sizes[count])


def test_every_changed_byte_ends_the_log():
    """A changed byte in a frame hides that frame and those after it, never those before."""
    frames = [
        Frame(ROWS, 5, 0, b"a" * 32, b"s" * 16),
        Frame(DROPPED, 6, 2, b"a" * 16),
        Frame(ROWS, 7, 2, b"b" * 16, b"t" * 8),
    ]
    data = packed(frames)
    ends = [sum(frame.size for frame in frames[:count]) for count in range(1, 4)]
    for number, wrong in enumerate(flips(data)):
        before = sum(end <= number // 2 for end in ends)
        assert parsed(wrong)[0] == frames[:before]


@given(logs().filter(len), st.integers(1, 1 << 30))
def test_a_frame_is_right_in_its_place_only(frames, shift):
    """Frames at another offset, of another segment, or after other rows are not believed."""
    data = packed(frames)
    assert parsed(data, LOG_START_BYTES + shift)[0] == []
    assert parse_frames(data, bytes(16), LOG_START_BYTES, 0, EVERY_ROW)[0] == []
    kept = next((place for place, frame in enumerate(frames) if frame.kind == ROWS), len(frames))
    assert parsed(data, rows=shift)[0] == frames[:kept]


def test_rows_that_the_file_lacks_are_not_believed():
    """A frame whose rows are not all in the rows file is not believed yet."""
    frames = [Frame(ROWS, 5, 0, b"a" * 32, b"s" * 16), Frame(ROWS, 6, 2, b"b" * 32, b"s" * 16)]
    assert parsed(packed(frames), most_rows=3)[0] == frames[:1]
    assert parsed(packed(frames), most_rows=4)[0] == frames
