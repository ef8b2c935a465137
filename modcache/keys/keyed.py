"""The keys of a call's rows, and what they are made of; those that the caller gave."""

from __future__ import annotations

from typing import NamedTuple

from ..batch import Batch
from .given import given_keys, given_metas
from .parts import Digested, Meta, Part, frame_seed
from .tokens import TokenRows

__all__ = ["Given", "Keyed", "as_they_are", "given_keyed", "given_keyed_as"]


class Given(NamedTuple):
    """Keys that the caller gave for the rows: ``cache_keys=``, or `keys_for` around the call.

    Args:
        keys: one per row.
        number: the number of the call of this module within one `keys_for`.
        source: what to call them in an error.
    """

    keys: object
    number: int = 0
    source: str = "cache_keys"


class Keyed(NamedTuple):
    """The keys of a call's rows.

    Args:
        keys: 16 bytes per row.
        seed: stands for everything that the rows have in common.
        metas: what is common to the rows, per column: path, kind, dtype, trailing shape.
        parts: the columns again, for who wants their digests one by one.
        tokens: the lengths of the rows, where padding is not part of them.
        given: whether the caller gave them.
    """

    keys: list[bytes]
    seed: int
    metas: tuple[Meta, ...]
    parts: tuple[Part, ...]
    tokens: TokenRows | None = None
    given: bool = False


def as_they_are(value: bytes) -> bytes:
    """What makes the digest of a row of what is one already."""
    return value


def given_keyed(given: Given, batch: Batch) -> Keyed:
    """The keys of rows that the caller names; what is per row is then not digested.

    Raises:
        UsageError: their number is not the number of rows.
        UsageTypeError: they are of a type that cannot be keys.
    """
    metas = given_metas(batch, given.number)
    return given_keyed_as(given, batch.size, metas, frame_seed(metas, batch))


def given_keyed_as(given: Given, size: int, metas: tuple[Meta, ...], seed: int) -> Keyed:
    """The same, where it is known already what the rows have in common."""
    digests = given_keys(given.keys, size, seed, given.source)
    return Keyed(digests, seed, metas, (Digested(("key", "given"), digests, as_they_are),), given=True)
