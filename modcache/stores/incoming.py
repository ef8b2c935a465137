"""What a store looks at in a batch before it takes it in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import UsageError
from .index import KEY_BYTES, Places

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..rows import Rows

__all__ = ["check_batch", "last_of_each"]


def check_batch(keys: Sequence[bytes], rows: Rows) -> None:
    """Raises `UsageError` unless there is one key of the right length for each row."""
    odd = set(map(len, keys)) - {KEY_BYTES}
    if odd:
        raise UsageError(f"A row key is {KEY_BYTES} bytes, but one of {odd.pop()} bytes was given.")
    counts = {tensor.shape[0] for tensor in rows.tensors}
    if counts - {len(keys)}:
        raise UsageError(f"There are {len(keys)} row keys, but tensors of {sorted(counts)} rows.")


def last_of_each(keys: Sequence[bytes]) -> Places:
    """The places of the keys, ascending, of equal keys only the last.

    >>> last_of_each([b"a", b"b", b"a"])
    array([1, 2])
    """
    if len(set(keys)) == len(keys):  # as is the rule
        return np.arange(len(keys))
    last = dict(zip(keys, range(len(keys)), strict=True))
    return np.sort(np.fromiter(last.values(), np.int64, len(last)))
