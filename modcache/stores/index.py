"""Find the places of many 16-byte keys at once, at no more than 64 bytes a key."""

from __future__ import annotations

import functools
import struct
from itertools import repeat
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from .pages import zeros

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["KEY_BYTES", "KeyIndex", "Places", "cut_keys"]

KEY_BYTES: Final = 16
ABSENT: Final = -1

_SLOTS = 8  # of eight bytes: a bucket is one cache line
_LOAD = 0.45  # of a table that was just built
_FULL = 0.65  # about 3 % of the keys do not fit their bucket here
_CHUNK = 1 << 13  # keys inserted at a time; larger chunks fall out of the cache
_BULK = 1 << 13  # keys that are quicker inserted at once than noted in the dict first
_ENTRY = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ONES = np.uint64(0x0101010101010101)  # times eight flags: their number in the highest byte

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

    def __init__(self, newest: int = 1 << 14) -> None:
        self._newest = newest
        self._merge_at = newest
        self._young: dict[bytes, int] = {}
        self._old = _PackedTable()

    def __len__(self) -> int:
        return len(self._young) + self._old.live

    def find(self, keys: Sequence[bytes]) -> Places:
        """The place of each key, -1 where it is absent."""
        return self.locate(keys)[0]

    def locate(self, keys: Sequence[bytes]) -> tuple[Places, bool]:
        """The place of each key, -1 where it is absent, and whether all of them are here."""
        if not self._old.live:
            try:
                return _pack(map(self._young.__getitem__, keys), len(keys)), True
            except KeyError:
                return _pack(map(self._young.get, keys, repeat(ABSENT)), len(keys)), False
        entries = self._old.find(b"".join(keys))
        places: Places = self._old.places.take(entries, mode="clip")
        absent = np.flatnonzero(entries < 0)
        if not len(absent):
            return places, True
        found = _pack(map(self._young.get, [keys[i] for i in absent.tolist()], repeat(ABSENT)), len(absent))
        places[absent] = found
        return places, bool(found.min() >= 0)

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

    def find_joined(self, joined: bytes) -> Places:
        """The place of each of many keys that stand one behind the other, -1 where it is absent."""
        if not self._old.live:
            return self.find(cut_keys(joined))
        entries = self._old.find(joined)
        places: Places = np.where(entries < 0, ABSENT, self._old.places.take(entries, mode="clip"))
        if self._young:
            absent = np.flatnonzero(entries < 0)
            keys = cut_keys(_words(joined)[absent].tobytes())
            places[absent] = _pack(map(self._young.get, keys, repeat(ABSENT)), len(keys))
        return places

    def set_joined(self, joined: bytes, places: Places) -> None:
        """As `set`, for many keys that stand one behind the other: a fourth of the time for a million new ones."""
        words = _words(joined)
        if len(words) < min(self._newest, _BULK) or _any_equal(words[:, 0]):
            self.set(cut_keys(joined), places)
            return
        if len(self):
            new = self.find_joined(joined) < 0
            if not new.all():
                known = np.flatnonzero(~new)
                self.set(cut_keys(words[known].tobytes()), places[known])
                words, places = words[new], places[new]
        self._take_in(words, places)

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
        words, places = _words(b"".join(self._young)), np.fromiter(self._young.values(), np.int64)
        self._young = {}
        self._take_in(words, places)
        # Keys that found their bucket full are tried again, but not so often that it would cost a square.
        self._merge_at = max(self._newest, 2 * len(self._young))

    def _take_in(self, words: _Words, places: Places) -> None:
        """Keys that are not in the table go there, or into the dict where their bucket is full."""
        for left, left_places in (
            self._old.make_room(len(words)),
            *(self._old.insert(words[i : i + _CHUNK], places[i : i + _CHUNK]) for i in range(0, len(words), _CHUNK)),
        ):
            self._young.update(zip(cut_keys(left.tobytes()), left_places.tolist(), strict=True))


def cut_keys(joined: bytes) -> list[bytes]:
    """The keys that stand one behind the other."""
    return [joined[i : i + KEY_BYTES] for i in range(0, len(joined), KEY_BYTES)]


def _pack(places: Iterable[int], count: int) -> Places:
    # A struct is five times quicker than np.fromiter and fifteen times than np.array of a list. Numpy copies
    # indices that it could not write to, hence the bytearray.
    packed = bytearray(8 * count)
    _integers(count).pack_into(packed, 0, *places)
    return np.frombuffer(packed, np.int64)


@functools.lru_cache(maxsize=64)
def _integers(count: int) -> struct.Struct:
    return struct.Struct(f"{count}q")


def _words(joined: bytes) -> _Words:
    return np.frombuffer(joined, np.uint64).reshape(-1, 2)


def _any_equal(numbers: npt.NDArray[np.uint64]) -> bool:
    ordered = np.sort(numbers)
    return bool((ordered[1:] == ordered[:-1]).any())


def _eights(flags: npt.NDArray[np.bool_]) -> _Words:
    """Eight flags as one word: a tenth of the time of a reduction over the short axis."""
    return np.ascontiguousarray(flags).view(np.uint64)[:, 0]


class _PackedTable:
    """Buckets of eight slots; a slot is a 32-bit tag of the key and the 32-bit number of its entry.

    Two keys with one tag never share a bucket (the second stays outside), so a look-up has at most one
    candidate, and one comparison of all candidates' keys proves them. Tag 0 is not used: an empty slot is 0.
    The slots in use are the first ones of a bucket. An entry is a key and its place.
    """

    def __init__(self) -> None:
        self.live = 0
        self.places: Places = zeros((0,), np.int64)
        self._keys: _Words = zeros((0, 2), np.uint64)
        self._used = 0  # entries that were ever in use; those below it that are free stand in _free
        self._free: Places = np.empty(0, np.int64)
        self._table: _Words = zeros((1, _SLOTS), np.uint64)

    def find(self, joined: bytes) -> Places:
        """The entry of each key, -1 where it is absent."""
        words = _words(joined)
        buckets, tags = self._spots(words)
        slots = self._table.take(buckets, axis=0)
        slots ^= tags[:, None]
        entries: Places = slots[slots <= _ENTRY].view(np.int64)
        if len(entries) == len(words) and self._keys.take(entries, axis=0).tobytes() == joined:
            return entries
        return self._prove(words, slots)

    def make_room(self, more: int) -> tuple[_Words, Places]:
        """Grows if so many keys more do not fit; the keys that have to leave, and where they lie."""
        wanted = self.live + more
        if wanted <= len(self._table) * _SLOTS * _FULL:
            return self._keys[:0], self.places[:0]
        old, self._table = self._table, zeros((int(wanted / (_SLOTS * _LOAD)) + 1, _SLOTS), np.uint64)
        leaving = [self._free[:0]]
        # Bucket after bucket of the old table means bucket after bucket of the new one, too.
        for start in range(0, len(old), _CHUNK // _SLOTS):
            slots = old[start : start + _CHUNK // _SLOTS]
            entries = (slots[slots != 0] & _ENTRY).view(np.int64)
            leaving.append(entries[~self._place(self._keys[entries], entries)])
        gone = np.concatenate(leaving)
        left = self._keys[gone], self.places[gone]
        self._release(gone)
        return left

    def insert(self, words: _Words, places: Places) -> tuple[_Words, Places]:
        """Takes in keys that are not here; those that stay outside, their bucket being full."""
        entries = self._claim(len(words))
        self._keys[entries], self.places[entries] = words, places
        self.live += len(entries)
        outside = ~self._place(words, entries)
        self._release(entries[outside])
        return words[outside], places[outside]

    def delete(self, joined: bytes) -> Places:
        """Forgets keys; where each lay, -1 where it was absent (also for the second of two equal keys)."""
        entries = self.find(joined)
        gone, first = np.unique(entries, return_index=True)
        gone, first = gone[gone >= 0], first[gone >= 0]
        places = np.full(len(entries), ABSENT, np.int64)
        places[first] = self.places[gone]
        buckets, tags = self._spots(_words(joined)[first])
        columns = (self._table[buckets] == (tags | gone.view(np.uint64))[:, None]).argmax(axis=1)
        self._table[buckets, columns] = 0
        self._table[buckets] = np.sort(self._table[buckets], axis=1)[:, ::-1]
        self._release(gone)
        return places

    def joined_keys(self) -> bytes:
        """All keys, one behind the other."""
        return self._keys[: self._used][self.places[: self._used] >= 0].tobytes()

    def _prove(self, words: _Words, slots: _Words) -> Places:
        wanted, columns = np.nonzero(slots <= _ENTRY)
        candidates = slots[wanted, columns].view(np.int64)
        right = (self._keys[candidates] == words[wanted]).all(axis=1)
        entries = np.full(len(words), ABSENT, np.int64)
        entries[wanted[right]] = candidates[right]
        return entries

    def _place(self, words: _Words, entries: Places) -> npt.NDArray[np.bool_]:
        """Notes entries in the slots of their buckets; which of them found one."""
        buckets, tags = self._spots(words)
        mixed = (buckets.view(np.uint64) << _HALF) | (tags >> _HALF)
        order = np.argsort(mixed)
        mixed, buckets, tags = mixed[order], buckets[order], tags[order]
        slots = self._table.take(buckets, axis=0)
        fits = _eights((slots ^ tags[:, None]) <= _ENTRY) == 0
        fits[1:] &= mixed[1:] != mixed[:-1]
        if not fits.all():  # mostly they do
            order, buckets, tags, slots = order[fits], buckets[fits], tags[fits], slots[fits]
        starts = np.flatnonzero(np.diff(buckets, prepend=-1))
        rank = np.arange(len(buckets)) - np.repeat(starts, np.diff(starts, append=len(buckets)))
        slot = (_eights(slots != 0) * _ONES >> np.uint64(56)).view(np.int64) + rank
        fits = slot < _SLOTS
        order = order[fits]
        self._table[buckets[fits], slot[fits]] = tags[fits] | entries[order].view(np.uint64)
        placed = np.zeros(len(words), np.bool_)
        placed[order] = True
        return placed

    def _claim(self, count: int) -> Places:
        reused, self._free = self._free[:count], self._free[count:]
        used = self._used + count - len(reused)
        if used > len(self.places):
            capacity = max(used, len(self.places) * 3 // 2)
            places, keys = self.places[: self._used], self._keys[: self._used]
            self.places, self._keys = zeros((capacity,), np.int64), zeros((capacity, 2), np.uint64)
            self.places[: self._used], self._keys[: self._used] = places, keys
        fresh = np.arange(self._used, used)
        self._used = used
        return np.concatenate([reused, fresh])

    def _release(self, entries: Places) -> None:
        self.places[entries] = ABSENT
        self._free = np.concatenate([self._free, entries])
        self.live -= len(entries)

    def _spots(self, words: _Words) -> tuple[Places, _Words]:
        """The bucket of each key, and its tag in the upper half of a word."""
        first, second = words[:, 0], words[:, 1]
        buckets = ((first >> _HALF) * np.uint64(len(self._table))) >> _HALF
        return buckets.view(np.int64), np.maximum(second, np.uint64(1) << _HALF) & ~_ENTRY
