"""Look at a few bytes of every weight, because some writes move no counter and no pointer."""

from __future__ import annotations

import copy
import ctypes
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

SETS = 8
"""How many sets of positions there are; each check looks at one, so a set comes round every eighth check."""
_WIDTH = 64  # one cache line
_TRIES = 6  # to find elements that are not all zero: rounding would not change zeros


class HostProbe:
    """Windows onto the memory of tensors and arrays, and the bytes last seen there.

    A window is a ``memoryview`` by address: reading 200 of them is one ``bytes.join`` (4 µs), while
    ``.numpy()`` would forbid the storage to be resized for good. The storages are held, so that an address is
    not given to another tensor; whoever reads must first check that no tensor's pointer moved.
    """

    def __init__(self, leaves: Sequence[torch.Tensor | np.ndarray[Any, Any]]) -> None:
        self._held = [leaf.untyped_storage() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        by_leaf = [_windows(leaf, at) for at, leaf in enumerate(leaves)]
        self._sets = [[windows[number] for windows in by_leaf] for number in range(SETS)]
        self._pieces = [list(map(bytes, views)) for views in self._sets]
        self._expected = list(map(b"".join, self._pieces))

    def same(self, turn: int) -> bool:
        """Whether this turn's windows show what they showed last."""
        number = turn % SETS
        return b"".join(self._sets[number]) == self._expected[number]

    def just_moved(self, turn: int) -> bool:
        """Whether what differs in this turn's windows differs in those of the turn before, too: a write since."""
        now, before = turn % SETS, (turn - 1) % SETS
        differing = [at for at, view in enumerate(self._sets[now]) if bytes(view) != self._pieces[now][at]]
        return all(bytes(self._sets[before][at]) != self._pieces[before][at] for at in differing)

    def pieces(self, at: int) -> tuple[bytes, ...]:
        """All that is seen of one leaf."""
        return tuple(pieces[at] for pieces in self._pieces)

    def renewed(self) -> HostProbe:
        """The same windows, with what they show now as expected."""
        other = copy.copy(self)
        other._pieces = [list(map(bytes, views)) for views in self._sets]
        other._expected = list(map(b"".join, other._pieces))
        return other


def _windows(leaf: torch.Tensor | np.ndarray[Any, Any], seed: int) -> list[memoryview]:
    if isinstance(leaf, torch.Tensor):
        count, size, shape = leaf.numel(), leaf.element_size(), tuple(leaf.shape)
        strides = [step * size for step in leaf.stride()]
        address = leaf.data_ptr() if count else 0
    else:
        count, size, shape, strides = leaf.size, leaf.itemsize, leaf.shape, list(leaf.strides)
        address = leaf.__array_interface__["data"][0]
    if not count:
        return [memoryview(b"")] * SETS
    low = sum((length - 1) * step for length, step in zip(shape, strides, strict=True) if step < 0)
    high = sum((length - 1) * step for length, step in zip(shape, strides, strict=True) if step > 0) + size
    if high - low <= count * size:  # no gaps in which somebody else's bytes would lie
        return _runs(address + low, high - low, size, seed)
    return _elements(address, shape, strides, size, seed)


def _view(address: int, width: int) -> memoryview:
    return memoryview((ctypes.c_char * width).from_address(address)).cast("B")


def _places(count: int, number: int, seed: int) -> list[int]:
    """A few spread positions within the ``number``-th eighth of ``count`` positions."""
    start, stop = count * number // SETS, max(count * (number + 1) // SETS, count * number // SETS + 1)
    # Weyl steps of the golden ratio: spread, different for each leaf, the same in every run.
    return [
        start + (seed * 0x9E3779B1 + number * 0x85EBCA6B + at * 0xC2B2AE35) % (stop - start) for at in range(_TRIES)
    ]


def _runs(address: int, length: int, size: int, seed: int) -> list[memoryview]:
    width = min(max(_WIDTH, size), length)
    found = []
    for number in range(SETS):
        places = _places((length - width) // size + 1, number, seed)
        found.append(_first_filled([_view(address + place * size, width) for place in places]))
    return found


def _elements(address: int, shape: Sequence[int], strides: Sequence[int], size: int, seed: int) -> list[memoryview]:
    count = int(np.prod(shape))
    found = []
    for number in range(SETS):
        indices = [np.unravel_index(place, tuple(shape)) for place in _places(count, number, seed)]
        offsets = [sum(int(at) * step for at, step in zip(index, strides, strict=True)) for index in indices]
        found.append(_first_filled([_view(address + offset, size) for offset in offsets]))
    return found


def _first_filled(views: list[memoryview]) -> memoryview:
    return next((view for view in views if any(view)), views[0])


class DeviceProbe:
    """Windows onto tensors of an accelerator, compared there and looked at later.

    Nothing here waits for the device: the comparison is launched, its one-byte answer is copied to pinned
    memory behind the loop, and a later turn reads it once the event has passed. So a mismatch is always late.
    Works on any device; on the CPU the answer is there at once.
    """

    _AT_ONCE = 64  # leaves per turn: a bound on what one launch costs the host

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._device = tensors[0].device
        self._sets = [views for number in range(SETS) for views in self._views(tensors, number)]
        self._start()

    def _start(self) -> None:
        with torch.no_grad():
            self._expected = [torch.cat(views) for views in self._sets]
        self._flag = torch.zeros((), dtype=torch.bool, pin_memory=self._device.type == "cuda")
        self._found = False  # once found it stays, until the expected bytes are taken anew
        self._waiting: tuple[torch.Tensor, Any] | None = None
        self._turns = itertools.count()

    def renewed(self) -> DeviceProbe:
        """The same windows, with what they show now as expected."""
        other = copy.copy(self)
        other._start()
        return other

    def _views(self, tensors: Sequence[torch.Tensor], number: int) -> list[list[torch.Tensor]]:
        found = []
        for at, tensor in enumerate(tensors):
            flat = tensor.detach()
            if not tensor.numel() or not tensor.is_contiguous():
                continue
            flat = flat.view(-1)
            width = max(1, min(_WIDTH // tensor.element_size(), flat.numel()))
            start = _places(flat.numel() - width + 1, number, at)[0]
            found.append(flat[start : start + width].view(torch.uint8))
        return [found[at : at + self._AT_ONCE] for at in range(0, len(found), self._AT_ONCE)]

    def differs(self) -> bool:
        """Whether a comparison that has come back found a difference; launches the next one."""
        if self._found or not self._sets:
            return self._found
        if self._waiting is not None:
            if not _passed(self._waiting[1]):
                return False
            self._waiting = None
            self._found = bool(self._flag)
            if self._found:
                return True
        self._launch(next(self._turns) % len(self._sets))
        return False

    def _launch(self, number: int) -> None:
        with torch.no_grad():
            flag = torch.cat(self._sets[number]).ne(self._expected[number]).any()
            self._flag.copy_(flag, non_blocking=True)
        self._waiting = flag, _event(self._device)


def _event(device: torch.device) -> Any:
    if device.type == "cpu":
        return None
    event: Any = torch.Event(device)
    event.record()
    return event


def _passed(event: Any) -> bool:
    return event is None or bool(event.query())
