"""DiskStore: the contract, and what a directory adds to it: other processes, reopening, limits, damage."""

from __future__ import annotations

import pytest

from modcache.stores import DiskStore
from tests.contracts import AbilitiesContract


class TestDiskStore(AbilitiesContract):
    """The contract, with rows mapped where they are small."""

    @pytest.fixture
    def store(self, tmp_path):
        with DiskStore(tmp_path / "cache") as store:
            yield store


class TestWithoutMaps(AbilitiesContract):
    """The contract, with all rows read."""

    @pytest.fixture
    def store(self, tmp_path):
        with DiskStore(tmp_path / "cache", mmap=False) as store:
            yield store


class Flushed(DiskStore):
    """Everything that was put is in files before it is got."""

    def put(self, namespace, row_keys, rows):
        admitted = super().put(namespace, row_keys, rows)
        self.flush()
        return admitted


class TestFlushed(AbilitiesContract):
    """The contract, with no row in memory."""

    @pytest.fixture
    def store(self, tmp_path):
        with Flushed(tmp_path / "cache") as store:
            yield store


class TestFlushedWithoutMaps(AbilitiesContract):
    """The contract, with no row in memory, and all rows read."""

    @pytest.fixture
    def store(self, tmp_path):
        with Flushed(tmp_path / "cache", mmap=False) as store:
            yield store


class ByAnother(DiskStore):
    """What is put here is written by another store, as if by another process."""

    def __init__(self, path):
        super().__init__(path)
        self.other = Flushed(path)

    def put(self, namespace, row_keys, rows):
        return self.other.put(namespace, row_keys, rows)

    def get(self, namespace, row_keys):
        self.row_keys(namespace)  # looks around; by itself, a store does that when it misses a row
        return super().get(namespace, row_keys)

    def close(self):
        super().close()
        self.other.close()


class TestOfAnother(AbilitiesContract):
    """The contract, where one store writes and another one reads and deletes."""

    @pytest.fixture
    def store(self, tmp_path):
        with ByAnother(tmp_path / "cache") as store:
            yield store
