"""Notice that rows are computed which are stored already, but for something that the module may not look at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

from .batch import Batch
from .explain import part_digests
from .keys.keyed import Keyed
from .keys.tokens import find_tokens, token_keys
from .locks import lock_of

__all__ = ["PaddingWatch", "SharedWatch"]

_SAMPLED = 512  # rows that are watched at most
_EVERY = 8  # once there are so many, one batch in so many is looked at
_MANY = 64  # an argument of so many values is no option, but a count or a clock
_AGAIN = 256  # rows that were computed again for its sake
_REMEMBERED = 2 * _MANY  # values of what all rows share that are told apart

Noted = TypeVar("Noted")
Shared = tuple[tuple[str, bytes], ...]


class _Sample(Generic[Noted]):
    """What was noted of a few hundred rows: those of the lowest digests, the same ones each time."""

    def __init__(self) -> None:
        self._noted: dict[bytes, Noted] = {}
        self._below: bytes | None = None
        self._batches = 0
        self._lock = lock_of(self)

    def is_due(self) -> bool:
        """Whether the next batch is to be looked at."""
        self._batches += 1
        return self._below is None or self._batches % _EVERY == 0

    def differing(self, digests: Iterable[bytes], noted: Noted) -> int:
        """Note something of these rows; of how many something else was noted before."""
        with self._lock:
            below = self._below
            own = [digest for digest in digests if below is None or digest < below]
            found = sum([self._noted.setdefault(digest, noted) != noted for digest in own])
            if len(self._noted) > _SAMPLED:
                self._below = below = sorted(self._noted)[_SAMPLED // 2]
                self._noted = {digest: known for digest, known in self._noted.items() if digest < below}
        return found


class PaddingWatch:
    """Notices rows of tokens that were computed before with another padding."""

    def __init__(self) -> None:
        self._widths = _Sample[int]()
        self._noticed = False

    def notices(self, batch: Batch, places: Sequence[int]) -> bool:
        """Whether one of these computed rows was computed before at another padded length; it is said once."""
        if self._noticed or not self._widths.is_due():
            return False
        tokens = find_tokens(batch)
        if tokens is None:
            return False
        try:
            keys = token_keys(batch, tokens, 0)
        except Exception:  # something else in the rows; a hint is not worth an error in the user's loop
            return False
        self._noticed = self._widths.differing([keys[place] for place in places], tokens.width) > 0
        return self._noticed


class SharedWatch:
    """Notices rows that are computed again and again because something that all rows share is never the same."""

    def __init__(self) -> None:
        self._values: dict[Shared, None] = {}
        self._calls = _Sample[Shared]()
        self._again = 0
        self._ended = False

    def end(self) -> None:
        """Look for nothing any more: somebody else tells of such calls."""
        self._ended = True

    def notices(self, batch: Batch, keyed: Keyed, shared: Shared, places: Sequence[int]) -> tuple[str, ...]:
        """The names of such arguments, once they have had many values and many rows were computed again.

        Args:
            batch: the call as rows.
            keyed: its keys.
            shared: path and digest of each argument that all rows share.
            places: the rows that were computed.
        """
        if self._ended or keyed.given:
            return ()
        if len(self._values) < _REMEMBERED:
            self._values[shared] = None
        if len(self._values) < 2 or not self._calls.is_due():  # most modules are called in one way
            return ()
        rows = _contents(batch, keyed)
        if rows is not None:
            self._again += self._calls.differing([rows[place] for place in places], shared)
        names = _ever_changing(tuple(self._values)) if self._again >= _AGAIN else ()
        self._ended = bool(names)
        return names


def _ever_changing(values: Sequence[Shared]) -> tuple[str, ...]:
    seen: dict[str, set[bytes]] = {}
    for shared in values:
        for path, digest in shared:
            seen.setdefault(path, set()).add(digest)
    return tuple(path for path, digests in seen.items() if len(digests) >= _MANY)


def _contents(batch: Batch, keyed: Keyed) -> list[bytes] | None:
    """A digest of each row that nothing counts in which all rows share; ``None`` where that takes too much."""
    try:
        if keyed.tokens is not None:
            return token_keys(batch, keyed.tokens, 0)
        columns = part_digests(keyed)
    except Exception:  # the forward freed it; a hint is not worth an error in the user's loop
        return None
    if not columns or any(column is None for column in columns):
        return None
    return [b"".join(row) for row in zip(*[column for column in columns if column is not None], strict=True)]
