"""A path is named by what the file holds, by what the file system says of it, or by its name."""

import os
import pathlib

import numpy as np
import pytest
import torch
from torch import nn

from modcache import CacheWarning, cache_of, cached_module, keys
from modcache.keys import files, inside
from modcache.keys.files import CHECKS, path_key
from modcache.keys.inside import files_key


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch):
    monkeypatch.setattr(files, "_digests", {})


def write(path, content, age=10.0):
    """A file that was written some seconds ago."""
    path.write_bytes(content)
    if age:
        settle(path, age)
    return path


def settle(path, age=10.0):
    """Make the clock think that a file is old; the time of its last change cannot be set back."""
    stat = os.stat(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns - int(age * 1e9)))


@pytest.fixture
def later(monkeypatch):
    """An hour from now, so that every file is old enough to be remembered."""
    now = files.time.time()
    monkeypatch.setattr(files.time, "time", lambda: now + 3600)


@pytest.fixture
def exploding(monkeypatch):
    """After `exploding()`, opening a file raises."""

    def explode(*_, **__):
        raise AssertionError("a file was opened")

    return lambda: monkeypatch.setattr(files, "open", explode, raising=False)


def test_content_is_what_the_file_holds(tmp_path):
    """Equal content is an equal key under any name; other content is another."""
    a, b, c = write(tmp_path / "a", b"same"), write(tmp_path / "b", b"same"), write(tmp_path / "c", b"other")
    assert path_key(a, "content") == path_key(b, "content")
    assert path_key(a, "content") != path_key(c, "content")


def test_ways_of_writing_a_path(tmp_path, monkeypatch):
    """A text, bytes, a Path and a relative path are one file; by name they are what was written."""
    file = write(tmp_path / "a", b"x")
    monkeypatch.chdir(tmp_path)
    for check in ("content", "stat"):
        written = [str(file), os.fspath(file), file, pathlib.Path("a"), "a"]
        assert len({path_key(path, check) for path in written}) == 1
    assert path_key(os.fsencode(file), "content") == path_key(file, "content")
    assert path_key("a", "name") != path_key(str(file), "name")
    assert path_key(file, "name") == path_key(str(file), "name")


def test_kinds_of_keys_are_apart(tmp_path):
    """The same file has three different keys by content, stat and name."""
    file = write(tmp_path / "a", b"x")
    assert len({path_key(file, check) for check in CHECKS}) == 3


@pytest.mark.usefixtures("later")
def test_an_unchanged_file_is_not_read_again(tmp_path, exploding):
    """Once a settled file was digested, it is not opened any more in this process."""
    file = write(tmp_path / "a", b"x")
    before = path_key(file, "content")
    exploding()
    assert path_key(file, "content") == before
    link = tmp_path / "link"
    link.symlink_to(file)
    assert path_key(link, "content") == before
    file.rename(tmp_path / "moved")
    with pytest.raises(AssertionError, match="a file was opened"):
        path_key(write(tmp_path / "b", b"x"), "content")


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("content", [b"yyyy", b"longer than before"], ids=["same size", "other size"])
def test_a_changed_file_is_read_again(tmp_path, content):
    """Other content in the same file is seen, also when size and modification time were put back."""
    file = write(tmp_path / "a", b"xxxx")
    before, stat = path_key(file, "content"), os.stat(file)
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path_key(file, "content") != before
    file.write_bytes(b"xxxx")
    assert path_key(file, "content") == before


def test_an_edit_within_the_same_time_stamp_is_seen(tmp_path, monkeypatch):
    """A file younger than two seconds is read each time, for its time stamp may not tell an edit."""
    frozen = os.stat_result
    file = write(tmp_path / "a", b"one", age=0)
    stamp = files._stamp(os.stat(file))
    monkeypatch.setattr(files, "_stamp", lambda _: stamp)
    before = path_key(file, "content")
    file.write_bytes(b"two")
    assert path_key(file, "content") != before
    assert files._digests == {}
    assert frozen is os.stat_result


@pytest.mark.usefixtures("later")
def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path, monkeypatch):
    """A digest whose file was another one afterwards holds for this call only."""
    file = write(tmp_path / "a", b"x")
    stamps = iter([(0,) * 5, (1,) * 5, (2,) * 5])
    monkeypatch.setattr(files, "_stamp", lambda _: next(stamps))
    path_key(file, "content")
    assert files._digests == {}


@pytest.mark.usefixtures("later")
def test_memory_of_digests_is_bounded(tmp_path, monkeypatch):
    """When too many files are remembered, all are forgotten, and read again."""
    monkeypatch.setattr(files, "_REMEMBERED", 2)
    written = [write(tmp_path / name, name.encode()) for name in "abc"]
    found = [path_key(file, "content") for file in written]
    assert len(files._digests) == 1
    assert [path_key(file, "content") for file in written] == found


def test_large_files_are_read_in_pieces(tmp_path, monkeypatch):
    """A file is one digest, however many pieces it was read in."""
    file = write(tmp_path / "a", bytes(range(256)))
    whole = path_key(file, "content")
    monkeypatch.setattr(files, "_CHUNK", 7)
    assert path_key(file, "content") == whole


def test_stat_tells_edits_renames_and_links(tmp_path):
    """By stat, an edit and a rename make another key; the content is not looked at."""
    file = write(tmp_path / "a", b"x")
    before = path_key(file, "stat")
    assert path_key(file, "stat") == before
    settle(file)
    touched = path_key(file, "stat")
    assert touched != before
    file.rename(tmp_path / "b")
    assert path_key(tmp_path / "b", "stat") not in (before, touched)


def test_name_looks_at_no_file():
    """By name, a file need not exist."""
    assert path_key("not there", "name") == path_key(pathlib.Path("not there"), "name")
    assert path_key("not there", "name") != path_key("nor there", "name")


@pytest.mark.parametrize("check", ["content", "stat"])
def test_a_missing_file_raises_what_opening_it_would(tmp_path, check):
    """A missing file is a `FileNotFoundError` that names it, before and after it was there."""
    file = tmp_path / "missing"
    with pytest.raises(FileNotFoundError) as found:
        path_key(file, check)
    assert found.value.filename == str(file) or found.value.filename == file
    write(file, b"x")
    path_key(file, check)
    file.unlink()
    with pytest.raises(FileNotFoundError):
        path_key(file, check)


def test_a_directory_raises_what_opening_it_would(tmp_path):
    """A directory has no content."""
    with pytest.raises(IsADirectoryError):
        path_key(tmp_path, "content")


class Sizes(nn.Module):
    """The sizes of files; runs on paths."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, paths):
        return torch.tensor([[float(len(pathlib.Path(path).read_bytes()))] for path in paths]) * self.scale


@pytest.mark.parametrize("key", ["path", keys.path("stat")], ids=["content", "stat"])
def test_a_cached_module_on_paths(tmp_path, key):
    """Rows are served while the file is the same, computed after an edit, and a missing file raises."""
    module = cached_module(Sizes(), freeze=True, key=key)
    paths = [str(write(tmp_path / name, b"x" * size)) for size, name in enumerate("abc")]
    for _ in range(2):
        assert module(paths).flatten().tolist() == [0.0, 1.0, 2.0]
    write(tmp_path / "b", b"longer")
    assert module(paths).flatten().tolist() == [0.0, 6.0, 2.0]
    assert cache_of(module).stats.computed == 4
    with pytest.raises(FileNotFoundError):
        module([*paths, str(tmp_path / "missing")])


class Contents(nn.Module):
    """The length and first byte of the file of each row, which a change of the file changes."""

    def forward(self, rows, other=None):
        paths = [row["p"] if isinstance(row, dict) else other for row in rows]
        held = [path.read_bytes() if path.is_file() else b"-" for path in paths]
        return torch.tensor([[float(len(content)), float(content[0])] for content in held])


FORMS_OF_PATHS = {
    "in a mapping": lambda file: ([{"p": file, "i": 1}, {"p": file, "i": 2}],),
    "shared": lambda file: (torch.eye(2), file),
    "shared, keys given": lambda file: (torch.eye(2), file),
}


@pytest.mark.parametrize("form", FORMS_OF_PATHS)
@pytest.mark.parametrize("per_row", [True, False])
def test_an_edited_file_is_never_served_stale(form, per_row, tmp_path):
    """A path inside a row, or one that all rows share, counts by the content of its file."""
    file = tmp_path / "a"
    plain, cached = Contents(), cached_module(Contents(), freeze=True, per_row=per_row)
    given = {"cache_keys": [1, 2] if per_row else [1]} if "given" in form else {}
    for content in (b"first", b"second, longer", b"first"):
        file.write_bytes(content)
        args = FORMS_OF_PATHS[form](file)
        assert torch.equal(cached(*args, **given), plain(*args))
    assert cache_of(cached).stats.bypassed == 0
    assert cache_of(cached).stats.hits == (2 if per_row else 1)


def test_a_missing_file_inside_a_row(tmp_path):
    """A file that is not there raises what opening it would, where its path is inside of a row."""
    args = FORMS_OF_PATHS["in a mapping"](tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="gone"):
        cached_module(Contents(), freeze=True)(*args)


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("given", [False, True])
def test_a_shared_path_that_cannot_be_read(per_row, given, tmp_path):
    """A path that all rows share may be where something is to be written: the call runs uncached, and says so."""
    file = tmp_path / "not yet" / "there"
    plain, cached = Contents(), cached_module(Contents(), freeze=True, per_row=per_row)
    keys_of_rows = {"cache_keys": [1, 2] if per_row else [1]} if given else {}
    with pytest.warns(CacheWarning, match="names a file that cannot be read .*not yet"):
        assert torch.equal(cached(torch.eye(2), file, **keys_of_rows), plain(torch.eye(2), file))
    file.parent.mkdir()
    file.write_bytes(b"now")
    for _ in range(2):
        assert torch.equal(cached(torch.eye(2), file, **keys_of_rows), plain(torch.eye(2), file))
    assert cache_of(cached).stats.hits == (2 if per_row else 1)


def test_a_directory_as_a_shared_argument(tmp_path):
    """A directory has no content, so such a call runs uncached, and says so."""
    cached = cached_module(Contents(), freeze=True)
    with pytest.warns(CacheWarning, match="is a directory, which has no content"):
        cached(torch.zeros(2, 1), tmp_path)
    assert cache_of(cached).stats.reasons == {"no key": 2}


class Readings(nn.Module):
    """The sizes of all files that are named anywhere in a row, and how long the other texts in it are."""

    def forward(self, rows, *others):
        return torch.tensor([[float(sum(map(size_of, (row, *others))))] for row in listed(rows)])


def listed(rows):
    return [rows] if isinstance(rows, str | bytes | pathlib.Path) else rows


def size_of(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | np.ndarray):
        return sum(map(size_of, value))
    if value is None or isinstance(value, int):
        return 1000
    return len(pathlib.Path(os.fsdecode(value)).read_bytes()) if os.path.isfile(value) else len(value) * 10_000


INSIDE = {
    "none": lambda file: [file, None],
    "pair": lambda file: [(file, 1), (file, 2)],
    "mapping": lambda file: [{"image": file, "caption": "a cat"}, {"image": file, "caption": "a crocodile"}],
    "deep": lambda file: [{"views": [file, {"other": (file,)}]}],
    "path": lambda file: [(pathlib.Path(file), "a caption")],
    "bytes": lambda file: [os.fsencode(file), None],
    "array": lambda file: np.array([file, file]),
    "objects": lambda file: np.array([file, None], dtype=object),
}


@pytest.mark.parametrize("check", ["content", "stat"])
@pytest.mark.parametrize("kind", INSIDE)
def test_paths_beside_or_inside_of_something_else(kind, check, tmp_path):
    """A path counts by its file also where not every row is one, or where it is inside of a row."""
    file = str(tmp_path / "a")
    plain, cached = Readings(), cached_module(Readings(), freeze=True, key=keys.path(check))
    for content in (b"one", b"and two", b"and this is three"):
        pathlib.Path(file).write_bytes(content)
        for _ in range(2):
            assert torch.equal(cached(INSIDE[kind](file)), plain(INSIDE[kind](file)))
    rows = len(INSIDE[kind](file))
    assert cache_of(cached).stats.hits >= rows * 3
    assert cache_of(cached).stats.bypassed == 0


def test_texts_inside_of_rows_count_by_themselves(tmp_path):
    """Two rows that name one file and differ in another text are two rows; a text need not be a path at all."""
    file = str(write(tmp_path / "a", b"x"))
    rows = [(file, "a caption"), (file, "b caption"), (file, "nul\0"), (file, "x" * 5000), (file, str(tmp_path))]
    for check in CHECKS:
        cached = cached_module(Readings(), freeze=True, key=keys.path(check))
        cached(rows)
        assert cache_of(cached).stats.computed == len(rows)


def test_a_file_inside_of_a_row_that_vanishes_just_then(tmp_path, monkeypatch):
    """A text counts as one that is no path, if its file goes between the look for it and the reading of it."""
    path = tmp_path / "a"
    row = (str(path), 1)
    without = files_key(row, "content")
    write(path, b"content")
    assert files_key(row, "content") != without

    def gone(*_):
        raise FileNotFoundError(path)

    monkeypatch.setattr(inside, "path_key", gone)
    assert files_key(row, "content") == without


def test_by_name_no_file_is_looked_at(exploding):
    """check="name" trusts what is written, also inside of rows."""
    exploding()
    cached = cached_module(Fixed(), freeze=True, key=keys.path("name"))
    cached([("a", "b"), ("a", "c")])
    cached([("a", "c"), ("a", "b")])
    assert cache_of(cached).stats.hits == 2


class Fixed(nn.Module):
    """A number for each row."""

    def forward(self, rows):
        return torch.ones(len(rows), 1)


def test_a_bare_path_beside_another_text(tmp_path):
    """The first bare text is the path; what follows it is an option, which may be the path of another file."""
    file, other = (str(write(tmp_path / name, b"x")) for name in "ab")
    plain, cached = Readings(), cached_module(Readings(), freeze=True, key="path")
    for second in ("rgb", "gray", other, other):
        assert torch.equal(cached(file, second), plain(file, second))
    assert cache_of(cached).stats.hits == 1
    write(pathlib.Path(other), b"longer")
    assert torch.equal(cached(file, other), plain(file, other))
    write(pathlib.Path(file), b"longer still")
    assert torch.equal(cached(file, "rgb"), plain(file, "rgb"))
    with pytest.raises(FileNotFoundError):
        cached(str(tmp_path / "missing"), "rgb")


def test_whole_calls_by_path(tmp_path):
    """With per_row=False the files that are named count as they do in rows."""
    file, other = (str(write(tmp_path / name, b"x")) for name in "ab")
    plain, cached = Readings(), cached_module(Readings(), freeze=True, key="path", per_row=False)
    calls = [(file, "rgb"), (file, other), ([file, other],), ([(file, "caption")], other)]
    for content in (b"one", b"and two"):
        for written in (file, other):
            pathlib.Path(written).write_bytes(content + content[: written == other])
            for args in calls * 2:
                assert torch.equal(cached(*args), plain(*args))
    assert cache_of(cached).stats.hits > len(calls) * 4
    with pytest.raises(FileNotFoundError):
        cached(str(tmp_path / "missing"), "rgb")


def test_directories_in_a_list(tmp_path):
    """A list of directories has no content, so such a call runs uncached, and says so."""
    cached = cached_module(Fixed(), freeze=True)
    with pytest.warns(CacheWarning, match="is a directory, which has no content"):
        cached([tmp_path, tmp_path])
    assert cache_of(cached).stats.reasons == {"no key": 2}


def test_pipes_are_not_read(tmp_path):
    """What is read of a pipe is gone, or may never come: it is left to the module, and the call runs uncached."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for key in (None, "path"):
        cached = cached_module(Fixed(), freeze=True, key=key)
        with pytest.warns(CacheWarning, match="is a pipe or a device, which has no content"):
            cached([pipe, pipe])
        assert cache_of(cached).stats.reasons == {"no key": 2}
