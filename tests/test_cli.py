"""The command line: what it prints, its status, and that it does nothing else."""

import argparse
import importlib.metadata
import json
import os
import re
import runpy
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import modcache
from modcache.cli import main
from modcache.cli.columns import shortest, table
from modcache.cli.words import COMMANDS, age_of, size_of
from modcache.stats import bytes_text
from modcache.stores.disk.directory import Directory
from modcache.stores.disk.manifest import write_manifest
from modcache.stores.disk.names import folder_of
from tests.directories import snapshot
from tests.segments import alive, content_of, key_of, plant, value_of

NS, OTHER = "abcdef" + "0" * 26, "abd" + "0" * 29


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def run(capsys):
    """Runs a command; its status, what it printed, and what it complained about."""

    def run(*words):
        status = main([str(word) for word in words])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def filled(cache):
    """Two namespaces, one of them unused for long."""
    plant(cache, NS, [(1, {1: 0, 2: 0, 3: 0})])
    plant(cache, OTHER, [(1, {1: 0})])
    for namespace, dtype in ((NS, "torch.float16"), (OTHER, "torch.float32")):
        place = Directory(cache).place_of(folder_of(namespace))
        write_manifest(place, {"class": "models.Encoder", "dtypes": [dtype], "parts": {"x": "y"}})
    for path in place.iterdir():
        os.utime(path, (time.time() - 40 * 86400,) * 2)
    return cache


def place_of(cache, namespace=NS):
    return Directory(cache).place_of(folder_of(namespace))


def spoil(cache):
    (path,) = place_of(cache).glob("*.rows")
    content = bytearray(path.read_bytes())
    content[64] ^= 1
    path.write_bytes(content)


# --- the commands ---------------------------------------------------------------------------------------


def test_ls(filled, run):
    """A line per namespace: a beginning of its name that is enough, class, rows, bytes, last use, what differs."""
    status, out, err = run("ls", filled)
    assert (status, err) == (0, "")
    head, first, second = out.splitlines()
    assert head.split() == ["namespace", "class", "rows", "bytes", "last", "used", "differs"]
    assert re.fullmatch(r"abcdef00\s+Encoder\s+3\s+[0-9.]+ \w+\s+\S.*\s+dtype float32 -> float16", first)
    assert re.fullmatch(r"abd00000\s+Encoder\s+1\s+[0-9.]+ \w+\s+40 days ago\s+dtype float16 -> float32", second)


def test_ls_of_two_cuts_of_one_model(cache, run):
    """Namespaces of a recycled model are told apart by the module at which it is cut, whatever stands there."""
    for number, cut in enumerate(["layers.1", "layers.2\x1b[2J", 7]):
        plant(cache, f"{number}" * 32, [(1, {1: 0})])
        write_manifest(Directory(cache).place_of(folder_of(f"{number}" * 32)), {"class": "models.Encoder", "cut": cut})
    lines = run("ls", cache)[1].splitlines()[1:]
    cells = sorted(re.split(r"\s{2,}", line)[1] for line in lines)
    assert cells[:2] == ["Encoder", "Encoder at layers.1"], "a cut that is no text was not written by us"
    assert cells[2].startswith("Encoder at layers.2")
    assert "\x1b" not in cells[2]


def test_ls_of_nothing(cache, run):
    """A directory without rows is fine, and says so."""
    Directory(cache).prepare("a test")
    assert run("ls", cache) == (0, "no namespaces\n", "")


def test_show(filled, run):
    """One namespace with its manifest, without what only comparing needs."""
    status, out, _ = run("show", filled, "abc")
    assert status == 0
    told = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in out.split("\n\n")[0].splitlines())
    assert told["namespace"] == NS
    assert told["rows"] == "3"
    assert told["layout"] == "int64[]: 3 rows"
    manifest = json.loads(out.split("\n\n")[1])
    assert manifest == {"class": "models.Encoder", "dtypes": ["torch.float16"]}


def test_stats_and_du(filled, run):
    """Totals, and where the bytes are."""
    status, out, _ = run("stats", filled)
    assert status == 0
    assert re.search(r"^rows\s+4$", out, re.MULTILINE)
    assert re.search(r"^namespaces\s+2$", out, re.MULTILINE)
    status, out, _ = run("du", filled)
    assert status == 0
    assert re.search(rf"^\s*\S+ \w+\s+{NS}$", out, re.MULTILINE)
    assert re.search(r"^\s*32 B\s+rows$", out, re.MULTILINE)


def test_verify(filled, run):
    """The status is 0 without damage and after a repair, else 1."""
    status, out, _ = run("verify", filled)
    assert (status, out.splitlines()[-1]) == (0, "nothing is damaged")
    spoil(filled)
    status, out, _ = run("verify", filled)
    assert (status, out.splitlines()[-1]) == (1, "1 segments damaged, 1 left")
    assert "do not have their checksum" in out
    status, out, _ = run("verify", filled, "--repair")
    assert (status, out.splitlines()[-1]) == (0, "1 segments damaged, 0 left")
    assert run("verify", filled)[0] == 0


def test_gc(filled, run):
    """A dry run tells, a real one does; limits are read as sizes and ages."""
    status, out, _ = run("gc", filled, "--older-than", "30d", "--dry-run")
    assert (status, f"would be dropped: {OTHER}" in out) == (0, True)
    assert place_of(filled, OTHER).exists()
    status, out, _ = run("gc", filled, "--older-than=30d")
    assert (status, f"dropped: {OTHER}" in out) == (0, True)
    assert not place_of(filled, OTHER).exists()
    assert f"dropped: {NS}" in run("gc", filled, "--max-bytes", "0.1kB")[1]


def test_gc_tells_what_is_in_use(cache, run):
    """What should go and cannot makes status 1."""
    name = plant(cache, NS, [(1, {1: 0})])
    with alive(cache, name.writer):
        status, out, _ = run("gc", cache, "--max-bytes", "0")
    assert (status, f"in use, stays: {NS}" in out) == (1, True)


def test_clear(filled, run):
    """A namespace goes, by a beginning that only it has; another one stays."""
    status, _, err = run("clear", filled, "ab")
    assert (status, "2 namespaces begin with 'ab'" in err) == (2, True)
    status, _, err = run("clear", filled, "x")
    assert (status, err) == (1, "modcache: No namespace begins with 'x'.\n")
    status, out, _ = run("clear", filled, "abc")
    assert (status, out.startswith(f"dropped 3 rows of {NS}, ")) == (0, True)
    assert len(run("ls", filled)[1].splitlines()) == 2


def test_forget(filled, run):
    """Keys are hexadecimal; unknown ones make status 1, known ones are wiped in all namespaces."""
    status, out, _ = run("forget", filled, key_of(77).hex())
    assert (status, out) == (1, "found 0 of 1 keys; wiped 0 rows from the files\n")
    status, out, _ = run("forget", filled, key_of(1).hex(), key_of(2).hex().upper())
    assert (status, out) == (0, "found 2 of 2 keys; wiped 3 rows from the files\n")
    assert content_of(filled, NS, range(5)) == {3: value_of(3)}
    status, _, err = run("forget", filled, "abc")
    assert (status, err) == (2, "modcache: A key is 32 hexadecimal digits; found 'abc'.\n")


def test_forget_while_somebody_writes(cache, run):
    """Rows in the files of a living writer are dropped, and the status says that they are not wiped yet."""
    name = plant(cache, NS, [(1, {1: 0})])
    with alive(cache, name.writer):
        status, out, _ = run("forget", cache, key_of(1).hex())
        assert (status, "not yet: " in out) == (1, True)
        assert content_of(cache, NS, [1]) == {}
    assert run("forget", cache, key_of(1).hex())[0] == 0


def test_export(filled, run, tmp_path):
    """Keys and rows go into a file; an unknown suffix is told with those that are known."""
    status, out, _ = run("export", filled, "abc", "--to", tmp_path / "x.npy")
    assert (status, out.startswith("wrote 3 rows to ")) == (0, True)
    assert len(np.load(tmp_path / "x.npy")) == 3
    status, _, err = run("export", filled, "abc", "--to", tmp_path / "x.csv")
    assert (status, ".npy, .parquet, .safetensors" in err) == (2, True)
    spoil(filled)
    status, out, _ = run("export", filled, "abc", "--to", tmp_path / "y.npy")
    assert (status, "1 damaged rows left out" in out) == (1, True)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_json(filled, run, name, tmp_path):
    """With --json there is one JSON value and nothing else, and no NaN in it."""
    words = {
        "show": ["abc"],
        "clear": ["abc"],
        "forget": [key_of(1).hex()],
        "export": ["abc", "--to", tmp_path / "x.npy"],
    }
    status, out, err = run(name, filled, *words.get(name, []), "--json")
    assert (status, err) == (0, "")
    found = json.loads(out, parse_constant=pytest.fail)
    assert isinstance(found, dict)
    assert found


def test_json_of_a_listing(filled, run):
    """The names in JSON are those of the documentation."""
    found = json.loads(run("ls", filled, "--json")[1])
    assert found["directory"] == str(filled.resolve())
    first = found["namespaces"][0]
    assert first["namespace"] == NS
    assert (first["class"], first["rows"], first["differs"]) == ("models.Encoder", 3, ["dtype float32 -> float16"])
    assert first["layouts"] == [{"leaves": [["int64", []]], "rows": 3, "row_bytes": 8, "segments": 1}]


# --- what is typed --------------------------------------------------------------------------------------


def test_the_current_directory_is_the_default(filled, run, monkeypatch):
    """Inside of a cache directory its path may be left out; elsewhere that is an error."""
    assert run("ls")[0] == 2
    assert run("show", "abc")[0] == 2
    monkeypatch.chdir(filled)
    assert run("ls")[0] == 0
    assert run("show", "abc")[0] == 0
    assert run("forget", key_of(1).hex(), key_of(77).hex())[1].startswith("found 1 of 2")
    assert run("forget", ".", key_of(2).hex())[0] == 0
    assert content_of(filled, NS, range(5)) == {3: value_of(3)}


def test_options_stand_anywhere(filled, run):
    """Options before, between and after the words."""
    for words in (["--json", filled, "abc"], [filled, "--json", "abc"], [filled, "abc", "--json"]):
        assert json.loads(run("show", *words)[1])["namespace"] == NS


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nothing"],
        ["ls", "a", "b"],
        ["show"],
        ["gc", ".", "--max-bytes", "much"],
        ["gc", ".", "--max-bytes", "-1"],
        ["gc", ".", "--older-than", "30"],
        ["gc", ".", "--older-than", "soon"],
        ["export", ".", "abc"],
        ["ls", "--unknown", "."],
        ["verify", ".", "--rep"],
        ["ls", ""],
    ],
    ids=lambda words: " ".join(words) or "nothing at all",
)
def test_wrong_usage_is_told(run, words, cache, monkeypatch):
    """What cannot be understood makes status 2, a message, and nothing on the output."""
    cache.mkdir()
    monkeypatch.chdir(cache)
    status, out, err = run(*words)
    if words == ["gc", ".", "--older-than", "30"]:
        assert "30" in err
    assert (status, out) == (2, "")
    assert err
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_directories_are_told(run, name, tmp_path):
    """A file, nothing, and somebody's directory are each named in a clear message; nothing is made or changed."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "thesis.txt").write_text("mine")
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "modcache.json").write_text('{"format": 999}')
    words = {"show": ["abc"], "clear": ["abc"], "forget": ["0" * 32], "export": ["abc", "--to", tmp_path / "x.npy"]}
    before = snapshot(tmp_path)
    for directory, message in (
        ("file", "is a file"),
        ("nothing", "There is no directory"),
        ("strange", "is no cache directory"),
        ("newer", "has format 999"),
    ):
        status, out, err = run(name, tmp_path / directory, *words.get(name, []))
        assert (status, out) == (2, "")
        assert message in err
        assert str(tmp_path / directory) in err
    assert snapshot(tmp_path) == before


def test_the_directory_comes_first(filled, run):
    """Words in the wrong order are recognised."""
    status, _, err = run("show", "abc", filled)
    assert (status, "the directory comes first" in err) == (2, True)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anything")
def test_a_directory_that_cannot_be_written(filled, run):
    """What the system refuses is told with status 1."""
    os.chmod(filled / "writers", 0o500)
    status, _, err = run("gc", filled)
    os.chmod(filled / "writers", 0o700)
    assert (status, "Permission denied" in err) == (1, True)


def test_what_the_system_refuses_is_told(filled, run, monkeypatch):
    """An error of the system is a line with the path, and status 1."""

    def fail(*_, **__):
        raise PermissionError(13, "Permission denied", "/some/where")

    monkeypatch.setattr("modcache.stores.disk.upkeep.listing", fail)
    assert run("ls", filled) == (1, "", "modcache: Permission denied: /some/where\n")


def test_control_characters_are_not_printed(cache, run):
    """Names and manifests by strangers cannot write to the terminal."""
    plant(cache, "evil\x1b[2J", [(1, {1: 0})])
    write_manifest(place_of(cache, "evil\x1b[2J"), {"class": "\x1b]0;evil\x07"})
    for words in (["ls", cache], ["show", cache, "evil"], ["du", cache], ["verify", cache], ["clear", cache, "evil"]):
        status, out, _ = run(*words)
        assert status == 0
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out)


# --- the process ----------------------------------------------------------------------------------------


def python(*words, **more):
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False, **more)


def test_the_module_is_the_command(filled):
    """`python -m modcache` runs the command and hands on its status."""
    done = python("-m", "modcache", "ls", filled / "nothing")
    assert (done.returncode, done.stdout) == (2, "")
    assert "There is no directory" in done.stderr


def test_the_command_is_installed():
    """The distribution has the command `modcache`."""
    (found,) = importlib.metadata.entry_points(group="console_scripts", name="modcache")
    assert found.load() is main


def test_no_code_of_the_user_is_imported(tmp_path):
    """A class that a manifest names is a text: nothing of it is imported, nor is what looks like it beside us."""
    (tmp_path / "evilmodule.py").write_text("open('executed', 'w')\n")
    plant(tmp_path / "cache", NS, [(1, {1: 0})])
    write_manifest(place_of(tmp_path / "cache"), {"class": "evilmodule.Encoder", "prepare": "evilmodule.decode"})
    commands = [["ls"], ["show", NS], ["verify"], ["gc"], ["export", NS, "--to", "x.npy"]]
    code = f"from modcache.cli import main; print([main([one, 'cache', *more]) for one, *more in {commands}])"
    done = python("-c", code, cwd=tmp_path)
    assert (done.stdout.splitlines()[-1], done.stderr) == ("[0, 0, 0, 0, 0]", "")
    assert not (tmp_path / "executed").exists()


def test_little_is_imported(filled):
    """Listing needs neither diskcache nor pyarrow nor a library of models."""
    code = f"import sys; from modcache.cli import main; main(['ls', {str(filled)!r}]); print(*sys.modules)"
    imported = python("-c", code).stdout.splitlines()[-1].split()
    assert not {"diskcache", "pyarrow", "transformers", "safetensors"} & {*imported}


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
def test_progress_is_for_terminals(filled):
    """A terminal sees a bar on the error output; a pipe, as in the other tests, sees nothing."""
    import fcntl
    import termios

    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    os.set_blocking(master, False)
    code = "import sys; from modcache.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "verify", str(filled)], stdout=subprocess.PIPE, stderr=slave, check=True
    )
    seen = os.read(master, 10_000)
    os.close(slave)
    os.close(master)
    assert b"B/s" in seen
    assert b"nothing is damaged" in done.stdout


@pytest.mark.parametrize("words", [("ls",), ("--help",), ("--version",)])
def test_a_reader_that_has_seen_enough(filled, words):
    """`modcache ... | head` ends without a traceback, also where it shows its help."""
    reading, writing = os.pipe()
    os.close(reading)
    code = "import sys; from modcache.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *words, str(filled)], stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def test_help_and_version(run):
    """Help goes to the output with status 0, and names each command."""
    status, out, err = run("--help")
    assert (status, err) == (0, "")
    assert [name for name in COMMANDS if f"  {name}" not in out] == []
    for name, command in COMMANDS.items():
        status, out, err = run(name, "--help")
        assert (status, err) == (0, "")
        assert command.usage in out
    assert run("--version") == (0, f"modcache {modcache.__version__}\n", "")


def test_every_command_is_documented():
    """The page of the command line has a row for each command, with its words and options."""
    page = (Path(__file__).parents[1] / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    rows = {row.split()[0]: row for row in re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)}
    assert rows.keys() == COMMANDS.keys()
    for name, command in COMMANDS.items():
        assert command.words in rows[name]
        parser = argparse.ArgumentParser()
        command.options(parser)
        options = {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}
        assert {option for option in options if option not in rows[name]} == set()


def test_what_a_module_left(tmp_path, run):
    """The whole way: a cached module writes, the command tells its class and rows, and clears them."""

    class Encoder(nn.Linear):
        pass

    encoder = modcache.cached_module(Encoder(3, 2), freeze=True, store=tmp_path / "cache")
    encoder(torch.randn(8, 3))
    modcache.cache_of(encoder).flush()
    namespace = modcache.cache_of(encoder).namespace
    status, out, _ = run("ls", tmp_path / "cache")
    assert status == 0
    assert re.search(rf"^{namespace[:8]}\s+Encoder\s+8\s", out, re.MULTILINE)
    modcache.cache_of(encoder).store.close()
    assert run("clear", tmp_path / "cache", namespace[:8])[0] == 0
    assert run("ls", tmp_path / "cache")[1] == "no namespaces\n"


# --- values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("10GB", 10**10), ("10 gb", 10**10), ("1GiB", 1 << 30), ("2G", 2 << 30), ("1.5k", 1536), ("7B", 7)],
)
def test_sizes(text, expected):
    """Powers of 1000 with B, of 1024 with iB or alone."""
    assert size_of(text) == expected


@pytest.mark.parametrize(("text", "expected"), [("30d", 2592000), ("2w", 1209600), ("90m", 5400), ("0.5h", 1800)])
def test_ages(text, expected):
    """An age has a unit."""
    assert age_of(text) == expected


def test_tables():
    """Columns are as wide as they must be, and nothing ends in blanks."""
    assert table([["a", "long"], ["longer", ""]]) == "a       long\nlonger"
    assert bytes_text(1023) == "1023 B"
    assert bytes_text(5 << 40) == "5.0 TiB"
    assert shortest(["same-a", "same-b", "x"], 2) == {"same-a": "same-a", "same-b": "same-b", "x": "x"}
    assert shortest(["abc", "abcdef"], 1) == {"abc": "abc", "abcdef": "abcd"}


def test_a_bar_on_a_terminal(run, filled, monkeypatch):
    """Long work shows how far it is where somebody watches, and nothing of it is left in the end."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # its thread would outlive the test
    status, out, err = run("verify", filled)
    assert status == 0
    assert "nothing is damaged" in out
    assert "B" in err


def test_an_interrupt_has_the_status_of_a_shell(run, filled, monkeypatch):
    """Ctrl-C ends a command with 130 and no traceback."""

    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("modcache.stores.disk.upkeep.listing", interrupted)
    monkeypatch.setitem(modcache.cli.run._RUN, "ls", interrupted)
    assert run("ls", filled)[0] == 130


def test_python_m_modcache(filled, monkeypatch, capsys):
    """``python -m modcache`` is the same command."""
    monkeypatch.setattr(sys, "argv", ["modcache", "ls", str(filled)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("modcache", run_name="__main__")
    assert stop.value.code == 0
    assert "Encoder" in capsys.readouterr().out
