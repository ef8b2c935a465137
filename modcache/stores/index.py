"""Find the places of many 16-byte keys at once, at no more than 64 bytes a key."""

from __future__ import annotations

import struct
from itertools import repeat
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["KEY_BYTES", "KeyIndex", "Places", "cut_keys"]

KEY_BYTES: Final = 16
ABSENT: Final = -1

_SLOTS = 8  # of eight bytes: a bucket is one cache line
_LOAD = 0.45  # of a table that was just built
_FULL = 0.65  # about 3 % of the keys do not fit their bucket here
_CHUNK = 1 << 16  # keys inserted at a time; larger chunks fall out of the cache
_ENTRY = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)

Places = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]


class KeyIndex:
    """Where the rows of 16-byte keys lie: key to a number that is 0 or more.

    The newest keys are in a dict, which is quickest up to some ten thousands but takes 140 bytes a key. From
    time to time they are merged in bulk into a packed table, which is quickest at millions and takes 45.
    A key is in exactly one of the two.

    Args:
        newest: how many keys the dict may gather before they are merged.

    >>> index = KeyIndex()
    >>> index.set([b"a" * 16, b"b" * 16], np.array([0, 1]))
    >>> index.find([b"b" * 16, b"c" * 16])
    array([ 1, -1])
    """

    def __init__(self, newest: int = 1 << 16) -> None:
        self._newest = newest
        self._merge_at = newest
        self._young: dict[bytes, int] = {}
        self._old = _PackedTable(0)

    def __len__(self) -> int:
        return len(self._young) + self._old.live

    def find(self, keys: Sequence[bytes]) -> Places:
        """The place of each key, -1 where it is absent."""
        if not self._old.live:
            return _look_up(self._young, keys)
        joined = b"".join(keys)
        entries = self._old.find(joined)
        places: Places = self._old.places.take(entries, mode="clip")
        absent = np.flatnonzero(entries < 0)
        if len(absent):
            places[absent] = (
                _look_up(self._young, [keys[i] for i in absent.tolist()]) if self._young else ABSENT
            )
        return places

    def set(self, keys: Sequence[bytes], places: Places) -> None:
        """Notes where keys lie, whether they are new or not; of a key that occurs twice the last counts."""
        if self._old.live:
            entries = self._old.find(b"".join(keys))
            known = entries >= 0
            if known.any():
                # Of equal keys the last wins: numpy promises that for indexed writes.
                self._old.places[entries[known]] = places[known]
                new = np.flatnonzero(~known)
                keys, places = [keys[i] for i in new.tolist()], places[new]
        self._young.update(zip(keys, places.tolist(), strict=False))
        if len(self._young) > self._merge_at:
            self._merge()

    def delete(self, keys: Sequence[bytes]) -> Places:
        """Forgets keys; where each lay, -1 where it was absent (also for the second of two equal keys)."""
        pop = self._young.pop
        places = np.fromiter(map(pop, keys, repeat(ABSENT)), np.int64, len(keys))
        if self._old.live:
            rest = np.flatnonzero(places < 0)
            places[rest] = self._old.delete(b"".join([keys[i] for i in rest.tolist()]))
        return places

    def keys(self) -> list[bytes]:
        """All keys, in no particular order."""
        return [*self._young, *cut_keys(self._old.joined_keys())]

    def _merge(self) -> None:
        joined, places = b"".join(self._young), np.fromiter(self._young.values(), np.int64, len(self._young))
        if self._old.live + len(places) > self._old.room:
            joined, places = (
                joined + self._old.joined_keys(),
                np.concatenate([places, self._old.live_places()]),
            )
            self._old = _PackedTable(len(places))
        self._young = {}
        for start in range(0, len(places), _CHUNK):
            words = _words(joined[start * KEY_BYTES : (start + _CHUNK) * KEY_BYTES])
            left = self._old.insert(words, places[start : start + _CHUNK])
            self._young.update(
                zip(
                    cut_keys(words[left].tobytes()),
                    places[start : start + _CHUNK][left].tolist(),
                    strict=False,
                )
            )
        # Keys that found their bucket full are tried again, but not so often that it would cost a square.
        self._merge_at = max(self._newest, 2 * len(self._young))


def cut_keys(joined: bytes) -> list[bytes]:
    """The keys that stand one behind the other."""
    return [joined[i : i + KEY_BYTES] for i in range(0, len(joined), KEY_BYTES)]


def _look_up(young: dict[bytes, int], keys: Sequence[bytes]) -> Places:
    # struct.pack is five times quicker than np.fromiter and fifteen times than np.array of a list.
    try:
        return np.frombuffer(struct.pack(f"{len(keys)}q", *map(young.__getitem__, keys)), np.int64)
    except KeyError:
        found = map(young.get, keys, repeat(ABSENT))
        return np.frombuffer(struct.pack(f"{len(keys)}q", *found), np.int64)


def _words(joined: bytes) -> _Words:
    return np.frombuffer(joined, np.uint64).reshape(-1, 2)


class _PackedTable:
    """Buckets of eight slots; a slot is a 32-bit tag of the key and the 32-bit number of its entry.

    Two keys with one tag never share a bucket (the second stays outside), so a look-up has at most one
    candidate, and one comparison of all candidates' keys proves them. Tag 0 is not used: an empty slot is 0.
    """

    def __init__(self, expected: int) -> None:
        buckets = max(1, int(expected / (_LOAD * _SLOTS)))
        self.room = max(expected, int(buckets * _SLOTS * _FULL)) if expected else 0
        self.live = 0
        self.places: Places = np.empty(max(1, self.room), np.int64)
        self._keys: _Words = np.empty((max(1, self.room), 2), np.uint64)
        self._table: _Words = np.zeros((buckets, _SLOTS), np.uint64)
        self._used = 0  # entries that were ever in use; those below it that are free stand in _free
        self._free: Places = np.empty(0, np.int64)

    def find(self, joined: bytes) -> Places:
        """The entry of each key, -1 where it is absent."""
        words = _words(joined)
        buckets, tags = self._spots(words)
        slots = self._table.take(buckets, axis=0)
        slots ^= tags[:, None]
        entries: Places = slots[slots <= _ENTRY].view(np.int64)
        if len(entries) == len(words) and self._keys.take(entries, axis=0, mode="clip").tobytes() == joined:
            return entries
        return self._prove(words, slots)

    def _prove(self, words: _Words, slots: _Words) -> Places:
        wanted, columns = np.nonzero(slots <= _ENTRY)
        candidates = slots[wanted, columns].view(np.int64)
        right = (self._keys[candidates] == words[wanted]).all(axis=1)
        entries = np.full(len(words), ABSENT, np.int64)
        entries[wanted[right]] = candidates[right]
        return entries

    def insert(self, words: _Words, places: Places) -> npt.NDArray[np.bool_]:
        """Takes in keys that are not here; which of them stay outside, their bucket being full."""
        buckets, tags = self._spots(words)
        mixed = (buckets.astype(np.uint64) << _HALF) | (tags >> _HALF)
        order = np.argsort(mixed, kind="stable")
        mixed, buckets, tags = mixed[order], buckets[order], tags[order]
        here = self._table[buckets]
        clash = ((here & ~_ENTRY) == tags[:, None]).any(axis=1)
        clash[1:] |= mixed[1:] == mixed[:-1]
        order, buckets, tags, here = order[~clash], buckets[~clash], tags[~clash], here[~clash]
        first = np.flatnonzero(np.r_[True, buckets[1:] != buckets[:-1]][: len(buckets)])
        rank = np.arange(len(buckets)) - np.repeat(first, np.diff(np.r_[first, len(buckets)]))
        fits = rank < (here == 0).sum(axis=1)
        order, buckets, tags, here, rank = order[fits], buckets[fits], tags[fits], here[fits], rank[fits]
        free_first = np.argsort(here != 0, axis=1, kind="stable")
        entries = self._claim(len(order))
        self._table[buckets, free_first[np.arange(len(rank)), rank]] = tags | entries.view(np.uint64)
        self._keys[entries] = words[order]
        self.places[entries] = places[order]
        self.live += len(entries)
        left = np.ones(len(words), np.bool_)
        left[order] = False
        return left

    def delete(self, joined: bytes) -> Places:
        """Forgets keys; where each lay, -1 where it was absent (also for the second of two equal keys)."""
        entries = self.find(joined)
        gone, first = np.unique(entries, return_index=True)
        if len(gone) and gone[0] < 0:
            gone, first = gone[1:], first[1:]
        places = np.full(len(entries), ABSENT, np.int64)
        places[first] = self.places[gone]
        buckets, tags = self._spots(_words(joined)[first])
        columns = (self._table[buckets] == (tags | gone.view(np.uint64))[:, None]).argmax(axis=1)
        self._table[buckets, columns] = 0
        self.places[gone] = ABSENT
        self.live -= len(gone)
        self._free = np.concatenate([self._free, gone])
        return places

    def joined_keys(self) -> bytes:
        """All keys, one behind the other."""
        return self._keys[: self._used][self.places[: self._used] >= 0].tobytes()

    def live_places(self) -> Places:
        """Where all keys lie, in the order of `joined_keys`."""
        places = self.places[: self._used]
        return places[places >= 0]

    def _claim(self, count: int) -> Places:
        reused, self._free = self._free[:count], self._free[count:]
        fresh = np.arange(self._used, self._used + count - len(reused))
        self._used += len(fresh)
        return np.concatenate([reused, fresh])

    def _spots(self, words: _Words) -> tuple[Places, _Words]:
        """The bucket of each key, and its tag in the upper half of a word."""
        first, second = words[:, 0], words[:, 1]
        buckets = ((first >> _HALF) * np.uint64(len(self._table))) >> _HALF
        return buckets.view(np.int64), np.maximum(second, np.uint64(1) << _HALF) & ~_ENTRY
