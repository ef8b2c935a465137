"""A row that depends on more than itself is found out by running a few rows once more."""

import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modcache import CacheWarning, cache_of, cached_module
from modcache.batch import split
from modcache.keys.registry import is_row
from modcache.outputs import rows_of
from modcache.selfcheck import lengths_of, rows_to_check, sizes_of

from .models import BatchCoupled, Dropout, Noisy, Normalised

CPU = torch.device("cpu")


def rows(output):
    return rows_of(output, 2, CPU)


@given(st.integers(1, 12), st.booleans(), st.randoms(use_true_random=False))
def test_rows_to_check(count, ragged, chance):
    """Two rows that are no pair, at other places than before; of four or fewer one, in another number; the shortest."""
    places = chance.sample(range(100), count)
    sizes = [chance.random() for _ in places]
    lengths = [chance.randrange(1, 5) for _ in places] if ragged else None
    chosen = rows_to_check(places, sizes, lengths)
    numbers = [places.index(place) for place in chosen]
    assert set(chosen) <= set(places)
    if lengths is not None:
        assert min(lengths[number] for number in numbers) == min(lengths)
    if count <= 4:
        assert len(set(chosen)) == 1
        assert len(chosen) > 1
        assert len(chosen) != count
        return
    first, second = numbers
    assert first != second
    if lengths is None:
        assert first + second != count - 1
        assert first // 2 != second // 2
        assert abs(first - second) * 2 != count
        assert first != 0
        assert second != count - 1
        assert first % 2 != 0 or second % 2 != 1


@pytest.mark.parametrize("count", range(2, 13))
@pytest.mark.parametrize("place", range(12))
def test_the_shortest_row_is_checked_wherever_it_is(count, place):
    """Also at an end of the batch, where its partners are few."""
    shortest = place % count
    lengths = [5] * count
    lengths[shortest] = 2
    assert shortest in rows_to_check(list(range(count)), [1.0] * count, lengths)


def test_sizes_and_lengths():
    """The size of a row is its largest value; its length is told where inputs differ in it."""
    assert sizes_of(rows((torch.tensor([1, 9]), torch.tensor([[1.0, -5.0], [torch.nan, 2.0]])))) == [5.0, 0.0]
    assert sizes_of(rows(torch.tensor([3j, 4 + 3j]))) == [3.0, 5.0]
    assert sizes_of(rows(torch.tensor([1, 9]))) == [0.0, 0.0]

    def found(value):
        return lengths_of(split([("x", value)], frozenset(), is_row), [0, 1])

    assert found(["a", "bcd"]) == [1, 3]
    assert found([torch.zeros(2, 2), torch.zeros(3)]) == [4, 3]
    assert found([np.zeros(2), np.zeros(3)]) == [2, 3]
    assert found(["a", 5]) == [1, 0]
    assert found(["a", "b"]) is None
    assert found(torch.zeros(2, 3)) is None


class NoTensors(nn.Module):
    """Returns nothing that has rows."""

    def forward(self, x):
        return {"kind": "constant", "none": None}


def test_an_output_without_tensors():
    """A module that returns constants alone gives them, on every call."""
    cached = cached_module(NoTensors(), freeze=True)
    for count in (1, 2, 5, 5):
        assert cached(torch.randn(count, 2)) == {"kind": "constant", "none": None}


COUPLED = {"noisy": Noisy, "coupled": BatchCoupled}


@pytest.mark.parametrize("kind", COUPLED)
def test_rows_that_depend_on_more_than_themselves(kind):
    """A module that is random, or whose rows interact, is found out and runs uncached; its outputs are its own."""
    cached, x = cached_module(COUPLED[kind](), freeze=True), torch.randn(6, 3)
    state = torch.get_rng_state()
    with pytest.warns(CacheWarning, match="it did not give the same rows"):
        found = cached(x)
    torch.set_rng_state(state)
    assert torch.equal(found, COUPLED[kind]()(x))
    cached(x)
    assert dict(cache_of(cached).stats.reasons) == {"self-check failed": 12}
    assert cache_of(cached).store.stats().rows == 0


@pytest.mark.parametrize("model", [Dropout, Normalised])
def test_eval_makes_rows_of_their_own(model):
    """Dropout and batch norm are cached in eval, and bypassed in training."""
    plain, cached, x = model().eval(), cached_module(model(), freeze=True), torch.randn(6, 3)
    for _ in range(2):
        torch.testing.assert_close(cached(x), plain(x))
    assert cache_of(cached).stats.hits == 6
    trained = model().requires_grad_(False)
    with pytest.warns(CacheWarning, match="training mode"):
        trained = cached_module(trained)
    with pytest.warns(CacheWarning, match="training mode"):
        trained(x)
    assert dict(cache_of(trained).stats.reasons) == {"training mode": 6}


class _Of(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


CHANCES = {
    "a path dropped now and then": lambda x: x * (torch.rand(len(x), 1) > (0.1 if len(x) > 1 else 0.4)),
    "a sampled label": lambda x: torch.bernoulli(torch.sigmoid(x[:, 0])),
    "a rare dropout": lambda x: nn.functional.dropout(x, 0.1, training=True),
    "python's random": lambda x: x * (1 if random.random() > 0.3 else 2),
    "numpy's random": lambda x: x.roll(int(np.random.randint(0, 2)), 1),
}


@pytest.mark.parametrize("kind", CHANCES)
@pytest.mark.parametrize("count", [1, 8])
def test_chance_that_is_rare_or_coarse(kind, count):
    """A module that draws random numbers is run several times more, also on a single row, until they show."""
    for number in range(8):
        torch.manual_seed(number)
        np.random.seed(number)
        random.seed(number)
        module = cached_module(_Of(CHANCES[kind]).eval())
        batch = torch.randn(count, 24).round(decimals=1)
        with pytest.warns(CacheWarning, match="it draws random numbers|run again on a few rows"):
            module(batch)
        assert cache_of(module).stats.bypassed == count


def test_a_module_that_draws_and_makes_no_use_of_it_is_cached():
    """Some encoders draw for layers that they drop in training only; the user's random numbers go on as they would."""
    calls = []

    def draws(x):
        calls.append(len(x))
        return x * 2 + 0 * torch.rand(())

    module = cached_module(_Of(draws).eval())
    torch.manual_seed(3)
    batch = torch.randn(4, 3)
    for _ in range(2):
        for row in batch.split(1):
            module(row)
    assert cache_of(module).stats.hits == 4
    many = len(calls)
    assert many < 4 + 32, "only the first single row is run again and again"
    module(batch)
    module(batch)
    assert cache_of(module).stats.hits == 12, "what was stored row by row is served"
    torch.manual_seed(5)
    draws(batch)
    expected = torch.rand(3)
    torch.manual_seed(5)
    module(torch.randn(4, 3, generator=torch.Generator().manual_seed(9)))
    torch.testing.assert_close(torch.rand(3), expected)


INTERACTING = {
    "scaled by the largest": lambda x: x / x.abs().max(),
    "less the first": lambda x: x - x[:1],
    "less the last": lambda x: x - x[-1:],
    "less the median": lambda x: x - x.median(0).values,
    "place": lambda x: x + torch.arange(len(x))[:, None],
    "parity of the place": lambda x: x * (1 - 2 * (torch.arange(len(x)) % 2))[:, None],
    "turned over": lambda x: x.flip(0),
    "rolled": lambda x: x.roll(1, 0),
    "rank": lambda x: x[:, 0].argsort().argsort(),
    "partners": lambda x: x.view(-1, 2, 3).flip(1).reshape(x.shape) if len(x) % 2 == 0 else x,
    "halves": lambda x: x.roll(len(x) // 2, 0) if len(x) % 2 == 0 else x,
}


@pytest.mark.parametrize("kind", INTERACTING)
@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_rows_of_small_batches_that_depend_on_each_other(kind, count):
    """They are found out at the first batch, whichever rows that is made of."""
    if kind in ("partners", "halves") and count % 2:
        pytest.skip("no pairs in it")
    for number in range(10):
        torch.manual_seed(number)
        module = cached_module(_Of(INTERACTING[kind]).eval())
        with pytest.warns(CacheWarning, match="run again on a few rows"):
            module(torch.randn(count, 3))


SHARED = {
    "factors": (lambda x, w: x * w, torch.ones),
    "no mask yet": (lambda x, w: x.masked_fill(w, 0.0), lambda size: torch.zeros(size, dtype=torch.bool)),
    "a square": (lambda x, w: (x[:, None] + w).softmax(-1).sum(1), lambda size: torch.zeros(size, size)),
    "a list": (lambda x, w: x * torch.tensor(w), lambda size: [1.0] * size),
}


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_a_shared_argument_of_the_size_of_the_batch_that_changes_nothing_yet(kind, count):
    """A table of ones says nothing by its values, but some rows of it do not fit."""
    function, table = SHARED[kind]
    module = cached_module(_Of(function).eval())
    with pytest.warns(CacheWarning, match="name it in broadcast="):
        module(torch.randn(count, count), table(count))


LOOKED_UP = {
    "index": lambda ids, table: table[ids],
    "one of many": lambda ids, table: (ids[:, None] == torch.arange(len(table))).float() @ table,
}


@pytest.mark.filterwarnings("ignore::modcache.CacheWarning")
@pytest.mark.parametrize("kind", LOOKED_UP)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_table_of_the_size_of_the_batch_that_rows_look_into(kind, count):
    """A row that finds itself in the table says nothing; among others of the batch it finds another one."""
    plain = LOOKED_UP[kind]
    for number in range(8):
        torch.manual_seed(number)
        module, table = cached_module(_Of(plain).eval()), torch.randn(count, 3)
        for ids in (torch.arange(count), *torch.randint(0, count, (4, count))):
            assert torch.equal(module(ids, table), plain(ids, table))
        assert cache_of(module).stats.hits == 0


def test_copies_that_do_not_fit_into_memory():
    """Where three copies of a row have no room, one of it is looked at."""
    sizes = []

    def small(x):
        sizes.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return x * 2

    module = cached_module(_Of(small).eval())
    batch = torch.randn(2, 3)
    module(batch)
    module(batch)
    assert sizes == [2, 3, 1]
    assert cache_of(module).stats.hits == 2


class _Failing(nn.Module):
    """Raises when the next of its answers says so."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def forward(self, x):
        if next(self.answers, False):
            raise TimeoutError("the time is up")
        return x * 2


def test_a_forward_that_fails_once_is_no_finding():
    """What fails once (a file, a service, an alarm) is run again before it is judged; what fails twice is."""
    batch = torch.randn(6, 3)
    module = cached_module(_Failing(iter([False, True])).eval())
    for _ in range(2):
        assert torch.equal(module(batch), batch * 2)
    assert (cache_of(module).stats.computed, cache_of(module).stats.hits) == (6, 6)
    module = cached_module(_Failing(iter([False, True, True])).eval())
    with pytest.warns(CacheWarning, match="on some of the rows of the batch alone it raises TimeoutError"):
        module(batch)


@pytest.mark.parametrize("twice", [False, True])
def test_a_part_that_fails_once_is_no_finding(twice):
    """The call runs uncached, and later ones too only if the part fails a second time."""
    batch = torch.randn(6, 3)
    module = cached_module(_Failing(iter([False, False, True, False, twice])).eval())
    module(batch[:3])
    match = "it runs uncached from now on" if twice else "that call ran uncached"
    with pytest.warns(CacheWarning, match=f"raised TimeoutError on some of its rows .*; {match}"):
        assert torch.equal(module(batch), batch * 2)
    for _ in range(2):
        assert torch.equal(module(batch), batch * 2)
    assert cache_of(module).stats.hits == (0 if twice else 9)


# --- batches of equal rows ------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [[], [[3]], [[0, 1, 2]], [[0, 1, 2], [3]]], ids=str)
def test_a_batch_of_equal_rows_does_not_pass_for_rows(before):
    """The state of a GRU has the layers first, of which one looks like the row that equal rows are computed as."""
    module = cached_module(nn.GRU(4, 3, batch_first=True), freeze=True)
    plain = nn.GRU(4, 3, batch_first=True).requires_grad_(False).eval()
    plain.load_state_dict(module.state_dict())
    x = torch.randn(4, 5, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CacheWarning)
        for places in (*before, [3, 3, 3], [3, 3, 3], [3], [3, 3]):
            for found, expected in zip(module(x[places]), plain(x[places]), strict=True):
                torch.testing.assert_close(found, expected)


class Summed(nn.Module):
    """Divides each row by the sum over its batch."""

    def forward(self, x):
        return x / x.sum(0)


def test_equal_rows_that_depend_on_their_number_are_found_out():
    """One row alone is all of its batch; in two copies it is a half of it."""
    module = cached_module(Summed().eval())
    x = torch.full((4, 3), 2.0)
    with pytest.warns(CacheWarning, match="did not give the same rows"):
        assert torch.equal(module(x), torch.full((4, 3), 0.25))
    assert torch.equal(module(x[:2]), torch.full((2, 3), 0.5))


def test_equal_rows_hit_once_they_were_checked():
    """A batch of equal rows is computed as one row, run once more in two copies, and served from then on."""
    batches = []

    class Twice(nn.Module):
        def forward(self, x):
            batches.append(len(x))
            return x * 2

    module = cached_module(Twice().eval())
    x = torch.ones(4, 3)
    for rows in (x, x, x[:1], x[:3]):
        assert torch.equal(module(rows), rows * 2)
    assert batches == [1, 2]
    assert (cache_of(module).stats.computed, cache_of(module).stats.hits) == (1, 11)


@pytest.mark.parametrize("how", ["given", "function"])
def test_different_inputs_of_one_key_are_named_as_a_cause(how):
    """Where the keys come from the user, that they do not tell inputs apart is the first thing to look at."""
    options = {"key": lambda row: 1} if how == "function" else {}
    cached = cached_module(nn.Linear(3, 4), freeze=True, **options)
    more = [{"cache_keys": keys} if how == "given" else {} for keys in ([1] * 8, list(range(8)))]
    with pytest.warns(CacheWarning, match="What to do: if different inputs have the same key, give them keys"):
        for number in range(2):
            cached(torch.arange(24.0).reshape(8, 3) + number, **more[number])
