"""Memory straight from the system: it appears when touched, and goes back when it is dropped."""

from __future__ import annotations

import mmap
import sys
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["reserve", "zeros"]

_MAP_NORESERVE: Final = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python < 3.12 has no name for it
_LARGE: Final = 1 << 18  # below, the allocator is quicker; what it frees of more makes it keep as much for good


def reserve(size: int, huge_from: int) -> mmap.mmap | None:
    """Pages for so many bytes, more than there is memory if need be; None where the system does not let us.

    Args:
        size: in bytes.
        huge_from: the offset from which on pages may be huge.
    """
    if size == 0 or not hasattr(mmap, "MADV_DONTNEED"):
        return None
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_MAP_NORESERVE if sys.platform == "linux" else 0)
    try:
        pages = mmap.mmap(-1, size, flags=flags)
    except (OSError, OverflowError, ValueError):  # an address-space limit, or strict overcommit
        return None
    if size > huge_from and hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE, huge_from)
    return pages


def zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array of zeros; a large one is not made by the allocator, which might keep what is given back."""
    kind = np.dtype(dtype)
    count = int(np.prod(shape))
    pages = reserve(count * kind.itemsize, 0) if count * kind.itemsize >= _LARGE else None
    return np.zeros(shape, kind) if pages is None else np.frombuffer(pages, kind, count).reshape(shape)
