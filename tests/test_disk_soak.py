"""Eight processes on one directory for minutes: killed, full, cleaned up and damaged all the while."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from modcache import DiskStore
from tests.directories import LAYOUTS_ON_DISK, Child, command, files_in, have, key_of, needs_fork, put, quiet, sizes_in

pytestmark = needs_fork

PROCESSES = 8
NUMBERS = 3000
BOUND = 60_000_000


def live(directory: Path, seed: int, until: float) -> int:
    """One process: opens the directory again and again; no store warns of anything twice."""
    random = np.random.default_rng(seed)
    count = 0
    while time.time() < until:
        mmap = bool(random.random() < 0.8)
        with quiet(), DiskStore(directory, max_bytes=BOUND, mmap=mmap, keep_free=0) as store:
            while time.time() < until and random.random() >= 0.01:
                count += act(store, seed, random)
    return count


def act(store: DiskStore, seed: int, random: np.random.Generator) -> int:
    """Gets some rows, all of which are right, then puts, deletes or tells something; how many there were."""
    name = str(random.choice(list(LAYOUTS_ON_DISK)))
    layout = LAYOUTS_ON_DISK[name]
    most = 4 if layout.row_bytes > 1000 else 40
    numbers = sorted(set(random.integers(0, NUMBERS, int(random.integers(1, most))).tolist()))
    there = have(store, name, numbers, layout)
    chosen = random.random()
    if chosen < 0.6:
        put(store, name, [n for n in numbers if n not in there], layout)
    elif chosen < 0.7:
        store.delete(name, [key_of(n) for n in numbers[:3]])
    elif chosen < 0.705:
        store.delete(name)
    elif chosen < 0.75:
        store.flush()
    elif chosen < 0.76:
        store.describe(name, {"class": "tests.Soak", "checked": {str(seed): [[1]]}})
    elif chosen < 0.765:
        store.stats(), store.manifests()
    return len(there)


def clean(directory: Path, seed: int, until: float) -> None:
    """One that lets the commands go over the directory meanwhile."""
    random = np.random.default_rng(seed)
    while time.time() < until:
        time.sleep(random.random())
        words = ["gc"], ["ls"], ["verify"], ["verify", "--repair"], ["gc", "--max-bytes", str(BOUND // 2)], ["stats"]
        chosen = words[int(random.integers(len(words)))]
        command(chosen[0], directory, *chosen[1:])


def together(directory: Path, seconds: float, seed: int) -> dict[str, int]:
    """Keeps eight of them alive for a time; they are killed now and then, and replaced."""
    random = np.random.default_rng(seed)
    until = time.time() + seconds
    deaths = got = started = 0
    children: dict[int, Child] = {}
    try:
        while time.time() < until or children or started <= PROCESSES:
            for place in range(PROCESSES):
                child = children.get(place)
                if child is None and (time.time() < until or started <= PROCESSES):
                    started += 1
                    lives = clean if place == 0 else live
                    number = seed * 10_000 + started
                    children[place] = Child(lambda say, lives=lives, number=number: lives(directory, number, until))
                elif child is not None and time.time() < until and random.random() < 0.02:
                    child.kill()
            time.sleep(0.02)
            for place, child in list(children.items()):
                if os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                    continue
                said = child.wait()
                deaths += os.WIFSIGNALED(child.status)
                assert os.WIFSIGNALED(child.status) or child.status == 0
                got += sum(part for part in said if isinstance(part, int))
                del children[place]
            assert time.time() < until + 240, "somebody hangs"
    finally:
        for child in children.values():
            child.__exit__()
    return {"deaths": deaths, "got": got, "started": started}


def look_back(directory: Path) -> int:
    """Compares every row that lies there in the end; how many there are."""
    with quiet(0), DiskStore(directory) as store:
        count = 0
        for name, layout in LAYOUTS_ON_DISK.items():
            there = set(store.row_keys(name))
            numbers = [n for n in range(NUMBERS) if key_of(n) in there]
            assert len(numbers) == len(there)
            for start in range(0, len(numbers), 100):
                part = numbers[start : start + 100]
                assert have(store, name, part, layout) == set(part)
            count += len(numbers)
    return count


def run(directory: Path, seconds: float, seed: int) -> None:
    seen = together(directory, seconds, seed)
    assert seen["started"] > PROCESSES
    assert look_back(directory) > 0
    assert sizes_in(directory) < BOUND * 1.2
    command("gc", directory)
    assert look_back(directory) > 0
    assert [path for path in files_in(directory / "writers") if len(path.name) == 16] == []


def test_eight_processes(swift_path):
    """A few seconds of it."""
    run(swift_path / "cache", 4, 1)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(5))
def test_eight_processes_for_minutes(tmp_path, seed):
    """A minute of it for each seed."""
    run(tmp_path / "cache", 60, seed + 100)
