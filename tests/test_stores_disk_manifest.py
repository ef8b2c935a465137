"""Manifests are written whole, and read warily."""

import json
import os
import pickle
import stat
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modcache.stores.disk.manifest import TEMPORARY, read_manifest, write_manifest
from modcache.stores.disk.names import MANIFEST

FACTS = {"class": "Encoder", "weights": "ab" * 16, "rows": 3, "version": None, "context": {"autocast": "off"}}

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), plain, max_size=5))
def test_what_is_written_is_read(tmp_path, facts):
    """Plain facts come back as they were."""
    write_manifest(tmp_path, facts)
    assert read_manifest(tmp_path) == facts


def test_it_reads_well(tmp_path):
    """The file is indented, sorted JSON that ends in a newline, private, and alone."""
    write_manifest(tmp_path, FACTS)
    text = (tmp_path / MANIFEST).read_text()
    assert text == json.dumps(FACTS, indent=2, sort_keys=True) + "\n"
    assert stat.S_IMODE((tmp_path / MANIFEST).stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


def test_the_latest_description_counts(tmp_path):
    """A second description takes the place of the first."""
    write_manifest(tmp_path, {"rows": 1})
    write_manifest(tmp_path, {"rows": 2})
    assert read_manifest(tmp_path) == {"rows": 2}


def test_what_json_does_not_have_is_text(tmp_path):
    """Numbers that are none, keys that are no texts and objects are written so that any reader can read them."""
    write_manifest(tmp_path, {"nan": float("nan"), "inf": [float("-inf")], "set": {1}, 3: {4: {"x"}}, "o": tmp_path})
    assert read_manifest(tmp_path) == {
        "nan": "nan",
        "inf": ["-inf"],
        "set": [1],
        "3": {"4": ["x"]},
        "o": str(tmp_path),
    }


def test_a_description_has_a_bound(tmp_path):
    """Facts that nobody could read go, the longest first, and the rest stays."""
    write_manifest(tmp_path, {"long": ["x" * 100] * 80_000, "short": 1})
    assert read_manifest(tmp_path) == {"long": "too long to be told", "short": 1}


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b'{"x": NaN}',
        b'{"x": -Infinity}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"x": ' + b"9" * 100_000 + b"}",
        b" " * (5 << 20) + b"{}",
        pickle.dumps({"x": 1}),
    ],
    ids=lambda content: repr(content[:12]),
)
def test_damage_is_nothing(tmp_path, content):
    """Whatever is no description is read as none."""
    (tmp_path / MANIFEST).write_bytes(content)
    assert read_manifest(tmp_path) is None


def test_a_planted_pickle_is_not_executed(tmp_path):
    """A pickle in the manifest's place is damage."""
    (tmp_path / MANIFEST).write_bytes(pickle.dumps(Evil(tmp_path / "executed")))
    assert read_manifest(tmp_path) is None
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", ["nothing", "link", "folder", "pipe"])
def test_only_a_file_is_read(tmp_path, kind):
    """A link is not followed, a pipe is not waited for."""
    (tmp_path / "elsewhere").write_text("{}")
    if kind == "link":
        (tmp_path / MANIFEST).symlink_to(tmp_path / "elsewhere")
    elif kind == "folder":
        (tmp_path / MANIFEST).mkdir()
    elif kind == "pipe":
        os.mkfifo(tmp_path / MANIFEST)
    assert read_manifest(tmp_path) is None


def test_a_link_is_replaced_not_written_through(tmp_path):
    """Where a link lies in the manifest's place, what it points to stays as it is."""
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / MANIFEST).symlink_to(tmp_path / "elsewhere")
    write_manifest(tmp_path, FACTS)
    assert read_manifest(tmp_path) == FACTS
    assert (tmp_path / "elsewhere").read_text() == "mine"


@pytest.mark.parametrize("at_fault", ["open", "replace"])
def test_a_failed_write_leaves_the_old_one(tmp_path, monkeypatch, at_fault):
    """What raises while writing is raised, the old description stays, and no half of the new one."""
    write_manifest(tmp_path, {"rows": 1})

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"modcache.stores.disk.manifest.os.{at_fault}", fail)
    with pytest.raises(OSError, match="No space"):
        write_manifest(tmp_path, {"rows": 2})
    monkeypatch.undo()
    assert read_manifest(tmp_path) == {"rows": 1}
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


def test_readers_never_see_a_part(tmp_path):
    """While it is written again and again, a reader sees whole descriptions only."""
    write_manifest(tmp_path, {"x": ["y" * 1000] * 20})
    done = threading.Event()

    def write():
        for length in range(20, 60):
            write_manifest(tmp_path, {"x": ["y" * 1000] * length})
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = [read_manifest(tmp_path)]
    while not done.is_set():
        seen.append(read_manifest(tmp_path))
    writer.join()
    assert all(facts is not None and set(facts["x"]) == {"y" * 1000} for facts in seen)


def test_temporary_names_are_known(tmp_path, monkeypatch):
    """What a killed process leaves is recognised by its name."""
    monkeypatch.setattr("modcache.stores.disk.manifest.os.replace", lambda *_: None)
    write_manifest(tmp_path, FACTS)
    (left,) = tmp_path.iterdir()
    assert TEMPORARY.fullmatch(left.name)
    assert not TEMPORARY.fullmatch(MANIFEST)
