"""What the fingerprint answers with: frozen values that carry no module."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

UNDETERMINED = -1


@dataclasses.dataclass(frozen=True, slots=True)
class Standing:
    """What a module is now, as far as a cache cares.

    Attributes:
        state: the number of its content: the same content has the same number, also when it comes back. It
            is -1 while nobody can use it (something is trainable or in training): looking would cost a digest
            per step.
        trainable: the first parameter, buffer or attribute that requires grad, if grad mode is on.
        training: the first submodule in training mode that may be random or depend on its batch.
        unreadable: weights of which the values cannot be read.
        lazy: uninitialised parameters are present.
        restless: the weights keep being written with what they already are.
    """

    state: int
    trainable: str | None
    training: str | None
    unreadable: tuple[str, ...]
    lazy: bool
    restless: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a module is, in content: equal in every process and on every machine of one Python version.

    Attributes:
        digest: names all of it.
        parts: readable names ("class of layer.3", "layer.3.weight") with a digest each.
        weights: the digest over all tensors only.
        opaque: what counted by its class name only.
        bookkeeping: places that a forward was seen to change.
    """

    digest: bytes
    parts: Mapping[str, bytes]
    weights: bytes
    opaque: tuple[str, ...]
    bookkeeping: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Bookkeeping:
    """What forwards were seen to change on a module: a copy of it has it as well, and is no other module for it.

    Attributes:
        fields: places of values, with the content first seen where it is known.
        tensors: names of tensors, with the digest first seen.
    """

    fields: Mapping[str, bytes | None]
    tensors: Mapping[str, bytes]
