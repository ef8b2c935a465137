"""A cache directory that was written once, by the first version of the format, is read by every later one."""

import shutil
from pathlib import Path

import pytest
import torch

from modcache import DiskStore
from modcache.stores.disk import upkeep

NAMESPACE = "0123456789abcdef" * 2
OTHER = "any text: ä/.."


def key(number):
    return number.to_bytes(16, "little")


@pytest.fixture
def directory(tmp_path):
    """A copy, so that nothing is ever written into what is kept."""
    return Path(shutil.copytree(Path(__file__).parent / "golden" / "directory-v1", tmp_path / "cache"))


@pytest.mark.parametrize("mmap", [True, False])
def test_rows(directory, mmap):
    """Every row of it, with overwritten and dropped ones, of two layouts and two namespaces."""
    with DiskStore(directory, mmap=mmap) as store:
        assert sorted(store.namespaces()) == sorted([NAMESPACE, OTHER])
        found = store.get(NAMESPACE, [key(number) for number in (0, 1, 2, 3, 4, 7, 10, 11, 12)])
        vectors, pairs = sorted(found, key=lambda part: len(part.rows.tensors))
        assert vectors.positions.tolist() == [1, 2, 3, 4, 5]
        assert vectors.rows.tensors[0].tolist() == [[n] * 3 for n in (1.0, 22.0, 3.0, 4.0, 7.0)]
        assert pairs.positions.tolist() == [6, 7]
        assert pairs.rows.tensors[0].dtype == torch.bfloat16
        assert pairs.rows.tensors[0].tolist() == [[[n] * 2] * 2 for n in (10.0, 11.0)]
        assert pairs.rows.tensors[1].tolist() == [10, 11]
        (other,) = store.get(OTHER, [key(1), key(2)])
        assert other.rows.tensors[0].tolist() == [[1.0] * 3]


def test_manifest(directory):
    """What was told of a namespace is read back."""
    with DiskStore(directory) as store:
        facts = store.manifest(NAMESPACE)
    assert facts is not None
    assert (facts["class"], facts["version"], facts["checked"]) == ("tests.Golden", "1", {"ab" * 16: [[]]})


def test_nothing_is_damaged(directory):
    """Each checksum of it is what it was."""
    report = upkeep.verify(directory)
    assert (report.damages, report.rows) == ((), 10)
