"""The memory of one leaf of many rows: in pages that appear when touched, or on a device."""

from __future__ import annotations

import functools
import mmap
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ..errors import UsageError, UsageTypeError
from ..tensors import memory_of
from .pages import reserve

if TYPE_CHECKING:
    from collections.abc import Callable

    from .index import Places

__all__ = ["Column", "DeviceColumn", "HostColumn", "columns_on"]

_HUGE_FROM: Final = 4 << 20  # small slabs should not hold pages of 2 MiB that they hardly use
_HUGE_FOR: Final = 64 << 20  # nor should small stores: half a page too many would be more than 5 % of their bound
_SLACK: Final = 1 << 20  # pages beyond the last row that are kept for the next rows

_NUMPY_NAMES: Final = (
    "bool uint8 int8 int16 uint16 int32 uint32 int64 uint64 float16 float32 float64 complex64 complex128"
)
_NUMPY: Final[dict[torch.dtype, np.dtype[Any]]] = {
    getattr(torch, name): np.dtype(name) for name in _NUMPY_NAMES.split() if hasattr(torch, name)
}
_STAND_IN: Final[dict[int, np.dtype[Any]]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int16),
    4: np.dtype(np.int32),
}


class Column(Protocol):
    """One leaf of the rows 0, 1, 2 … of a slab."""

    def take(self, rows: Places) -> torch.Tensor:
        """These rows, in fresh memory."""

    def lent(self) -> npt.NDArray[np.uint8] | None:
        """The memory itself, a row of bytes for each row; None where the host cannot read it."""

    def append(self, start: int, values: torch.Tensor, chosen: Places) -> None:
        """Puts the chosen rows of a batch at the rows from ``start`` on; there is room for them."""

    def overwrite(self, rows: Places, values: torch.Tensor, chosen: Places) -> None:
        """Puts the chosen rows of a batch at these rows."""

    def move(self, targets: Places, sources: Places) -> None:
        """Copies rows over others."""

    def fit(self, count: int) -> None:
        """Makes room for so many rows."""

    def trim(self, count: int) -> None:
        """Gives back memory that so many rows do not need."""


class HostColumn:
    """A leaf in the memory of the host, reserved for ``most`` rows at once where the system allows it.

    Args:
        dtype: of the leaf.
        shape: of the leaf, without the row dimension.
        most: rows that will ever be written.
    """

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], most: int) -> None:
        self._dtype = dtype
        self._shape = shape
        self._exact = dtype in _NUMPY
        self._numpy = _NUMPY[dtype] if self._exact else _STAND_IN[dtype.itemsize]
        self._row_bytes = dtype.itemsize * torch.Size(shape).numel()
        size = most * self._row_bytes
        self._pages = reserve(size, _HUGE_FROM if size >= _HUGE_FOR else size)
        self._touched = 0
        if self._pages is None:
            self._use(np.empty(0, np.uint8), 0)
        else:
            self._use(np.frombuffer(self._pages, np.uint8, most * self._row_bytes), most)

    def take(self, rows: Places) -> torch.Tensor:
        """These rows, in fresh memory."""
        taken = self._rows.take(rows, 0)
        return torch.from_numpy(taken) if self._exact else self._as_dtype(taken)

    def lent(self) -> npt.NDArray[np.uint8]:
        """The memory itself, a row of bytes for each row."""
        return self._bytes

    def append(self, start: int, values: torch.Tensor, chosen: Places) -> None:
        """Puts the chosen rows of a batch at the rows from ``start`` on."""
        stop = start + len(chosen)
        values = _settled(values).cpu()
        source = _bytes_of(values, self._row_bytes)
        if len(chosen) == len(source):  # all of them: one copy, without a look at the places
            self._bytes[start:stop] = source
        else:
            self._bytes[start:stop] = source[chosen]
        self._touched = max(self._touched, stop)

    def overwrite(self, rows: Places, values: torch.Tensor, chosen: Places) -> None:
        """Puts the chosen rows of a batch at these rows."""
        values = _settled(values).cpu()
        self._bytes[rows] = _bytes_of(values, self._row_bytes)[chosen]

    def move(self, targets: Places, sources: Places) -> None:
        """Copies rows over others."""
        self._bytes[targets] = self._bytes[sources]

    def fit(self, count: int) -> None:
        """Makes room for so many rows."""
        if count > len(self._bytes):
            capacity = max(count, 2 * len(self._bytes))
            grown = np.empty(capacity * self._row_bytes, np.uint8)
            grown[: self._bytes.size] = self._bytes.reshape(-1)
            self._use(grown, capacity)

    def trim(self, count: int) -> None:
        """Gives back memory that so many rows do not need."""
        used, touched = count * self._row_bytes, self._touched * self._row_bytes
        if touched - used <= _SLACK + used // 32:
            return
        self._touched = count
        if self._pages is not None:
            start = -(-used // mmap.PAGESIZE) * mmap.PAGESIZE
            self._pages.madvise(mmap.MADV_DONTNEED, start, touched - start)
        else:
            self._use(self._bytes[:count].reshape(-1).copy(), count)

    def _use(self, memory: npt.NDArray[np.uint8], capacity: int) -> None:
        self._bytes = memory.reshape(capacity, self._row_bytes)
        self._rows = memory.view(self._numpy).reshape(capacity, *self._shape)

    def _as_dtype(self, taken: npt.NDArray[np.generic]) -> torch.Tensor:
        # Not `.view(dtype)`: such a view cannot be changed in place by something that requires grad.
        storage = torch.from_numpy(taken).untyped_storage()
        return torch.empty(0, dtype=self._dtype, device="cpu").set_(storage, 0, taken.shape)  # type: ignore[call-overload, no-any-return]


class DeviceColumn:
    """A leaf on an accelerator, or in pinned memory of the host; it grows by half.

    Args:
        dtype: of the leaf.
        shape: of the leaf, without the row dimension.
        most: rows that will ever be written.
        device: where the rows are.
        pinned: whether they are in pinned memory of the host; what is taken is pinned, too.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        most: int,
        *,
        device: torch.device,
        pinned: bool = False,
    ) -> None:
        self._dtype = dtype
        self._shape = shape
        self._most = most
        self._device = device
        self._pinned = pinned
        self._row_bytes = dtype.itemsize * torch.Size(shape).numel()
        self._bytes = self._empty(0)

    def take(self, rows: Places) -> torch.Tensor:
        """These rows, in fresh memory."""
        taken = self._empty(len(rows))
        with torch.no_grad():
            torch.index_select(self._bytes, 0, self._on_device(rows), out=taken)
            typed = torch.empty(0, dtype=self._dtype, device=self._device)
            return typed.set_(taken.untyped_storage(), 0, (len(rows), *self._shape))  # type: ignore[call-overload, no-any-return]

    def lent(self) -> None:
        """Nothing: what is taken is to stay on the device."""

    def append(self, start: int, values: torch.Tensor, chosen: Places) -> None:
        """Puts the chosen rows of a batch at the rows from ``start`` on."""
        with torch.no_grad():
            self._bytes[start : start + len(chosen)].copy_(self._bytes_of(values, chosen))

    def overwrite(self, rows: Places, values: torch.Tensor, chosen: Places) -> None:
        """Puts the chosen rows of a batch at these rows."""
        with torch.no_grad():
            self._bytes.index_copy_(0, self._on_device(rows), self._bytes_of(values, chosen).to(self._device))

    def move(self, targets: Places, sources: Places) -> None:
        """Copies rows over others."""
        with torch.no_grad():
            moved = self._bytes.index_select(0, self._on_device(sources))
            self._bytes.index_copy_(0, self._on_device(targets), moved)

    def fit(self, count: int) -> None:
        """Makes room for so many rows."""
        if count > len(self._bytes):
            self._resize(count, max(count, min(self._most, len(self._bytes) * 3 // 2)))

    def trim(self, count: int) -> None:
        """Gives back memory that so many rows do not need."""
        if count * 2 < len(self._bytes):
            self._resize(count, count)

    def _resize(self, kept: int, capacity: int) -> None:
        # An inference tensor could not be written to outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            kept = min(kept, len(self._bytes))
            resized = self._empty(capacity)
            resized[:kept].copy_(self._bytes[:kept])
            self._bytes = resized

    def _empty(self, count: int) -> torch.Tensor:
        shape = (count, self._row_bytes)
        return torch.empty(shape, dtype=torch.uint8, device=self._device, pin_memory=self._pinned)

    def _on_device(self, rows: Places) -> torch.Tensor:
        return torch.from_numpy(rows.copy()).to(self._device)  # torch warns of read-only arrays

    def _bytes_of(self, values: torch.Tensor, chosen: Places) -> torch.Tensor:
        if not self._row_bytes:
            return self._empty(len(chosen))
        rows = _settled(values).reshape(len(values), -1).view(torch.uint8)
        return rows if len(chosen) == len(rows) else rows[torch.from_numpy(chosen).to(rows.device)]


def columns_on(device: str | torch.device) -> tuple[torch.device, Callable[..., Column]]:
    """The device of a store's tensors, and what makes a column there of dtype, shape and most rows."""
    if not isinstance(device, (str, torch.device)):
        raise UsageTypeError(f'device is "cpu", "pinned" or a device of torch, but {device!r} was given.')
    if device == "pinned":
        if not torch.cuda.is_available():
            raise UsageError('device="pinned" needs CUDA, which is not available here. Use device="cpu".')
        return torch.device("cpu"), functools.partial(DeviceColumn, device=torch.device("cpu"), pinned=True)
    try:
        known = torch.device(device)
        torch.empty(0, device=known)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f'device="{device}" cannot be used here ({reason}). Use "cpu", "pinned", or an accelerator like "cuda:0".'
        ) from None
    if known.type == "meta":
        raise UsageError('device="meta" holds no values. Use "cpu", "pinned", or an accelerator like "cuda:0".')
    return known, HostColumn if known.type == "cpu" else functools.partial(DeviceColumn, device=known)


def _settled(values: torch.Tensor) -> torch.Tensor:
    return values.detach().resolve_conj().resolve_neg().contiguous()


def _bytes_of(values: torch.Tensor, row_bytes: int) -> npt.NDArray[np.uint8]:
    """The memory of a settled tensor on the host; the caller keeps the tensor while it looks."""
    return np.frombuffer(memory_of(values), np.uint8).reshape(len(values), row_bytes)
