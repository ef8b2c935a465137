"""A writer that is killed at any instant: what it had committed stays, what it had not is nobody's, nothing lies."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from modcache import DiskStore
from tests.directories import (
    LAYOUTS_ON_DISK,
    Child,
    Faults,
    command,
    files_in,
    fork,
    have,
    key_of,
    needs_fork,
    put,
    quiet,
    sizes_in,
)

pytestmark = needs_fork

KILLS = 200
HEX = "0123456789abcdef0123456789abcdef"
ROOM = 2000
"""Numbers of rows that one life of a writer has for itself."""


@pytest.fixture(scope="module", autouse=True)
def _warm(tmp_path_factory) -> None:
    """What is imported late is imported here, so that children have it and are killed in the middle of work."""
    with DiskStore(tmp_path_factory.mktemp("warm")) as store:
        put(store, "a", [1])
        store.flush()
        have(store, "a", [1])


def write(directory: Path, first: int, seed: int, say) -> None:
    """Puts and deletes rows until it is killed, and says what is sure to stay and sure to be gone."""
    random = np.random.default_rng(seed)
    store = DiskStore(directory)
    say("open")
    number = first
    while number < first + ROOM - 10:
        sure: list[list] = []
        gone: list[list] = []
        for _ in range(random.integers(1, 4)):
            name = str(random.choice(list(LAYOUTS_ON_DISK)))
            numbers = list(range(number, number + int(random.integers(1, 4 if name in ("wide", "large") else 9))))
            number = numbers[-1] + 1
            put(store, f"of {name}", numbers, LAYOUTS_ON_DISK[name])
            if random.random() < 0.2:
                store.delete(f"of {name}", [key_of(numbers[0])])
                gone.append([name, numbers[:1]])
                numbers = numbers[1:]
            sure.append([name, numbers])
        store.flush()
        say({"sure": sure, "gone": gone})
    time.sleep(60)  # it has written all that it may


def check(store: DiskStore, said: list) -> int:
    """Compares all rows that the children spoke of with what they must be; how many there are for sure."""
    count = 0
    for name, layout in LAYOUTS_ON_DISK.items():
        parts = [part for part in said if isinstance(part, dict)]
        sure = [n for part in parts for other, numbers in part["sure"] if other == name for n in numbers]
        gone = [n for part in parts for other, numbers in part["gone"] if other == name for n in numbers]
        assert have(store, f"of {name}", sure, layout) == set(sure)
        assert have(store, f"of {name}", gone, layout) == set()
        count += len(sure)
    return count


def check_all(store: DiskStore, lives: int) -> int:
    """Compares every row that any life can have written with what it must be; how many there are."""
    numbers = list(range(lives * ROOM))
    count = 0
    for name, layout in LAYOUTS_ON_DISK.items():
        there = set(store.row_keys(f"of {name}"))
        known = [n for n in numbers if key_of(n) in there]
        assert len(known) == len(there), "a key that nobody wrote"
        for start in range(0, len(known), 500):
            part = known[start : start + 500]
            assert have(store, f"of {name}", part, layout) == set(part)
        count += len(known)
    return count


def pace(directory: Path) -> float:
    """The seconds that this machine, as busy as it is, takes for what a writer does from one word to the next."""
    with Child(partial(write, directory, 0, 0)) as child:
        assert child.hear() == "open"
        begin = time.monotonic()
        for _ in range(5):
            child.hear()
        return (time.monotonic() - begin) / 5


def killed_at_random(swift_path: Path, kills: int, seed: int) -> dict[str, int]:
    """Lets writers live for random times, two at once and many one after another, and looks after the deaths."""
    random = np.random.default_rng(seed)
    seen = {"kills": 0, "sure": 0, "rows": 0, "early": 0}
    seconds = pace(swift_path / "pace")
    for block in range(0, kills, 20):
        directory = swift_path / str(block)
        said: list = []
        for life in range(0, 20, 2):
            lives = [partial(write, directory, n * ROOM, seed + block + n) for n in (life, life + 1)]
            with Child(lives[0]) as first, Child(lives[1]) as second:
                told: list = []
                for child in (first, second):
                    if random.random() < 0.9:  # else it may not even have opened the directory
                        assert child.hear() == "open"
                    for _ in range(int(random.integers(2)) if child.said else 0):
                        child.hear()
                for child in (first, second):
                    time.sleep(random.exponential(seconds))
                    child.kill()
                    said_by = child.wait()
                    assert os.WIFSIGNALED(child.status), "it was to be killed, not to end by itself"
                    seen["early"] += len(said_by) < 2
                    told += said_by
            said += told
            with quiet(0):
                store = DiskStore(directory)
                check(store, told)
                store.close()
        with quiet(0):
            store = DiskStore(directory)
            seen["rows"] += check_all(store, 20)
            seen["sure"] += check(store, said)
            store.close()
        seen["kills"] += 20
    return seen


def test_kills_at_random_instants(swift_path):
    """After 200 kills every row is right, and every row is there that was flushed before."""
    seen = killed_at_random(swift_path, KILLS, 1)
    assert seen["kills"] == KILLS
    assert seen["sure"] > KILLS, f"the writers died before they wrote anything: {seen}"
    assert seen["rows"] > seen["sure"], f"none was killed between a commit and the word of it: {seen}"


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10, 20))
def test_thousands_of_kills(swift_path, seed):
    """The same, a thousand times for each seed."""
    killed_at_random(swift_path, 1000, seed * 100_000)


def scenario(directory: Path, say) -> None:
    """A short life with everything in it that a writer does."""
    store = DiskStore(directory)
    sure: dict[str, list[int]] = {}
    for start in (0, 10):
        for name, layout in LAYOUTS_ON_DISK.items():
            numbers = list(range(start, start + 2))
            put(store, f"of {name}", numbers, layout)
            sure.setdefault(name, []).extend(numbers)
        store.flush()
        say({"sure": [[name, list(numbers)] for name, numbers in sure.items()], "gone": []})
    store.describe("of vector", {"class": "tests.Vector"})
    store.delete("of vector", [key_of(0)])
    store.flush()
    say({"sure": [["vector", [1, 10, 11]]], "gone": [["vector", [0]]]})
    store.delete("of pair")
    store.flush()
    say({"sure": [], "gone": [["pair", [0, 1, 10, 11]]]})
    store.close()


def settled(said: list) -> list:
    """What holds in the end: the later word counts, row by row."""
    fate: dict[tuple[str, int], str] = {}
    for part in said:
        if isinstance(part, dict):
            for word in ("sure", "gone"):
                fate |= {(name, n): word for name, numbers in part[word] for n in numbers}
    return [{w: [[name, [n]] for (name, n), at in fate.items() if at == w] for w in ("sure", "gone")}]


@pytest.mark.parametrize("how", ["kill", "half", "kill after a short write"])
def test_a_kill_at_each_call_of_the_system(swift_path, how):
    """Whichever call is its last, also in the middle of a write: what it had flushed is there, and all is right."""

    def counted(say):
        with Faults(lambda number, name: None, names=Faults.CHANGES) as faults:
            scenario(swift_path / "whole", lambda word: None)
        return faults.calls

    (calls,) = fork(counted)
    assert {"open", "mkdir", "unlink"} <= set(calls)
    assert sum(name in Faults.WRITES for name in calls) >= 15
    for last in range(len(calls)):
        if how == "half" and last < len(calls) and calls[last] not in Faults.WRITES:
            continue
        if how == "kill after a short write" and last % 5:
            continue
        directory = swift_path / f"{last}"

        def dying(say, last=last, directory=directory):
            def decide(number, name):
                if number >= last:
                    return "kill" if how != "half" else "half"
                return "short" if how == "kill after a short write" else None

            with Faults(decide, names=Faults.CHANGES):
                scenario(directory, say)

        with Child(dying) as child:
            said = settled(child.wait())
        with quiet(0):
            store = DiskStore(directory)
            check_lenient(store, said)
            put(store, "of vector", [50, 51])
            store.close()
            store = DiskStore(directory)
            assert have(store, "of vector", [50, 51]) == {50, 51}
            store.close()


def check_lenient(store: DiskStore, said: list) -> None:
    """As `check`; rows that the writer was about to delete when it died may be there or not."""
    (part,) = said
    doomed = {("vector", 0), *(("pair", n) for n in (0, 1, 10, 11))}
    for name, (n,) in part["sure"]:
        there = have(store, f"of {name}", [n], LAYOUTS_ON_DISK[name])
        assert there == {n} or (name, n) in doomed
    for name, (n,) in part["gone"]:
        assert have(store, f"of {name}", [n], LAYOUTS_ON_DISK[name]) == set()


# --- what is left behind --------------------------------------------------------------------------------


def test_what_the_killed_left_is_reclaimed(swift_path):
    """`modcache gc` cuts and unlinks what nobody believes, and afterwards every committed row is still there."""
    directory = swift_path / "cache"
    said: list = []
    for life in range(6):
        with Child(partial(write, directory, life * ROOM, life)) as child:
            for _ in range(3 + life):
                child.hear()
            child.kill()
            said += child.wait()
    for path in files_in(directory):  # as if the kills had come in the middle of long writes
        if path.suffix in (".rows", ".log"):
            with path.open("ab") as file:
                file.write(b"torn" * 5000)
    (directory / "rows" / HEX).mkdir()
    (directory / "rows" / HEX / f"{'ab' * 8}-000000.rows").write_bytes(b"\x89mcrows\n" + bytes(100_000))
    before = sizes_in(directory)
    dry = command("gc", directory, "--dry-run")
    assert sizes_in(directory) == before
    done = command("gc", directory)
    assert done["status"] == 0
    freed = [report["bytes_before"] - report["bytes_after"] for report in (dry, done)]
    assert freed[1] == before - sizes_in(directory) > 100_000
    assert freed[0] == pytest.approx(freed[1], abs=1000), "what a dry run says is about what is done"
    assert [path for path in files_in(directory / "writers") if len(path.name) == 16] == []
    after = sizes_in(directory)
    command("gc", directory)
    assert sizes_in(directory) == after, "the second time there is nothing to do"
    assert command("verify", directory)["status"] == 0
    with quiet(0), DiskStore(directory) as store:
        check(store, said)
        check_all(store, 6)
    for path in files_in(directory):
        if path.suffix in (".rows", ".log"):
            assert b"torn" * 4 not in path.read_bytes()


def test_the_living_lose_nothing(swift_path):
    """Whatever a living writer is in the middle of, `modcache gc` and a repair leave it, and it goes on."""
    directory = swift_path / "cache"
    random = np.random.default_rng(3)

    def living(say):
        store = DiskStore(directory)
        number = 0
        while number <= 100 or not (swift_path / "enough").exists():
            put(store, "a", range(number, number + 4))
            put(store, "large", [number], LAYOUTS_ON_DISK["large"])
            number += 4
            if number == 4:
                say("begun")
        store.close()
        return number

    with Child(living) as child:
        child.hear()
        for _ in range(25):
            time.sleep(random.random() * 0.003)
            os.kill(child.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            command("gc", directory)
            command("verify", directory, "--repair")
            os.kill(child.pid, signal.SIGCONT)
        (swift_path / "enough").touch()
        last = child.wait()[-1]
        assert child.status == 0
    assert last > 100
    with quiet(0), DiskStore(directory) as store:
        for start in range(0, last, 400):
            numbers = range(start, min(start + 400, last))
            assert have(store, "a", numbers) == set(numbers)
            assert have(store, "large", numbers[::4], LAYOUTS_ON_DISK["large"]) == set(numbers[::4])


def test_several_clean_up_at_once(swift_path):
    """Three processes that reclaim and repair at the same time lose no row, and leave nothing torn."""
    directory = swift_path / "cache"
    said: list = []
    for life in range(10):
        with Child(partial(write, directory, life * ROOM, life)) as child:
            for _ in range(3):
                child.hear()
            child.kill()
            said += child.wait()

    def cleaner(say, seed):
        random = np.random.default_rng(seed)
        statuses = []
        for _ in range(8):
            words = [["gc"], ["gc", "--max-bytes", "1GB"], ["verify", "--repair"]][int(random.integers(3))]
            report = command(words[0], directory, *words[1:])
            assert report["status"] == 0 or "Another process" in report["said"], report
            statuses.append(report["status"])
        return statuses

    cleaners = [Child(partial(cleaner, seed=seed)) for seed in range(3)]
    for child in cleaners:
        with child:
            child.wait()
            assert child.status == 0
    assert command("verify", directory)["status"] == 0
    with quiet(0), DiskStore(directory) as store:
        check(store, said)
        check_all(store, 10)
