"""The reader that the documentation shows, which knows nothing of modcache, reads what stores read."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modcache.stores.disk.directory import Directory
from modcache.stores.disk.names import folder_of
from tests.segments import content_of, key_of, plant, value_of

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "record-format.md"
NS = "a name / of any kind"

commit = st.dictionaries(st.integers(0, 7), st.integers(0, 3), min_size=1, max_size=4) | st.lists(
    st.integers(0, 7), min_size=1, max_size=4, unique=True
)


@pytest.fixture(scope="module")
def read_namespace():
    code = re.search(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[1]
    assert "modcache" not in re.sub("(?m)#.*$", "", code).replace(r"\x89mcrows", "")
    found = {}
    exec(compile(code, str(PAGE), "exec"), found)
    return found["read_namespace"]


@given(history=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), commit), min_size=1, max_size=10))
def test_a_stranger_reads_what_a_store_reads(tmp_path_factory, read_namespace, history):
    """Whatever several writers committed, overwrote and dropped: both read the same rows."""
    cache, segments = tmp_path_factory.mktemp("any") / "cache", {}
    for stamp, (writer, number, what) in enumerate(history, start=1):
        segments.setdefault((writer, number), []).append((stamp, what))
    for (writer, number), commits in segments.items():
        plant(cache, NS, commits, writer=f"{writer:016x}", number=number, tail=b"torn")
    found = read_namespace(Directory(cache).place_of(folder_of(NS)))
    assert found == {key_of(number): row for number, row in content_of(cache, NS, range(8)).items()}


@given(place=st.integers(0, 1 << 20), flip=st.integers(1, 255), which=st.sampled_from([".rows", ".log"]))
def test_no_flipped_byte_makes_a_wrong_row(tmp_path_factory, read_namespace, place, flip, which):
    """Behind the heads, a byte that differs costs rows, and never changes one; for a stranger and for a store."""
    cache = tmp_path_factory.mktemp("flipped") / "cache"
    name = plant(cache, NS, [(1, {1: 0, 2: 0}), (2, {3: 0}), (3, {4: 0})])
    folder = Directory(cache).place_of(folder_of(NS))
    path = folder / name.rows.replace(".rows", which)
    content = bytearray(path.read_bytes())
    begin = 64 if which == ".rows" else content.index(b"MCFM")
    content[begin + place % (len(content) - begin)] ^= flip
    path.write_bytes(content)
    found = read_namespace(folder)
    assert found.items() <= {key_of(number): value_of(number) for number in range(5)}.items()
    assert len(found) < 4
    assert found == {key_of(number): row for number, row in content_of_quietly(cache).items()}


def content_of_quietly(cache):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a store tells that there is damage
        return content_of(cache, NS, range(8))


def test_the_page_is_about_this_format(tmp_path):
    """The numbers and names of the page are those of a directory."""
    text = PAGE.read_text(encoding="utf-8")
    plant(tmp_path, NS, [(1, {1: 0})])
    directory = Directory(tmp_path)
    assert directory.format() == 1
    folder = directory.place_of(folder_of(NS))
    for path in folder.iterdir():
        assert " ".join(f"{byte:02x}" for byte in path.read_bytes()[:8]) in text
    assert sorted(os.listdir(tmp_path)) == ["modcache.json", "rows", "writers"]
    assert all(f"  {name}" in text for name in os.listdir(tmp_path))
