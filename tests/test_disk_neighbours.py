"""Segments that lie side by side in one window do not show through each other."""

import pytest
import torch

from modcache import DiskStore
from modcache.rows import SINGLE, Layout, Rows

from .contracts import answers


def layout_of(width):
    return Layout(SINGLE, ((torch.int64, (width,)),))


def key(number):
    return number.to_bytes(16, "little")


def rows_of(numbers, width):
    return Rows(layout_of(width), (torch.tensor(numbers)[:, None].expand(-1, width).contiguous(),))


@pytest.mark.parametrize("width", [1, 2, 3, 8, 60])
def test_a_segment_grows_beside_another(tmp_path, width):
    """Row by row to the end of its pages and beyond, also after the neighbour's rows were compared with their sums."""
    page = 4096 // (8 * width)
    with DiskStore(tmp_path) as mine, DiskStore(tmp_path) as other, DiskStore(tmp_path) as reader:
        known = list(range(page // 2)), list(range(10_000, 10_000 + page // 3 + 1))
        for store, numbers in zip((mine, other), known, strict=True):
            store.put("a", [key(n) for n in numbers], rows_of(numbers, width))
            store.flush()
            reader.get("a", [key(n) for n in numbers])
        for number in range(page // 2, 2 * page + 3):
            mine.put("a", [key(number)], rows_of([number], width))
            known[0].append(number)
            if (
                number % page < page - 9
            ):  # the head of the file takes a few rows' place, and that is where it gets tight
                continue
            mine.flush()
            wanted = [*known[1], *known[0]]
            (found,) = reader.get("a", [key(n) for n in wanted])
            assert len(answers([found])) == len(wanted)
            assert torch.equal(found.rows.tensors[0], rows_of(wanted, width).tensors[0])
