"""The catalogue remembers last uses, is never worth an error, and executes nothing."""

import os
import pickle
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time

import diskcache
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modcache.stores.disk.catalogue import BESIDE, FILE, MARK, Catalogue, Entry
from modcache.stores.disk.settings import COUNTS, SCHEMA, SETTINGS
from modcache.stores.disk.texts import TextCache

ENTRY = Entry(1_700_000_000.25, 3, 4096)
OTHER = Entry(1_600_000_000.0, 0, 0)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "catalogue"


@pytest.fixture
def filled(folder):
    Catalogue(folder, writable=True).rebuild({"one": ENTRY, "two": OTHER})
    return folder


class Evil:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def sql(folder, statement, *values):
    """Something that a stranger does to the file."""
    connection = sqlite3.connect(folder / FILE)
    with connection:
        connection.execute(statement, values)
    connection.close()


# --- what it is for -------------------------------------------------------------------------------------


def test_what_is_noted_is_found(folder):
    """Another catalogue on the folder finds what was noted, the latest note of a namespace only."""
    mine = Catalogue(folder, writable=True)
    mine.note("ns", OTHER)
    mine.note("ns", ENTRY)
    mine.note("another, with spaces/and ünïcode", OTHER)
    theirs = Catalogue(folder, writable=True)
    assert theirs.entries() == {"ns": ENTRY, "another, with spaces/and ünïcode": OTHER} == mine.entries()
    assert not theirs.damaged


def test_what_is_forgotten_is_gone(filled):
    """A namespace that is forgotten has no entry; one that is unknown changes nothing."""
    catalogue = Catalogue(filled, writable=True)
    catalogue.forget("one")
    catalogue.forget("one")
    catalogue.forget("unknown")
    assert catalogue.entries() == {"two": OTHER}


def test_rebuilding_replaces_everything(filled):
    """After a rebuild there is what it was given, and nothing of before."""
    Catalogue(filled, writable=True).rebuild({"three": ENTRY})
    assert Catalogue(filled, writable=True).entries() == {"three": ENTRY}


def test_a_missing_catalogue_is_due_for_a_rebuild(folder):
    """Missing counts as damaged, asking makes nothing, and a rebuild mends it."""
    catalogue = Catalogue(folder, writable=True)
    assert catalogue.damaged
    assert catalogue.entries() == {}
    assert not folder.exists()
    catalogue.rebuild({})
    assert not catalogue.damaged


def test_files_are_private(filled):
    """The folder and its files are the user's own, whatever the umask."""
    assert stat.S_IMODE(filled.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in filled.iterdir()} == {0o600}
    assert {path.name for path in filled.iterdir()} == {FILE, MARK}


def test_a_closed_catalogue_writes_nothing(filled):
    """Closing twice is fine, and a note afterwards is not taken."""
    catalogue = Catalogue(filled, writable=True)
    catalogue.close()
    catalogue.close()
    catalogue.note("three", ENTRY)
    assert Catalogue(filled, writable=True).entries() == {"one": ENTRY, "two": OTHER}


@given(st.dictionaries(st.text(max_size=20), st.tuples(st.floats(0, 1e12), st.integers(0, 1 << 61)), max_size=8))
def test_any_text_is_a_namespace(tmp_path_factory, wanted):
    """Entries come back as they were, under any text that UTF-8 can write."""
    folder = tmp_path_factory.mktemp("any") / "catalogue"
    entries = {name: Entry(when, count, count) for name, (when, count) in wanted.items() if "\0" not in name}
    Catalogue(folder, writable=True).rebuild(entries)
    assert Catalogue(folder, writable=True).entries() == entries


def test_a_text_that_cannot_be_written_is_not_an_error(filled):
    """A lone surrogate has no UTF-8: the note is lost, and nothing else."""
    catalogue = Catalogue(filled, writable=True)
    catalogue.note("\ud800", ENTRY)
    assert catalogue.entries() == {"one": ENTRY, "two": OTHER}


def test_several_processes_note_at_once(folder):
    """What four processes note at the same time is all there, once each that gave way to another has tried again."""
    code = (
        "import sys; from pathlib import Path; from modcache.stores.disk.catalogue import Catalogue, Entry\n"
        "catalogue = Catalogue(Path(sys.argv[1]), writable=True)\n"
        "for i in range(20):\n"
        "    while f'{sys.argv[2]}-{i}' not in catalogue.entries():\n"
        "        catalogue.note(f'{sys.argv[2]}-{i}', Entry(float(i), i, i))\n"
    )
    Catalogue(folder, writable=True).rebuild({})
    running = [subprocess.Popen([sys.executable, "-c", code, str(folder), str(n)]) for n in range(4)]
    assert [process.wait() for process in running] == [0] * 4
    assert len(Catalogue(folder, writable=True).entries()) == 80


def test_the_settings_are_those_of_the_file(filled):
    """Nothing that diskcache makes goes unnoticed: its schema and settings are the ones that are checked for."""
    connection = sqlite3.connect(filled / FILE)
    assert set(connection.execute("SELECT type, name FROM sqlite_master")) == SCHEMA
    settings = dict(connection.execute("SELECT key, value FROM Settings"))
    connection.close()
    assert settings.keys() == {*SETTINGS, *COUNTS}
    assert SETTINGS["eviction_policy"] == "none"
    assert SETTINGS["cull_limit"] == SETTINGS["sqlite_mmap_size"] == SETTINGS["statistics"] == 0
    assert SETTINGS["sqlite_journal_mode"] != "wal"


def test_reading_a_catalogue_needs_no_diskcache(filled):
    """Neither asking nor a read-only catalogue imports diskcache."""
    code = (
        "import sys; from pathlib import Path; from modcache.stores.disk.catalogue import Catalogue\n"
        "catalogue = Catalogue(Path(sys.argv[1]), writable=True)\n"
        "assert 'sqlite3' not in sys.modules\n"
        "assert len(catalogue.entries()) == 2 and not catalogue.damaged\n"
        "assert 'diskcache' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(filled)], check=True)


# --- nothing is executed --------------------------------------------------------------------------------


def planted_rows(path):
    """Rows that a stranger writes: as diskcache would, and as it would not."""
    evil = pickle.dumps(Evil(path))
    insert = "INSERT OR REPLACE INTO Cache(key, raw, mode, filename, value) VALUES (?, ?, ?, ?, ?)"
    file = path.parent / "value"
    file.write_bytes(evil)
    return [
        (insert, "one", 1, 4, None, evil),
        (insert, "new", 1, 4, None, evil),
        (insert, evil, 0, 1, None, "{}"),
        (insert, "one", 1, 4, str(file), None),
        (insert, "one", 1, 2, str(file), None),
        (insert, "one", 1, 3, str(file), None),
        (insert, "one", 1, 1, str(file), '{"last_used": 1.0, "rows": 1, "bytes": 1}'),
        (insert, b"one", 1, 1, None, "{}"),
        (insert, "one", 1, 1, None, b"{}"),
        (insert, "one", 1, 1, None, 7),
        (insert, "one", 1, 1, None, '{"last_used": NaN, "rows": 1, "bytes": 1}'),
        (insert, "one", 1, 1, None, '{"last_used": 1.0, "rows": -1, "bytes": 1}'),
        (insert, "one", 1, 1, None, '{"last_used": 1.0, "rows": true, "bytes": 1}'),
        (insert, "one", 1, 1, None, '{"last_used": "1", "rows": 1, "bytes": 1}'),
        (insert, "one", 1, 1, None, '{"last_used": 1.0, "rows": 1}'),
        (insert, "one", 1, 1, None, "[" * 3000),
        (insert, "one", 1, 1, None, "x" * 100_000),
        (insert, "x" * 100_000, 1, 1, None, "{}"),
        ("INSERT OR REPLACE INTO Settings VALUES (?, ?)", "_disk", "evil"),
        ("INSERT OR REPLACE INTO Settings VALUES (?, ?)", "disk_evil", evil),
        ("INSERT OR REPLACE INTO Settings VALUES (?, ?)", "disk_min_file_size", 0),
        ("INSERT OR REPLACE INTO Settings VALUES (?, ?)", "sqlite_temp_store_directory", "'/'"),
        ("INSERT OR REPLACE INTO Settings VALUES (?, ?)", "sqlite_journal_mode", "wal"),
        ("INSERT OR REPLACE INTO Settings VALUES (?, ?)", "eviction_policy", "least-recently-used"),
        ("INSERT OR REPLACE INTO Settings VALUES (?, ?)", "count", "many"),
        ("DELETE FROM Settings WHERE key = 'cull_limit'",),
        ("CREATE TRIGGER evil AFTER INSERT ON Cache BEGIN DELETE FROM Cache; END",),
        ("CREATE TABLE more (x)",),
        ("DROP TABLE Cache",),
    ]


PLANTED = range(29)


@pytest.mark.parametrize("which", PLANTED)
@pytest.mark.parametrize("first", ["entries", "damaged", "note", "forget", "rebuild"])
def test_a_planted_row_is_found_and_goes(filled, tmp_path, which, first):
    """Whatever is planted and whatever is asked first: nothing runs, it is damage, and a rebuild mends it."""
    evil = tmp_path / "executed"
    planted = planted_rows(evil)
    assert len(planted) == len(PLANTED)
    sql(filled, *planted[which])
    catalogue = Catalogue(filled, writable=True)
    if first == "entries":
        assert catalogue.entries().keys() <= {"one", "two"}
    elif first == "damaged":
        assert catalogue.damaged
    elif first == "note":
        catalogue.note("three", ENTRY)
        assert not catalogue.damaged
        assert catalogue.entries()["three"] == ENTRY
    elif first == "forget":
        catalogue.forget("one")
    else:
        catalogue.rebuild({"one": ENTRY})
        assert catalogue.entries() == {"one": ENTRY}
    if first in ("entries", "forget"):
        assert catalogue.damaged
        catalogue.rebuild(catalogue.entries())
    assert catalogue.damaged == (first == "damaged")
    assert (tmp_path / "value").exists()  # it belongs to somebody else, and a row named it
    assert not evil.exists()


def test_the_planted_pickles_would_run(tmp_path):
    """The plant works: a plain diskcache executes it."""
    evil = tmp_path / "executed"
    with diskcache.Cache(tmp_path / "plain") as cache:
        cache["x"] = Evil(evil)
        cache["x"]
    assert evil.is_dir()


def test_a_cache_of_texts_refuses_the_rest(folder, tmp_path):
    """Opened behind all checks, the cache still neither pickles, nor reads a pickle, nor touches a file."""
    evil, file = tmp_path / "executed", tmp_path / "value"
    file.write_text("mine")
    folder.mkdir()
    with TextCache(str(folder), 1.0) as cache:
        cache.set("plain", "text")
        for key, value in [("x", Evil(evil)), (Evil(evil), "x"), (b"x", "x"), (1, "x"), ("x", b"x"), ("x", 1)]:
            with pytest.raises(TypeError, match="is a text"):
                cache.set(key, value)
        with pytest.raises(TypeError, match="is a text"), file.open("rb") as opened:
            cache.set("x", opened, read=True)
        with pytest.raises(ValueError, match="no files"):
            cache.disk.filename()
        pickled = pickle.dumps(Evil(evil))
        insert = "INSERT OR REPLACE INTO Cache(key, raw, mode, filename, value) VALUES (?, ?, ?, ?, ?)"
        for mode, filename, value in [(4, None, pickled), (2, str(file), None), (3, str(file), None), (1, None, b"x")]:
            sql(folder, insert, "planted", 1, mode, filename, value)
            with pytest.raises(ValueError, match="no text"):
                cache.get("planted")
            cache.delete("planted")
        sql(folder, insert, pickled, 0, 1, None, "x")
        with pytest.raises(ValueError, match="no text"):
            list(cache)
        with pytest.raises(ValueError, match="no text"):
            list(cache.iterkeys())
        assert cache.get("plain") == "text"
    assert file.read_text() == "mine"
    assert not evil.exists()


@pytest.mark.parametrize(("name", "value"), [("_disk", "x"), ("sqlite_mmap_size", 1 << 20), ("sqlite_evil", 1)])
def test_a_cache_of_texts_takes_no_planted_setting(filled, name, value):
    """A setting that appears between the check and the opening becomes neither attribute nor pragma."""
    sql(filled, "INSERT OR REPLACE INTO Settings VALUES (?, ?)", name, value)
    with pytest.raises((ValueError, TypeError)):
        TextCache(str(filled), 1.0)


# --- damage, locks, strangers ---------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"text\n" * 3000, b"SQLite format 3\0" + b"\xff" * 9000, b"\0" * 100_000])
def test_a_replaced_file_is_damage(filled, content):
    """Other bytes in the file's place are damage, without an error, and the next note begins anew."""
    (filled / FILE).write_bytes(content)
    catalogue = Catalogue(filled, writable=True)
    assert catalogue.entries() == {}
    assert catalogue.damaged
    catalogue.note("ns", ENTRY)
    assert catalogue.entries() == {"ns": ENTRY}
    assert not catalogue.damaged


@given(st.integers(0, 1 << 20), st.integers(1, 255), st.booleans())
def test_no_flipped_byte_raises(tmp_path_factory, place, flip, cut):
    """A byte that differs, or a file that ends early: something is found or nothing, and it can be mended."""
    folder = tmp_path_factory.mktemp("flipped") / "catalogue"
    catalogue = Catalogue(folder, writable=True)
    catalogue.rebuild({str(number): ENTRY for number in range(40)})
    content = bytearray((folder / FILE).read_bytes())
    place %= len(content)
    content[place] ^= flip
    (folder / FILE).write_bytes(content[:place] if cut else content)
    assert all(isinstance(entry, Entry) for entry in catalogue.entries().values())
    catalogue.note("ns", ENTRY)
    catalogue.rebuild({"ns": ENTRY})
    assert catalogue.entries() == {"ns": ENTRY}
    assert not catalogue.damaged


@pytest.mark.parametrize("name", BESIDE)
def test_a_planted_journal_is_not_played_back(filled, name):
    """A journal beside the file, which ours never has, is damage; it and the file go."""
    (filled / name).write_bytes(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + b"\0" * 600)
    catalogue = Catalogue(filled, writable=True)
    assert catalogue.damaged
    catalogue.rebuild({"ns": ENTRY})
    assert {path.name for path in filled.iterdir()} == {FILE, MARK}
    assert catalogue.entries() == {"ns": ENTRY}


def test_a_huge_file_is_not_read(filled):
    """A file larger than a catalogue can be is damage."""
    os.truncate(filled / FILE, 1 << 40)
    catalogue = Catalogue(filled, writable=True)
    assert catalogue.damaged
    catalogue.note("ns", ENTRY)
    assert catalogue.entries() == {"ns": ENTRY}


def test_a_lock_is_not_waited_for(filled):
    """While a stranger holds the file, the last look answers, notes are lost, and nothing waits for long."""
    catalogue = Catalogue(filled, writable=True)
    before = catalogue.entries()
    holder = sqlite3.connect(filled / FILE, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    start = time.monotonic()
    catalogue.note("three", ENTRY)
    catalogue.forget("one")
    assert catalogue.entries() == before
    assert not catalogue.damaged
    assert time.monotonic() - start < 30
    holder.execute("ROLLBACK")
    holder.execute("BEGIN IMMEDIATE")  # readers may read, writers may not write
    start = time.monotonic()
    catalogue.note("three", ENTRY)
    assert time.monotonic() - start < 30
    holder.close()
    assert catalogue.entries() == before


def test_a_view_that_never_ends_is_given_up(filled):
    """A table replaced by a computation is not computed."""
    sql(filled, "DROP TABLE Cache")
    loop = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i AS key, i AS value FROM n"
    sql(filled, f"CREATE VIEW Cache AS {loop}")
    start = time.monotonic()
    assert Catalogue(filled, writable=True).entries() == {}
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_nothing_is_followed_or_waited_for(filled, tmp_path, kind):
    """A link, a folder or a pipe in the file's place is neither followed nor removed; one goes without."""
    elsewhere = tmp_path / "elsewhere.db"
    shutil.copy(filled / FILE, elsewhere)
    content = elsewhere.read_bytes()
    (filled / FILE).unlink()
    if kind == "link":
        (filled / FILE).symlink_to(elsewhere)
    elif kind == "folder":
        (filled / FILE).mkdir()
    else:
        os.mkfifo(filled / FILE)
    catalogue = Catalogue(filled, writable=True)
    assert catalogue.entries() == {}
    catalogue.note("ns", ENTRY)
    catalogue.rebuild({"ns": ENTRY})
    catalogue.forget("one")
    assert catalogue.entries() == {}
    assert elsewhere.read_bytes() == content
    assert os.path.lexists(filled / FILE)


def test_a_link_in_the_folders_place_is_not_followed(tmp_path):
    """The folder itself may not be a link, and neither a file."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "catalogue").symlink_to(tmp_path / "elsewhere")
    catalogue = Catalogue(tmp_path / "catalogue", writable=True)
    catalogue.note("ns", ENTRY)
    assert not catalogue.damaged
    assert list((tmp_path / "elsewhere").iterdir()) == []
    (tmp_path / "file").write_text("mine")
    catalogue = Catalogue(tmp_path / "file", writable=True)
    catalogue.note("ns", ENTRY)
    assert (catalogue.entries(), catalogue.damaged) == ({}, False)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_strangers_folder_is_left_alone(tmp_path):
    """A folder of that name that was there before is somebody else's, be it a diskcache."""
    with diskcache.Cache(tmp_path / "catalogue") as cache:
        cache["theirs"] = 1
    before = {path.name: path.read_bytes() for path in (tmp_path / "catalogue").iterdir()}
    catalogue = Catalogue(tmp_path / "catalogue", writable=True)
    catalogue.note("ns", ENTRY)
    catalogue.rebuild({"ns": ENTRY})
    assert (catalogue.entries(), catalogue.damaged) == ({}, False)
    assert {path.name: path.read_bytes() for path in (tmp_path / "catalogue").iterdir()} == before


def test_a_path_with_a_variable_is_not_expanded(tmp_path, monkeypatch):
    """diskcache would write into the directory that a variable names; so such a path has no catalogue."""
    monkeypatch.setenv("ELSEWHERE", "elsewhere")
    (tmp_path / "$ELSEWHERE").mkdir()
    catalogue = Catalogue(tmp_path / "$ELSEWHERE" / "catalogue", writable=True)
    catalogue.note("ns", ENTRY)
    assert (catalogue.entries(), catalogue.damaged) == ({}, False)
    assert {path.name for path in tmp_path.iterdir()} == {"$ELSEWHERE"}


def test_read_only_is_read_only(filled):
    """A catalogue that may not be written is read, and is never due for a rebuild."""
    before = {path.name: path.read_bytes() for path in filled.iterdir()}
    catalogue = Catalogue(filled, writable=False)
    assert catalogue.entries() == {"one": ENTRY, "two": OTHER}
    catalogue.note("three", ENTRY)
    catalogue.forget("one")
    catalogue.rebuild({})
    assert not catalogue.damaged
    assert {path.name: path.read_bytes() for path in filled.iterdir()} == before
    (filled / FILE).write_bytes(b"text")
    assert (catalogue.entries(), catalogue.damaged) == ({}, False)


def test_a_read_only_catalogue_in_another_journal_mode_is_read(filled):
    """Files that cannot be opened without writing, as in WAL mode, are read as they are."""
    connection = sqlite3.connect(filled / FILE)
    connection.execute("PRAGMA journal_mode = wal")
    connection.execute("UPDATE Settings SET value = 1 WHERE key = 'count'")
    connection.commit()
    saved = {path.name: path.read_bytes() for path in filled.iterdir()}
    connection.close()
    for name, content in saved.items():
        (filled / name).write_bytes(content)
    (filled / BESIDE[2]).unlink(missing_ok=True)
    os.chmod(filled, 0o500)
    try:
        assert Catalogue(filled, writable=False).entries() == {"one": ENTRY, "two": OTHER}
    finally:
        os.chmod(filled, 0o700)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="becomes another user")
def test_another_users_directory_is_read(tmp_path, filled):
    """Who may only read finds the entries, and a note changes nothing."""
    code = (
        "import os, sqlite3, sys; from pathlib import Path\n"
        "from modcache.stores.disk import texts\n"  # the other user may not read where Python lies
        "from modcache.stores.disk.catalogue import Catalogue, Entry\n"
        "os.setuid(65534)\n"
        "for writable in (False, True):\n"
        "    catalogue = Catalogue(Path(sys.argv[1]), writable=writable)\n"
        "    catalogue.note('three', Entry(1.0, 1, 1))\n"
        "    catalogue.rebuild({})\n"
        "    assert catalogue.entries().keys() == {'one', 'two'}, catalogue.entries()\n"
    )
    os.chmod(filled, 0o755)
    for path in [filled / FILE, filled / MARK]:
        os.chmod(path, 0o644)
    parents = [path for path in filled.parents if path.stat().st_uid == 0 and path != path.parent]
    modes = {path: path.stat().st_mode for path in parents}
    try:
        for path in parents:
            os.chmod(path, modes[path] | 0o055)
        subprocess.run([sys.executable, "-c", code, str(filled)], check=True)
    finally:
        for path, mode in modes.items():
            os.chmod(path, stat.S_IMODE(mode))


def test_a_directory_that_vanished_is_no_error(filled):
    """Somebody removed everything: there is nothing, and a note makes it anew."""
    catalogue = Catalogue(filled, writable=True)
    shutil.rmtree(filled)
    assert catalogue.entries() == {}
    assert catalogue.damaged
    catalogue.note("ns", ENTRY)
    assert catalogue.entries() == {"ns": ENTRY}


def test_threads_share_a_catalogue(filled):
    """Notes of several threads of one process are all taken, or give way to each other."""
    catalogue = Catalogue(filled, writable=True)
    threads = [threading.Thread(target=catalogue.note, args=(f"t{n}", ENTRY)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not catalogue.damaged
    assert {"one", "two"} <= catalogue.entries().keys() <= {"one", "two", *(f"t{n}" for n in range(8))}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_shares_nothing(filled):
    """A forked child notes for itself, and the parent's catalogue stays whole."""
    catalogue = Catalogue(filled, writable=True)
    catalogue.note("parent", ENTRY)
    child = os.fork()
    if not child:
        catalogue.note("child", ENTRY)
        os._exit(0)
    os.waitpid(child, 0)
    assert catalogue.entries().keys() == {"one", "two", "parent", "child"}
