"""Rows that miss for little are noticed, on a few hundred of them, and it is said once."""

import warnings

import pytest
import torch
from torch import nn

from modcache import CacheWarning, cache_of, cached_module
from modcache.batch import split
from modcache.keys.registry import is_row
from modcache.misses import PaddingWatch

from .models import TokenEncoder


def padded(rows, width=None):
    """Ids and mask of lists of ids, padded on the right."""
    width = max(map(len, rows)) if width is None else width
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


def batch_of(ids, mask, **more):
    return split([("input_ids", ids), ("attention_mask", mask), *more.items()], frozenset(), is_row)


# --- padding --------------------------------------------------------------------------------------------


def test_padding_is_noticed():
    """A row that was computed at another padded width is noticed, once; the same width, or another row, is not."""
    watch = PaddingWatch()
    assert not watch.notices(batch_of(*padded([[1, 2], [3]])), [0, 1])
    assert not watch.notices(batch_of(*padded([[5, 2], [4]])), [0, 1])
    assert not watch.notices(batch_of(*padded([[1, 2], [3]], 5)), [])
    assert watch.notices(batch_of(*padded([[1, 2], [3]], 5)), [1])
    assert not watch.notices(batch_of(*padded([[1, 2], [3]], 6)), [0, 1])


def epoch(watch, rows, width):
    """Whether any batch of an epoch is noticed, at this padded width."""
    batches = [rows[start : start + 32] for start in range(0, len(rows), 32)]
    return [watch.notices(batch_of(*padded(batch, width)), range(len(batch))) for batch in batches]


def test_padding_is_noticed_in_a_later_epoch():
    """Of a data set much larger than what is remembered, rows are known again; what is remembered has a bound."""
    watch = PaddingWatch()
    rows = [[number] for number in range(1, 6000)]
    assert not any(epoch(watch, rows, 1))
    assert len(watch._widths._noted) <= 512
    assert not any(epoch(watch, rows, 1))
    assert any(epoch(watch, rows, 2))


def test_padding_is_not_looked_for_where_there_is_none():
    """A batch that is not one of tokens, or that holds something without content, is left alone."""
    watch = PaddingWatch()
    assert not watch.notices(split([("x", torch.zeros(2))], frozenset(), is_row), [0])
    assert not watch.notices(batch_of(*padded([[1], [2]]), extra=[object(), object()]), [0])


# --- what all rows share --------------------------------------------------------------------------------


class Trained(nn.Module):
    """Takes what a trainer passes on to every model, and does not look at it."""

    def __init__(self):
        super().__init__()
        self.inner = TokenEncoder()

    def forward(self, input_ids, attention_mask, **kwargs):
        return self.inner(input_ids, attention_mask)


class Scaled(nn.Module):
    """Has an option, which counts."""

    def forward(self, x, scale=1):
        return x * scale


NAMED = "num_items_in_batch, which all rows of a call share, had many values in many calls"


@pytest.mark.parametrize("key", [None, "tokens"])
def test_a_count_that_a_trainer_passes_on_is_named(key):
    """Epochs in which nothing ever hits, because one number differs, are told of once, by its name."""
    cached = cached_module(Trained(), freeze=True, key=key)
    rows = [[1, number] for number in range(8)]
    with pytest.warns(CacheWarning, match=NAMED) as told:
        for step in range(100):
            cached(*padded(rows), num_items_in_batch=torch.tensor(step))
    assert len(told) == 1
    assert cache_of(cached).stats.hits == 0


def test_an_option_of_some_values_is_none():
    """The same rows with each value of an option are no reason for a word."""
    cached = cached_module(Scaled(), freeze=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        for scale in [*range(50), *range(50)]:
            cached(torch.ones(3, 2) * torch.arange(3.0)[:, None], scale=scale)


def test_a_clock_is_none_where_rows_are_new_anyhow():
    """Rows that were never computed before miss whatever they share."""
    cached = cached_module(Scaled(), freeze=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        for step in range(200):
            cached(100 * step + torch.arange(6.0).reshape(3, 2), scale=step)


def test_given_keys_are_the_callers():
    """Who names the rows is not told what they are made of."""
    cached = cached_module(Scaled(), freeze=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        for step in range(200):
            cached(torch.arange(6.0).reshape(3, 2), scale=step, cache_keys=[1, 2, 3])


def test_rows_that_cannot_be_read_again_are_left_alone():
    """A row whose key takes a function of the user's, or a file, is not asked for it a second time for a hint."""
    asked = []

    def key(row):
        asked.append(row)
        return row.tolist()[0]

    cached = cached_module(Scaled(), freeze=True, key=key)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        for step in range(200):
            cached(torch.arange(6.0).reshape(3, 2), scale=step)
    assert len(asked) == 600
