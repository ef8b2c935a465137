"""What every test starts from, and what it must not leave behind."""

from __future__ import annotations

import gc
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from modcache import attached, mode
from modcache.memo import Bypass
from modcache.modes import current_mode

settings.register_profile(
    "modcache",
    deadline=None,  # the first example pays for imports and just-in-time caches
    max_examples=60,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("modcache")

_POOLS = ("modcache-digest",)
"""Threads of process-wide pools, which stay on purpose."""

_PATIENCE = 60.0
_OPEN_FILES = Path("/proc/self/fd")
_IN_MEMORY = "/dev/shm"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes minutes unless it is asked for."""
    if os.environ.get("MODCACHE_SOAK") != "1":
        long = [item for item in items if item.get_closest_marker("soak")]
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=long)


@pytest.fixture(scope="session", autouse=True)
def _fixed_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture
def swift_path(tmp_path: Path) -> Iterator[Path]:
    """A folder of the test's own, in memory where the system has such a place: to sync there costs nothing."""
    if not os.access(_IN_MEMORY, os.W_OK):
        yield tmp_path
        return
    place = Path(tempfile.mkdtemp(prefix="modcache-test-", dir=_IN_MEMORY))
    yield place
    shutil.rmtree(place)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _warned_anew(request: pytest.FixtureRequest) -> Iterator[None]:
    """A warning that was shown at a line in one test is shown there in the next one, too."""
    yield
    vars(request.module).pop("__warningregistry__", None)


@pytest.fixture(autouse=True)
def _no_net(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be a warning about a defect of ours in a user's loop is an error in a test."""

    def fail(error: Exception) -> Bypass:
        raise error

    monkeypatch.setattr(attached, "_own_failure", fail)


@pytest.fixture(autouse=True)
def _mode_as_it_was() -> Iterator[None]:
    before = current_mode()
    yield
    mode(before)


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    """Fail a test that leaves a thread or a file descriptor behind."""
    threads, files = _threads(), _files()
    yield
    end = time.monotonic() + _PATIENCE
    while (left := _left(threads, files)) and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
    assert left == [], f"left behind: {left}"


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if not thread.name.startswith(_POOLS)}


def _files() -> dict[str, str]:
    """Open descriptors and what they are open on; nothing where the system does not list them."""
    found = {}
    for entry in _OPEN_FILES.iterdir() if _OPEN_FILES.exists() else ():
        try:
            found[entry.name] = str(entry.readlink())
        except FileNotFoundError:  # the listing itself
            continue
    return found


def _left(threads: set[threading.Thread], files: dict[str, str]) -> list[str]:
    named = [f"thread {thread.name}" for thread in _threads() - threads]
    opened = [f"file {number} on {target}" for number, target in _files().items() if number not in files]
    return named + opened
