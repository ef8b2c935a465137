"""What counts of all that was said about keys: the latest word, in whatever order the logs were read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modcache.stores.disk.statements import Statements
from modcache.stores.disk.window import ROW_BITS
from tests.contracts import keys

KEYS = keys(*range(6))

# A log: frames that name some keys, as rows or as dropped ones.
frames = st.tuples(st.booleans(), st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True))
logs = st.lists(st.lists(frames, max_size=5), min_size=1, max_size=4)


@st.composite
def told(draw):
    """Logs with stamps that ascend within each, and an order in which their frames are read."""
    whole = draw(logs)
    stamps = iter(draw(st.permutations(range(1, 1 + sum(map(len, whole))))))
    dated = [sorted([next(stamps) for _ in log]) for log in whole]
    turns = draw(st.permutations([number for number, log in enumerate(whole) for _ in log]))
    return whole, dated, turns


@given(told())
def test_the_latest_word_counts(logs_told):
    """Whatever the order in which several logs are read, each key has the place that was said last."""
    whole, dated, turns = logs_told
    when: dict[int, int] = {}
    said = Statements(lambda places: np.array([when[place] for place in places.tolist()], np.int64))
    latest: dict[int, tuple[int, int | None]] = {}
    done, rows = [0] * len(whole), [0] * len(whole)
    for number in turns:
        (is_rows, named), stamp = whole[number][done[number]], dated[number][done[number]]
        done[number] += 1
        joined, stamps = b"".join(KEYS[n] for n in named), np.full(len(named), stamp)
        if is_rows:
            places = np.arange(rows[number], rows[number] + len(named)) | (number << ROW_BITS)
            rows[number] += len(named)
            when |= dict.fromkeys(places.tolist(), stamp)
            said.take_in(joined, places, stamps)
        else:
            said.take_out(joined, stamps)
        for place, n in enumerate(named):
            if stamp > latest.get(n, (0, None))[0]:
                latest[n] = stamp, int(places[place]) if is_rows else None
    want = [latest.get(n, (0, None))[1] for n in range(6)]
    assert said.locate(KEYS)[0].tolist() == [-1 if place is None else place for place in want]
    assert sorted(said.keys()) == sorted(key for key, place in zip(KEYS, want, strict=True) if place is not None)


def statements(when):
    return Statements(lambda places: np.array([when[place] for place in places.tolist()], np.int64))


def test_the_last_of_equal_keys_in_a_log_counts():
    """When one log names a key twice, its later row counts, also among many."""
    said = statements({})
    many = keys(*range(100))
    said.take_in(b"".join([*many, many[3]]), np.arange(101), np.ones(101, np.int64))
    assert said.locate([many[3], many[4]])[0].tolist() == [100, 4]
    assert len(said) == 100


def test_what_was_hidden_stays_hidden():
    """After all was dropped, rows that were said before do not come back, later ones do."""
    said = statements({0: 5})
    said.take_in(KEYS[0], np.array([0]), np.array([5]))
    assert said.hide(7) == 1
    said.take_in(KEYS[0] + KEYS[1], np.array([1, 2]), np.array([7, 8]))
    assert said.locate(KEYS[:2])[0].tolist() == [-1, 2]


def test_own_rows_are_said_just_now():
    """A row of our own is not held back by a key that was dropped before."""
    said = statements({})
    assert said.delete([KEYS[0]], 5) == 0
    said.take_in(KEYS[0], np.array([0]), np.array([4]))
    assert said.locate(KEYS[:1])[1] is False
    said.set(KEYS[0], 9)
    assert said.locate(KEYS[:1])[0].tolist() == [9]


@pytest.mark.parametrize("ask", ["locate", "len", "keys", "delete", "at", "take_in", "take_out", "hide", "forget"])
def test_own_rows_count_before_they_are_settled(ask):
    """Rows of our own are there for whatever is asked first, and are noted in the order in which they were said."""
    said = statements({0: 5, 7: 6})
    said.take_in(KEYS[0], np.array([0]), np.array([5]))
    said.set(KEYS[0] + KEYS[1], 7)
    said.set(KEYS[1] + KEYS[2], 20)
    said.settle()  # not so few
    if ask == "locate":
        assert said.locate(KEYS[:4])[0].tolist() == [7, 20, 21, -1]
    elif ask == "len":
        assert len(said) == 3
    elif ask == "keys":
        assert sorted(said.keys()) == sorted(KEYS[:3])
    elif ask == "delete":
        assert said.delete(KEYS[1:4], 9) == 2
        assert said.locate(KEYS[:3])[0].tolist() == [7, -1, -1]
    elif ask == "at":
        assert said.at(b"".join(KEYS[:3]), np.array([7, 8, 21])).tolist() == [True, False, True]
    elif ask == "take_in":
        said.take_in(KEYS[0], np.array([3]), np.array([4]))
        assert said.locate(KEYS[:1])[0].tolist() == [7], "what was said before does not count"
    elif ask == "take_out":
        said.take_out(KEYS[0], np.array([6]))
        assert said.locate(KEYS[:2])[0].tolist() == [-1, 20]
    elif ask == "hide":
        assert said.hide(9) == 3
        assert said.locate(KEYS[:3])[0].tolist() == [-1, -1, -1]
    else:
        said.forget(KEYS[:2])
        assert said.locate(KEYS[:3])[0].tolist() == [-1, -1, 21]


@pytest.mark.parametrize("count", [100, 20_000])
def test_own_rows_are_settled_in_bulk(count):
    """Few or many rows of our own that were put without a question are all found after they were settled."""
    said, many = statements({}), keys(*range(count))
    for first in range(0, count, 100):
        said.set(b"".join(many[first : first + 100]), first)
    said.set(b"".join(many[:100]), count)
    said.settle(0)
    assert len(said) == count
    assert said.locate(many)[0].tolist() == [*range(count, count + 100), *range(100, count)]


def test_what_is_forgotten_may_be_said_again():
    """Rows that were not there after all are forgotten without a word about later, or earlier ones."""
    said = statements({0: 5})
    said.take_in(KEYS[0], np.array([0]), np.array([5]))
    said.forget([KEYS[0]])
    said.take_in(KEYS[0], np.array([3]), np.array([2]))
    assert said.locate(KEYS[:1])[0].tolist() == [3]


def test_segments_are_forgotten_from_a_row_on():
    """The rows of some segments go, those before a row and those of others stay."""
    said = statements({})
    places = [0, 1, 2, 1 << ROW_BITS, (1 << ROW_BITS) + 1, 2 << ROW_BITS]
    said.set(b"".join(KEYS[:3]), 0)
    said.set(b"".join(KEYS[3:5]), 1 << ROW_BITS)
    said.set(KEYS[5], 2 << ROW_BITS)
    assert said.forget_segments([0, 1], 1) == 3
    assert said.locate(KEYS)[0].tolist() == [0, -1, -1, 1 << ROW_BITS, -1, 2 << ROW_BITS]
    assert said.at(b"".join(KEYS), np.array(places)).tolist() == [True, False, False, True, False, True]
