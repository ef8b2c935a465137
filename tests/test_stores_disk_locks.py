"""Files that are locked for as long as they are open."""

from __future__ import annotations

import os

import pytest

from modcache.stores.disk import locks
from modcache.stores.disk.locks import is_locked, locked


@pytest.fixture
def files(tmp_path):
    opened = [os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT) for _ in range(3)]
    yield opened
    for file in opened[1:]:
        os.close(file)


def test_a_lock_is_held_by_one(files):
    """While one holds the lock, others see so and do not get it; it is free when the file is closed."""
    holder, other, looking = files
    assert not is_locked(looking)
    os.close(looking)  # who looks holds the lock together with others for as long as the file is open
    files[2] = os.dup(other)
    assert locked(holder, wait=True)
    assert not locked(other, wait=False)
    assert is_locked(other)
    os.close(holder)
    assert locked(other, wait=False)


def test_a_system_without_locks(files, monkeypatch):
    """Where there are no locks, who would wait goes on, who would not does not, and anybody may still be alive."""
    monkeypatch.setattr(locks, "fcntl", None)
    assert locked(files[1], wait=True)
    assert not locked(files[1], wait=False)
    assert is_locked(files[1])
    os.close(files[0])
