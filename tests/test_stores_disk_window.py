"""The grid that the rows of several segments lie on: numbered once, mapped as one matrix, never beyond a file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modcache.stores.disk import window
from modcache.stores.disk.window import ROW_BITS, Grid

HEAD = 64


def write(path, number, row_bytes, count):
    """A file with a head and rows; each row says its segment and its number."""
    rows = np.zeros((count, row_bytes), np.uint8)
    if row_bytes:
        rows[:] = np.arange(count)[:, None] % 251
        rows[:, 0] = number + 1
    path.write_bytes(bytes(HEAD) + rows.tobytes())
    return rows


def take(grid, number, rows):
    return grid.rows.take((number << ROW_BITS | np.asarray(rows, np.int64)) + grid.shifts[number], axis=0)


growth = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 400) | st.just(64)), min_size=1, max_size=12)


@given(growth, st.sampled_from([1, 3, 12, 64, 4096, 5000]))
def test_every_row_has_a_place_of_its_own(tmp_path_factory, steps, row_bytes):
    """However segments grow, sums stay with their rows, and mapped rows are those of the files."""
    folder = tmp_path_factory.mktemp("grid")
    grid, sizes, wholes = Grid(row_bytes, mapped=True), {}, {}
    for number, more in steps:
        before = sizes.get(number, 0)
        sizes[number] = before + more
        start = grid.fit(number, sizes[number])
        assert grid.shifts[number] + (number << ROW_BITS) == start
        grid.sums[start + before : start + sizes[number]] = np.arange(before, sizes[number]) + number * 100_000
        grid.checked[start + before] = True
        wholes[number] = write(folder / str(number), number, row_bytes, sizes[number])
        file = os.open(folder / str(number), os.O_RDONLY)
        try:
            assert grid.map(number, sizes[number], file)
        finally:
            os.close(file)
        for other, whole in wholes.items():
            mapped = grid.mapped_rows(other)
            assert (take(grid, other, range(mapped)) == whole[:mapped]).all(), "one segment lies over another"
    for number, count in sizes.items():
        start = grid.fit(number, count)
        assert (grid.sums[start : start + count] == np.arange(count) + number * 100_000).all()
        assert grid.checked[start]


def test_a_slot_that_moves_is_mapped_anew(tmp_path):
    """After a growth that moved a segment, its rows count as not mapped until they are."""
    grid = Grid(12, mapped=True)
    write(tmp_path / "0", 0, 12, 300)
    with (tmp_path / "0").open("rb") as file:
        grid.fit(0, 300)
        assert grid.map(0, 300, file.fileno())
        assert grid.mapped_rows(0) == 300
        grid.fit(1, 100_000)
        assert grid.mapped_rows(0) == 0
        assert grid.map(0, 300, file.fileno())
        assert take(grid, 0, [299])[0, 0] == 1


def test_a_dropped_segment_is_mapped_no_more(tmp_path):
    """The file of a segment that was dropped is let go, so that its disk space comes back."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("reads /proc")
    grid = Grid(4096, mapped=True)
    for number in (0, 1):
        write(tmp_path / f"rows-{number}", number, 4096, 10)
        with (tmp_path / f"rows-{number}").open("rb") as file:
            grid.fit(number, 10)
            assert grid.map(number, 10, file.fileno())
    assert str(tmp_path / "rows-0") in maps.read_text()
    grid.drop(0)
    assert str(tmp_path / "rows-0") not in maps.read_text()
    assert take(grid, 1, [3])[0, 0] == 2
    del grid
    assert str(tmp_path) not in maps.read_text()


@pytest.mark.parametrize("mapped", [True, False])
def test_rows_without_a_byte(mapped):
    """Rows of no bytes have places and sums, and are never mapped."""
    grid = Grid(0, mapped=mapped)
    assert grid.fit(0, 1000) != grid.fit(1, 1000)
    assert not grid.mapped


def test_without_addresses(monkeypatch, tmp_path):
    """Where the system gives no range of addresses, the rows are not mapped, and nothing else changes."""
    monkeypatch.setattr(window._Range, "of", classmethod(lambda cls, size: None))
    grid = Grid(12, mapped=True)
    write(tmp_path / "0", 0, 12, 3)
    grid.fit(0, 3)
    with (tmp_path / "0").open("rb") as file:
        assert not grid.map(0, 3, file.fileno())
    assert not grid.mapped


def test_a_file_that_cannot_be_mapped():
    """A descriptor that the system does not map is a reason to read instead."""
    grid = Grid(12, mapped=True)
    grid.fit(0, 3)
    assert not grid.map(0, 3, -1)
    assert not grid.mapped


def test_nothing_is_mapped_over_what_is_not_ours():
    """A part that is not all within the range is refused."""
    space = window._Range.of(1 << 16)
    assert not space.map(1 << 15, 1 << 16, 0, 0)
