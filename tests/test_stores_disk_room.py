"""How much may be written: the share of a writer, what goes first, and what a directory holds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modcache.stores.disk import DiskStore
from modcache.stores.disk.directory import Directory
from modcache.stores.disk.names import folder_of
from modcache.stores.disk.room import Usage, floor_of, grant, looks_of, reserved, take_census, to_drop
from tests.contracts import VECTOR, keys, rows_of

usages = st.lists(
    st.builds(Usage, st.text("abc", min_size=1, max_size=3), st.integers(0, 100), st.floats(0, 10_000)),
    unique_by=lambda usage: usage.folder,
)
NOW = 10_000.0


@given(usages, st.integers(-5, 300), st.frozensets(st.text("abc", min_size=1, max_size=3)))
def test_what_goes(found, needed, spared):
    """Only what nobody used within the hour goes, the longest unused first, and no more than is needed."""
    dropped = to_drop(found, needed, NOW, spared)
    known = {usage.folder: usage for usage in found}
    used = [known[folder].last_used for folder in dropped]
    assert used == sorted(used)
    assert all(NOW - last > 3600 for last in used)
    assert not set(dropped) & spared
    freed = [known[folder].bytes for folder in dropped]
    assert sum(freed[:-1]) < max(needed, 1)
    stays = [u for u in found if u.folder not in {*dropped, *spared} and u.bytes and NOW - u.last_used > 3600]
    assert sum(freed) >= needed or not stays


@given(st.integers(-10, 1000), st.integers(1, 500), st.integers(0, 9))
def test_a_grant_is_within_what_is_left(left, wanted, writers):
    """A writer gets what it asked for or more if that is left, else nothing; the others find half of it."""
    granted = grant(left, wanted, writers)
    assert granted <= max(0, left)
    assert (granted >= wanted) == (wanted <= left)
    if granted > wanted:
        assert granted * 2 * max(1, writers) <= left


def test_reserved():
    """Only what live writers have not written yet of their shares is reserved."""
    assert reserved({"a": 10, "b": 50}, {"a": 25, "b": 30, "c": 7}) == 22


def test_floor():
    """The floor is a twentieth of a small file system, and a gibibyte of a large one."""
    assert floor_of(1 << 20) == (1 << 20) // 20
    assert floor_of(1 << 50) == 1 << 30


def test_census(tmp_path):
    """A census counts every file of the namespaces and of the catalogue, by namespace and by writer."""
    with DiskStore(tmp_path / "cache") as store:
        store.put("a", keys(*range(100)), rows_of(range(100)))
        store.put("b", keys(1), rows_of([1]))
    census = take_census(Directory(tmp_path / "cache"))
    parts = [path for folder in ("rows", "catalogue") for path in (tmp_path / "cache" / folder).rglob("*")]
    assert census.bytes == sum(path.stat().st_size for path in parts if path.is_file())
    assert census.folders.keys() == {folder_of("a"), folder_of("b")}
    assert census.folders[folder_of("a")].bytes > 100 * VECTOR.row_bytes
    assert sum(census.writers.values()) == sum(usage.bytes for usage in census.folders.values())
    assert census.catalogue == census.bytes - sum(census.writers.values()) > 0
    assert take_census(Directory(tmp_path / "nothing")).bytes == 0


def test_looks_move_with_the_files(tmp_path):
    """What a folder looks like moves when a file grows, comes or goes."""
    seen = [looks_of(tmp_path)]
    for act in (lambda: (tmp_path / "a").write_text("1"), lambda: (tmp_path / "a").write_text("12")):
        act()
        seen.append(looks_of(tmp_path))
    (tmp_path / "b").write_text("")
    seen.append(looks_of(tmp_path))
    assert len(set(seen)) == 4
    assert looks_of(tmp_path / "nowhere") == ()
