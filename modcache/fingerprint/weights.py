"""Digest the weights of a module, each only when it moved."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from ..digest import digest, encode, tensor_digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .watch import Watch


@dataclasses.dataclass(frozen=True, slots=True)
class Weighed:
    """What a look at the weights gave: what they are, and which of them had moved."""

    digest: bytes
    parts: Mapping[str, bytes]
    stale: tuple[str, ...]


class Weights:
    """Remembers the digest of each leaf together with the stamp that it was taken at.

    Leaves are known by ``id``, which is theirs alone for as long as the watch holds them; once nothing
    holds them, what was known is forgotten.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[tuple[object, ...], bytes]] = {}
        self.firsts: dict[str, bytes] = {}
        """Digests first seen of tensors that a forward changes."""

    def known(self, leaf: object) -> bytes | None:
        """The last digest of a leaf, if there is one."""
        entry = self._known.get(id(leaf))
        return None if entry is None else entry[1]

    def weigh(self, watch: Watch) -> Weighed:
        """Digest what moved since it was last digested."""
        stale, parts, kept = [], dict(self.firsts), {}
        for at, (name, leaf) in enumerate(zip(watch.names, watch.leaves, strict=True)):
            stamp = watch.stamp(at)
            entry = self._known.get(id(leaf))
            if entry is None or entry[0] != stamp:
                entry = stamp, leaf_digest(leaf)
                stale.append(name)
            kept[id(leaf)] = entry
            parts[name] = entry[1]
        for name, tensor in watch.sealed.items():
            parts[name] = digest(encode((str(type(tensor).__name__), tensor.dtype, _shape(tensor))))
        self._known = kept
        return Weighed(digest(encode(sorted(parts.items()))), parts, tuple(stale))

    def forget(self) -> None:
        """Take nothing from memory the next time."""
        self._known = {}

    def forget_devices(self, watch: Watch) -> None:
        """Forget what lies on an accelerator, where a probe does not tell which leaf differs."""
        for leaf in watch.leaves:
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "cpu":
                self._known.pop(id(leaf), None)  # pragma: no cover - needs an accelerator


def leaf_digest(leaf: Any) -> bytes:
    """The digest of a tensor or array: dtype, shape and values in C order."""
    if isinstance(leaf, torch.Tensor):
        return digest(encode((leaf.dtype, tuple(leaf.shape))) + tensor_digest(leaf))
    return digest(encode(leaf))


def _shape(tensor: torch.Tensor) -> tuple[int, ...] | None:
    try:
        return tuple(map(int, tensor.shape))
    except Exception:  # an uninitialised or nested tensor has none
        return None
