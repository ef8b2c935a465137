"""Open files: the ones that were used last, and no more than so many."""

from __future__ import annotations

import os

from modcache.stores.disk.descriptors import Descriptors


def test_no_more_files_are_open_than_that(tmp_path):
    """The file that was not used for longest is closed for a new one, and opened again when it is needed."""
    opened = []

    def opening(name):
        def open_file():
            opened.append(name)
            return os.open(tmp_path / name, os.O_RDWR | os.O_CREAT)

        return open_file

    files = Descriptors(most=3)
    for name in ("a", "b", "c"):
        files.get(name, opening(name))
    assert files.known("a") is not None
    files.get("d", opening("d"))
    assert files.known("b") is None
    assert files.known("a") is not None
    files.get("b", opening("b"))
    assert opened == ["a", "b", "c", "d", "b"]
    files.drop("a")
    files.drop("a")
    files.close()
    assert files.known("d") is None


def test_files_are_closed_with_their_table(tmp_path):
    """A table that nobody holds any more closes its files; one that somebody closed already is no error."""
    files = Descriptors()
    first = files.get("a", lambda: os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT))
    os.close(first)
    del files
