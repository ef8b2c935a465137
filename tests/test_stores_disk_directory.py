"""A cache directory: what is ours in it, what is not, and who is still writing."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modcache.errors import FormatVersionError, UsageError
from modcache.stores.disk.directory import Directory
from modcache.stores.disk.frames import LOG_MAGIC, ROWS_MAGIC
from modcache.stores.disk.names import SegmentName, new_writer

HEX = "0123456789abcdef0123456789abcdef"
WRITER = "0123456789abcdef"
SEGMENT = SegmentName(WRITER, 7)


@pytest.fixture
def directory(tmp_path):
    made = Directory(tmp_path / "cache")
    made.prepare("modcache test")
    return made


def put(directory, folder, name, data):
    directory.make_folder(("rows", folder))
    directory.place_of(folder).joinpath(name).write_bytes(data)


def test_names_of_a_segment(directory):
    """The files of segments are listed; other names are nobody's."""
    for name in (SEGMENT.rows, SEGMENT.log, "notes.txt", f"{WRITER}-7.log", f"x{SEGMENT.log}", f"{SEGMENT.log}~"):
        put(directory, HEX, name, b"")
    assert directory.names_in(HEX) == {SEGMENT.rows: SEGMENT, SEGMENT.log: SEGMENT}
    assert directory.segments(HEX) == [SEGMENT]
    assert directory.folders() == [HEX]
    assert directory.segments("~" + HEX) == []


def test_all_is_private(directory):
    """Folders are 0700 and files 0600, and the format is written down once."""
    for folder, _, files in os.walk(directory.path):
        assert stat.S_IMODE(Path(folder).stat().st_mode) == 0o700
        assert {stat.S_IMODE(Path(folder, name).stat().st_mode) for name in files} <= {0o600}
    assert directory.format() == 1
    directory.prepare("modcache other")
    assert "modcache test" in directory.path.joinpath("modcache.json").read_text()
    assert sorted(path.name for path in directory.path.iterdir()) == ["modcache.json", "rows", "writers"]


def test_a_directory_that_was_there_keeps_its_mode(tmp_path):
    """A directory of the user is used as it is."""
    tmp_path.chmod(0o755)
    Directory(tmp_path).prepare("modcache test")
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_a_newer_format_is_refused(directory):
    """A directory of a newer format raises, with both numbers and what to do."""
    directory.check()
    directory.path.joinpath("modcache.json").write_text('{"format": 2}')
    with pytest.raises(FormatVersionError, match=r"has format 2, and this modcache knows format 1\. Update modcache"):
        directory.check()


@pytest.mark.parametrize("text", ["", "[]", '{"format": "2"}', '{"format": true}', "\xff", "[" * 60_000])
def test_a_damaged_format_file_says_nothing(directory, text):
    """Where the format cannot be read, the segments speak for themselves."""
    directory.path.joinpath("modcache.json").write_text(text, encoding="latin-1")
    assert directory.format() is None
    directory.check()


def test_a_file_is_no_directory(tmp_path):
    """A path that is a file is refused, saying so."""
    tmp_path.joinpath("file").write_text("text")
    with pytest.raises(UsageError, match="is a file"):
        Directory(tmp_path / "file").check()
    with pytest.raises(OSError, match="ot a directory"):
        Directory(tmp_path / "file").prepare("modcache test")


def test_a_directory_that_is_not_there(tmp_path):
    """A directory that does not exist lists as empty, and is not made by looking."""
    directory = Directory(tmp_path / "none" / "here")
    directory.check()
    assert directory.folders() == directory.writers() == directory.segments(HEX) == []
    assert not directory.remove_segment(HEX, SEGMENT)
    assert list(tmp_path.iterdir()) == []
    directory.prepare("modcache test")
    assert directory.format() == 1


def test_links_are_not_followed(directory, tmp_path):
    """Neither a linked file, nor a linked folder is opened, listed or removed."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    elsewhere.joinpath(SEGMENT.log).write_bytes(LOG_MAGIC + b"precious" * 10)
    directory.path.joinpath("rows", HEX).symlink_to(elsewhere)
    assert directory.names_in(HEX) == {}
    with pytest.raises(OSError, match=HEX):
        directory.open_segment(HEX, SEGMENT.log)
    with pytest.raises(OSError, match="something else"):
        directory.make_folder(("rows", HEX))
    assert directory.remove_segment(HEX, SEGMENT) == 0
    other = "~" + HEX
    directory.make_folder(("rows", other))
    directory.place_of(other).joinpath(SEGMENT.log).symlink_to(elsewhere / SEGMENT.log)
    with pytest.raises(OSError, match=SEGMENT.log):
        directory.open_segment(other, SEGMENT.log)
    assert directory.remove_segment(other, SEGMENT) == 0
    assert elsewhere.joinpath(SEGMENT.log).exists()
    assert not directory.remove_folder(other)


@pytest.mark.parametrize("linked", ["rows", "folder"])
def test_a_linked_folder_is_no_folder(directory, tmp_path, linked):
    """A link in the place of a namespace's folder, or of all of them, is not listed, and what it names stays."""
    elsewhere = tmp_path / "elsewhere"
    inner = elsewhere / HEX if linked == "rows" else elsewhere
    inner.mkdir(parents=True)
    inner.joinpath("manifest.json").write_text("{}")
    place = directory.path / "rows"
    if linked == "rows":
        place.rmdir()
    else:
        place /= HEX
    place.symlink_to(elsewhere)
    assert directory.folders() == []
    assert not directory.remove_folder(HEX)
    assert inner.joinpath("manifest.json").exists()


def test_a_pipe_is_not_waited_for(directory):
    """A pipe or a folder in a segment's place is an error at once."""
    directory.make_folder(("rows", HEX))
    os.mkfifo(directory.place_of(HEX) / SEGMENT.log)
    directory.place_of(HEX).joinpath(SEGMENT.rows).mkdir()
    for name in (SEGMENT.log, SEGMENT.rows):
        with pytest.raises(OSError, match="not a regular file"):
            directory.open_segment(HEX, name)
    assert directory.remove_segment(HEX, SEGMENT) == 0


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder", "link to itself"])
def test_what_is_no_file_is_not_ours(directory, kind, tmp_path, monkeypatch):
    """Whatever is no regular file is refused in one way, stays, and keeps nothing else from being removed."""
    put(directory, HEX, SEGMENT.log, LOG_MAGIC + bytes(100))
    first = SegmentName(WRITER, 0)
    place = directory.place_of(HEX) / first.log
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "socket":
        monkeypatch.chdir(place.parent)  # a socket's path may be no longer than a hundred bytes
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(place.name)
    elif kind == "device":
        try:
            os.mknod(place, stat.S_IFCHR | 0o600, os.makedev(1, 5))
        except PermissionError:
            pytest.skip("only root makes devices")
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to(place.name)
    with pytest.raises(OSError, match=r".") as caught:
        directory.open_segment(HEX, first.log)
    assert caught.value.errno == (errno.ELOOP if kind == "link to itself" else errno.EINVAL)
    assert directory.remove_segment(HEX, first) == 0
    directory.remove_segments(HEX)
    assert os.path.lexists(place)
    assert not (directory.place_of(HEX) / SEGMENT.log).exists()


def test_one_file_that_stays_keeps_no_other(directory, monkeypatch):
    """All segments that can be removed are, before the one that cannot is heard of."""
    stays = SegmentName(WRITER, 0)
    for segment in (stays, SEGMENT):
        put(directory, HEX, segment.log, LOG_MAGIC + bytes(100))
    unlink = os.unlink

    def busy(path, **options):
        if Path(path).name == stays.log:
            raise OSError(errno.EBUSY, "busy", path)
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", busy)
    with pytest.raises(OSError, match="busy"):
        directory.remove_segments(HEX)
    assert set(directory.names_in(HEX)) == {stays.log}


def test_only_ours_is_removed(directory):
    """Files of our name and beginning go, and torn ones; a file with other content stays, and so its folder."""
    put(directory, HEX, SEGMENT.log, LOG_MAGIC + bytes(100))
    put(directory, HEX, SEGMENT.rows, b"my own table of rows, which is longer than any head of a rows file would be")
    assert directory.remove_segment(HEX, SEGMENT) == 108
    assert [path.name for path in directory.place_of(HEX).iterdir()] == [SEGMENT.rows]
    put(directory, HEX, "manifest.json", b"{}")
    assert not directory.remove_folder(HEX)
    put(directory, HEX, SEGMENT.rows, b"torn")
    assert directory.remove_segment(HEX, SEGMENT) == 4
    put(directory, HEX, SEGMENT.rows, ROWS_MAGIC + bytes(100))
    assert directory.remove_segment(HEX, SEGMENT) == 108
    assert directory.remove_folder(HEX)
    assert directory.folders() == []


def test_writers_live_as_long_as_they_hold_their_file(directory):
    """A writer lives until it signs out or its descriptor is closed, for readers in any process."""
    writer = new_writer()
    assert not directory.is_alive(writer)
    file = directory.sign_in(writer)
    assert directory.writers() == [writer]
    assert directory.is_alive(writer)
    os.close(file)
    assert not directory.is_alive(writer)
    assert directory.writers() == [writer]
    directory.forget_writer(writer)
    file = directory.sign_in(writer)
    directory.sign_out(writer, file)
    assert directory.writers() == []


HOLD = """
import sys, time
from modcache.stores.disk.directory import Directory
file = Directory(sys.argv[1]).sign_in(sys.argv[2])
print("signed in", flush=True)
time.sleep(60)
"""


def test_a_killed_writer_is_dead(directory):
    """A process that is killed signs out without a word."""
    command = [sys.executable, "-c", HOLD, str(directory.path), WRITER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        assert directory.is_alive(WRITER)
        process.kill()
        process.wait()
    assert not directory.is_alive(WRITER)


def test_signing_in_is_never_lost(directory):
    """A writer whose file is taken for dead before it is locked makes another one."""
    started = time.monotonic()
    real, removed = Directory.open, []

    def open_and_lose(self, parts, name, flags=os.O_RDONLY):
        file = real(self, parts, name, flags)
        if len(removed) < 3:
            removed.append(name)
            self.forget_writer(name)
        return file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Directory, "open", open_and_lose)
        file = directory.sign_in(WRITER)
    assert directory.is_alive(WRITER)
    os.close(file)
    assert len(removed) == 3
    assert time.monotonic() - started < 60
