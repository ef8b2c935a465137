"""What things in a cache directory are called."""

from __future__ import annotations

import pytest

from modcache.stores.disk.names import SegmentName, folder_of, is_folder, is_writer, new_writer, segment_of

HEX = "0123456789abcdef0123456789abcdef"
WRITER = "0123456789abcdef"


@pytest.mark.parametrize("text", ["", "..", "a/b", "\0", "\ud800", HEX.upper(), HEX + "\n", "x" * 10_000])
def test_folders_of_any_text(text):
    """Any text has a folder of its own whose name is safe; thirty-two hex digits are their own."""
    assert folder_of(HEX) == HEX
    assert folder_of(text).startswith("~")
    assert len(folder_of(text)) == 33
    assert folder_of(text) != folder_of(text + "x")


@pytest.mark.parametrize("number", [0, 7, 999_999, 1_000_000, 999_999_999])
def test_names_of_a_segment(number):
    """A segment's two files have names that are read back."""
    segment = SegmentName(WRITER, number)
    assert segment_of(segment.rows) == segment_of(segment.log) == segment
    assert segment.rows != segment.log


@pytest.mark.parametrize(
    "name",
    ["notes.txt", f"{WRITER}-7.log", f"x{WRITER}-000007.log", f"{WRITER}-000007.log~", f"{WRITER}-0000007.log"],
)
def test_names_of_others(name):
    """A name that only looks like one of ours belongs to nobody."""
    assert segment_of(name) is None


def test_names_that_are_given_are_known_again():
    """What is made here is taken for what it is, and for nothing else."""
    assert is_folder(folder_of(HEX))
    assert is_folder(folder_of("text"))
    assert not is_folder(WRITER)
    assert is_writer(new_writer())
    assert not is_writer(HEX)
    assert new_writer() != new_writer()
