"""Rows of tokens are the same whatever their padding, and come back padded."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modcache import CacheWarning, MemoryStore, cache_of, cached_module
from modcache.batch import split
from modcache.keys import tokens as tokens_extractor
from modcache.keys.padding import fit_tokens, pad_lent, pad_rows, token_dims, unpad_rows
from modcache.keys.registry import is_row
from modcache.keys.tokens import find_tokens, token_keys, token_metas, token_places
from modcache.outputs import rows_of, token_dims_of, tree_of
from modcache.rows import SINGLE, Layout, Rows

from .models import TokenEncoder

CPU = torch.device("cpu")


def padded(rows, width=None, dtype=torch.int64):
    """Ids and mask of lists of ids, padded on the right."""
    width = max([*map(len, rows), 1]) if width is None else width
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows]).reshape(len(rows), width)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], dtype=dtype)
    return ids, mask.reshape(len(rows), width)


def batch_of(ids, mask, **more):
    return split([("input_ids", ids), ("attention_mask", mask), *more.items()], frozenset(), is_row)


def keyed(ids, mask, **more):
    """Keys as the extractor makes them."""
    values = {"input_ids": ids, "attention_mask": mask, **more}
    return tokens_extractor()(list(values.items()), batch_of(ids, mask, **more))


sentences = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=4)


@given(sentences, st.integers(0, 3), st.integers(0, 3))
def test_padding_is_no_part_of_the_key(rows, more, other):
    """The same ids have the same key at any padded width; other ids have another."""
    width = max(map(len, rows))
    one, two = keyed(*padded(rows, width + more)), keyed(*padded(rows, width + other))
    assert one.keys == two.keys
    assert one.seed == two.seed
    assert [one.keys.index(key) for key in one.keys] == [rows.index(row) for row in rows]


@given(sentences)
def test_a_row_alone_has_the_key_that_it_has_among_others(rows):
    """Neighbours and their lengths do not matter."""
    assert keyed(*padded(rows)).keys == [keyed(*padded([row])).keys[0] for row in rows]


@given(sentences, st.integers(0, 3))
def test_lengths(rows, more):
    """The length of a row is the number of ones in its mask."""
    ids, mask = padded(rows, max(map(len, rows)) + more)
    found = find_tokens(batch_of(ids, mask))
    assert found.lengths.tolist() == list(map(len, rows))
    assert found.width == ids.shape[1]
    assert found.paths == ("input_ids", "attention_mask")


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int32, torch.float16, torch.bfloat16, torch.float32, torch.float64],
    ids=str,
)
def test_masks_of_any_dtype(dtype):
    """A mask may be of any dtype that ones and zeros can be written in, and can be resized afterwards."""
    ids, mask = padded([[1, 2], [3]], dtype=dtype)
    assert find_tokens(batch_of(ids, mask)).lengths.tolist() == [2, 1]
    mask.untyped_storage().resize_(0)


OTHER_MASKS = {
    "left": [[0, 1, 1], [1, 1, 1]],
    "holey": [[1, 0, 1], [1, 1, 1]],
    "an empty row": [[0, 0, 0], [1, 1, 1]],
    "weights": [[2, 1, 0], [1, 1, 1]],
    "packed": [[1, 2, 0], [1, 1, 1]],  # two texts in one row
    "additive": [[0, 0, -1], [0, 0, 0]],
}


@pytest.mark.parametrize("kind", OTHER_MASKS)
def test_other_masks_leave_the_padding_in_the_key(kind):
    """Where the mask is not ones and then zeros, the whole row is the key."""
    ids, mask = torch.tensor([[1, 2, 3], [1, 2, 3]]), torch.tensor(OTHER_MASKS[kind])
    assert find_tokens(batch_of(ids, mask)) is None
    found = keyed(ids, mask)
    assert found.tokens is None
    wider = torch.nn.functional.pad(ids, (0, 1)), torch.nn.functional.pad(mask, (0, 1))
    assert not set(found.keys) & set(keyed(*wider).keys)


def test_what_is_no_batch_of_tokens():
    """Without both arguments, in one shape of two dimensions, nothing is unpadded."""
    ids, mask = padded([[1, 2], [3]])
    plain = [("input_ids", ids)]
    assert find_tokens(split(plain, frozenset(), is_row)) is None
    assert find_tokens(split([("attention_mask", mask)], frozenset(), is_row)) is None
    assert find_tokens(batch_of(ids[:, :, None], mask[:, :, None])) is None
    assert find_tokens(batch_of(ids, mask[:, :1])) is None
    assert find_tokens(batch_of(ids[:, :0], mask[:, :0])) is None
    assert find_tokens(batch_of(ids.tolist(), mask)) is None
    assert find_tokens(batch_of(ids, mask.to_sparse())) is None


def test_columns_inside_of_a_mapping():
    """A `BatchEncoding` given as one argument holds the same columns under longer paths."""
    ids, mask = padded([[1, 2], [3]])
    batch = split([("batch", {"input_ids": ids, "attention_mask": mask})], frozenset(), is_row)
    found = find_tokens(batch)
    assert found.paths == ("batch['input_ids']", "batch['attention_mask']")
    assert tokens_extractor().reads(batch)
    assert not tokens_extractor().reads(split([("x", ids)], frozenset(), is_row))


def test_which_columns_are_per_token():
    """Known names always; anything else of that width if it is zero beyond each row's length."""
    ids, mask = padded([[1, 2, 3], [4]])
    clean, dirty = torch.tensor([[1.0, 1, 1], [1, 0, 0]]), torch.ones(2, 3)
    found = find_tokens(
        batch_of(
            ids,
            mask,
            token_type_ids=dirty.long(),
            clean=clean,
            dirty=dirty,
            deep=clean[:, :, None] * torch.ones(2),
            empty=torch.zeros(2, 3, 0),
            per_row=torch.zeros(2),
            pixels=torch.zeros(2, 5),
            names=["a", "b"],
            coarse=clean.to(torch.float8_e4m3fn),
        )
    )
    assert found.paths == ("input_ids", "attention_mask", "token_type_ids", "clean", "deep", "coarse")


def test_a_column_of_one_value_is_looked_at_whatever_its_stride_is():
    """A tensor of one value is contiguous with any stride."""
    found = find_tokens(batch_of(torch.tensor([[5]]), torch.tensor([[1]]), score=torch.ones(1, 2)[:, ::2]))
    assert found.paths == ("input_ids", "attention_mask", "score")


def test_everything_else_of_the_row_stays_in_its_key():
    """Per-token values up to the length, and values per row, tell rows of the same ids apart."""
    ids, mask = padded([[1, 2], [1, 2], [1, 2]], 4)
    types = torch.tensor([[0, 0, 9, 9], [0, 0, 7, 7], [0, 1, 9, 9]])
    first, second, third = keyed(ids, mask, token_type_ids=types).keys
    assert first == second
    assert first != third
    assert len(set(keyed(ids, mask, label=torch.tensor([1, 2, 2])).keys)) == 2
    assert len(set(keyed(ids, mask, name=["a", "b", "b"]).keys)) == 2


@given(sentences, sentences)
def test_two_columns_do_not_run_into_each_other(rows, others):
    """Rows have one key exactly if their ids and their types agree up to the length."""
    count = min(len(rows), len(others))
    rows, others = rows[:count], others[:count]
    ids, mask = padded(rows, 4)
    types = torch.tensor([[*row, 0, 0, 0, 0][:4] for row in others])
    exact = [(row, types[place, : len(row)].tolist()) for place, row in enumerate(rows)]
    found = keyed(ids, mask, token_type_ids=types).keys
    assert [found.index(key) for key in found] == [exact.index(pair) for pair in exact]


def test_dtypes_are_part_of_the_key():
    """int32 ids are not int64 ids, and a mask of another dtype is another call."""
    ids, mask = padded([[1, 2], [3]])
    found = [keyed(ids, mask), keyed(ids.int(), mask), keyed(ids, mask.bool()), keyed(ids, mask, extra=torch.zeros(2))]
    assert len({result.seed for result in found}) == 4
    batch = batch_of(ids, mask)
    assert token_metas(batch, find_tokens(batch))[0] == ("tokens",)


# --- around the run -------------------------------------------------------------------------------------


@given(sentences, st.integers(1, 6))
def test_fitting_cuts_or_pads_with_zeros(rows, width):
    """Per-token columns get the width that was asked for; everything else stays."""
    ids, mask = padded(rows)
    batch = batch_of(ids, mask, label=torch.arange(len(rows)))
    fitted = fit_tokens(batch, find_tokens(batch), width)
    expected = torch.nn.functional.pad(ids, (0, max(width - ids.shape[1], 0)))[:, :width]
    assert torch.equal(fitted.columns[0].value, expected)
    assert torch.equal(fitted.columns[2].value, torch.arange(len(rows)))


lengths = st.lists(st.integers(1, 4), min_size=1, max_size=5)


@given(lengths, st.integers(0, 2))
def test_unpadding_and_padding_is_the_identity_on_padded_rows(sizes, more):
    """Rows cut to their lengths and padded again are the rows, where padding was zero."""
    width = max(sizes) + more
    count = len(sizes)
    here = torch.arange(width) < torch.tensor(sizes)[:, None]
    vectors = torch.where(here[:, :, None], torch.rand(count, width, 2), 0)
    square = torch.where(here[:, :, None] & here[:, None, :], torch.rand(count, width, width), 0)
    output = {"vectors": vectors, "square": square, "text": torch.rand(count)}
    rows = rows_of(output, count, CPU)
    parts = unpad_rows(rows, np.array(sizes), ((0,), (0, 1), ()))
    assert sorted(place for places, _ in parts for place in places.tolist()) == list(range(count))
    for places, part in parts:
        length = sizes[places[0]]
        assert part.tensors[0].shape[1:] == (length, 2)
        assert part.tensors[1].shape[1:] == (length, length)
        assert token_dims_of(part.layout.tree) == ((0,), (0, 1), ())
    joined = pad_rows(count, width, parts)
    back = tree_of(joined, CPU)
    assert all(torch.equal(back[name], output[name]) for name in output)


@given(lengths, st.integers(0, 2), st.booleans())
def test_lent_rows_are_padded_like_those_that_are_got(sizes, more, pooled):
    """Rows are the same whether they are copied out of a store's memory at once, or got and then padded."""
    width, count = max(sizes) + more, len(sizes)
    vectors = torch.rand(count, width, 2)
    output = (vectors, torch.rand(count).bfloat16()) if pooled else vectors
    store, wanted = MemoryStore(1 << 20), [bytes([place]) * 16 for place in range(count)]
    for places, rows in unpad_rows(rows_of(output, count, CPU), np.array(sizes), ((0,), ()) if pooled else ((0,),)):
        store.put("a", [wanted[place] for place in places], rows)
    for asked in (wanted, wanted[::-1] * 3, wanted[:1]):
        got = [(found.positions, found.rows) for found in store.get("a", asked)]
        one, other = pad_rows(len(asked), width, got), store.lend("a", asked, partial(pad_lent, len(asked), width))
        assert one.layout == other.layout
        assert all(map(torch.equal, one.tensors, other.tensors))
        other.tensors[0].zero_()
    assert torch.equal(store.get("a", wanted[:1])[0].rows.tensors[0], one.tensors[0][:, : sizes[0]])


def test_what_is_not_padded_from_lent_memory():
    """Rows with tokens in two dimensions, or of structures that differ, are got and placed value by value."""
    store, square = MemoryStore(1 << 20), torch.rand(2, 3, 3)
    for number, output in enumerate((square, (square,))):
        for places, rows in unpad_rows(rows_of(output, 2, CPU), np.array([2, 3]), (((0, 1), (0,))[number],)):
            store.put("a", [bytes([number, place]) * 8 for place in places], rows)
    assert store.lend("a", [b"\0\0" * 8, b"\0\1" * 8], partial(pad_lent, 2, 3)) is None
    assert store.lend("a", [b"\0\0" * 8, b"\1\0" * 8], partial(pad_lent, 2, 3)) is None
    assert store.lend("a", [b"\1\0" * 8, b"\1\1" * 8], partial(pad_lent, 2, 3)) is not None


def test_parts_that_do_not_go_together():
    """Rows of another structure, or of one that cannot be read, are not padded into one batch."""
    one = unpad_rows(rows_of(torch.zeros(1, 3), 1, CPU), np.array([2]), ((0,),))
    two = unpad_rows(rows_of((torch.zeros(1, 3),), 1, CPU), np.array([2]), ((0,),))
    assert pad_rows(1, 3, one).tensors[0].shape == (1, 3)
    assert pad_rows(2, 3, [*one, *two]) is None
    damaged = Rows(Layout("{", ((torch.float32, (3,)),)), (torch.zeros(1, 3),))
    assert pad_rows(1, 3, [(np.array([0]), damaged)]) is None
    short = Rows(Layout('["none"]', ((torch.float32, (3,)),)), (torch.zeros(1, 3),))
    assert pad_rows(1, 3, [(np.array([0]), short)]) is None


def layout(*shapes, tree=SINGLE, dtype=torch.float32):
    return Layout(tree, tuple((dtype, shape) for shape in shapes))


def test_which_dimensions_are_tokens():
    """Those that went from one width to the other; nothing can be told where anything else changed."""
    assert token_dims(layout((5, 2), (2,)), 5, layout((3, 2), (2,)), 3) == ((0,), ())
    assert token_dims(layout((5, 5, 7)), 5, layout((3, 3, 7)), 3) == ((0, 1),)
    assert token_dims(layout((5,)), 5, layout((4,)), 3) is None
    assert token_dims(layout((6,)), 5, layout((3,)), 3) is None
    assert token_dims(layout((5,)), 5, layout((3, 1)), 3) is None
    assert token_dims(layout((5,)), 5, layout((3,), tree="[]"), 3) is None
    assert token_dims(layout((5,)), 5, layout((3,), (3,)), 3) is None
    assert token_dims(layout((5,)), 5, layout((3,), dtype=torch.float16), 3) is None


@given(st.lists(sentences, min_size=1, max_size=4))
def test_a_cached_encoder_gives_what_the_plain_one_gives(batches):
    """With key="tokens", outputs up to the length and pooled ones are the plain module's; padding comes back zero."""
    plain = TokenEncoder().requires_grad_(False).eval()
    cached = TokenEncoder()
    cached.load_state_dict(plain.state_dict())
    cached_module(cached, freeze=True, key="tokens")
    for rows in batches:
        ids, mask = padded(rows)
        expected, found = plain(ids, mask), cached(ids, mask)
        torch.testing.assert_close(found, expected)


def test_texts_hit_whatever_their_neighbours():
    """A text that was computed among long ones is a hit among short ones."""
    cached = cached_module(TokenEncoder(), freeze=True, key="tokens")
    cached(*padded([[1, 2], [3, 4, 5], [6]]))
    cached(*padded([[1, 2], [6]]))
    assert cache_of(cached).stats.hits == 2


# --- calls of one outline -------------------------------------------------------------------------------


def places_of(batch):
    return token_places(batch, find_tokens(batch), range(len(batch.columns)))


@given(sentences, sentences, st.sampled_from([torch.bool, torch.uint8, torch.int32, torch.int64]))
def test_calls_of_one_outline_are_keyed_the_same_in_short(rows, others, dtype):
    """What one call says of where its token rows are gives the keys of the next one of the same shapes."""
    count = min(len(rows), len(others))
    first, second = (with_types(each[:count], dtype) for each in (rows, others))
    places = places_of(first)
    values = [column.value for column in second.columns]
    assert places.keys(values, 7) == token_keys(second, find_tokens(second), 7)
    assert places.tokens(values).lengths.tolist() == list(map(len, others[:count]))
    assert places.tokens(values)[1:] == find_tokens(second)[1:]


def with_types(rows, dtype):
    ids, mask = padded(rows, 4, dtype)
    return batch_of(ids, mask, token_type_ids=ids.flip(0) + 1)


@pytest.mark.parametrize("kind", OTHER_MASKS)
def test_a_mask_of_another_kind_is_seen_in_a_known_outline(kind):
    """Whether a mask pads on the right is looked at in every call."""
    places = places_of(batch_of(*padded([[1, 2], [3]], 3)))
    assert places.keys((torch.ones(2, 3, dtype=torch.int64), torch.tensor(OTHER_MASKS[kind])), 0) is None
    assert places.keys((torch.ones(2, 3, dtype=torch.int64), torch.ones(3, 2, dtype=torch.int64).t()), 0) is None
    assert places.keys((torch.ones(3, 2, dtype=torch.int64).t(), torch.ones(2, 3, dtype=torch.int64)), 0) is None


def test_what_an_outline_does_not_tell():
    """Columns that are per token by their values, masks that numpy has no dtype for, and lists are looked at anew."""
    ids, mask = padded([[1, 2], [3]])
    assert places_of(batch_of(ids, mask)) is not None
    assert places_of(batch_of(ids, mask, clean=mask.float())) is None
    assert places_of(batch_of(ids, mask, label=torch.zeros(2))) is None
    assert places_of(batch_of(ids, mask, names=["a", "b"])) is None
    assert places_of(batch_of(ids, mask.bfloat16())) is None


class WithMore(TokenEncoder):
    """Adds the sum of something that each row has."""

    def forward(self, input_ids, attention_mask, more=None):
        found = super().forward(input_ids, attention_mask)["tokens"]
        return found if more is None else found + more.sum(1)[:, None, None] * attention_mask[:, :, None]


def masks_in_turn():
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    yield ids, torch.tensor([[1, 1, 0], [1, 1, 1]])
    yield from ((ids, torch.tensor(OTHER_MASKS[kind])) for kind in ("left", "holey", "weights"))
    yield ids, torch.ones(3, 2, dtype=torch.int64).t()
    yield strided_twin(ids), torch.tensor([[1, 0, 0], [1, 1, 0]])


def strided_twin(ids):
    return torch.stack([ids, ids], 2)[..., 0]


def more_in_turn():
    for ids, mask in masks_in_turn():
        yield ids, mask, mask.float()
        yield ids, mask, torch.ones(2, 3)
        yield ids, mask, torch.tensor([[1.0], [2.0]])


@pytest.mark.parametrize("calls", [masks_in_turn, more_in_turn])
@pytest.mark.parametrize("reverse", [False, True])
def test_calls_of_all_kinds_in_turn(calls, reverse):
    """Whatever calls of the same shapes came before, each gives what the plain module gives."""
    plain = WithMore().requires_grad_(False).eval()
    cached = WithMore()
    cached.load_state_dict(plain.state_dict())
    cached_module(cached, freeze=True, key="tokens")
    each = list(calls())[:: -1 if reverse else 1]
    for call in each * 3:
        torch.testing.assert_close(cached(*call), plain(*call), rtol=0, atol=0)
    assert cache_of(cached).stats.bypassed == 0


def test_a_known_outline_with_some_rows_stored():
    """Of a batch of a known outline only the rows that are missing are computed."""
    cached = cached_module(TokenEncoder(), freeze=True, key="tokens")
    for rows in ([[1, 2], [3, 4, 5], [6]], [[1, 2], [3, 4, 7], [6]], [[6], [3, 4, 7], [1, 2]]):
        cached(*padded(rows, 3))
    assert (cache_of(cached).stats.computed, cache_of(cached).stats.hits) == (4, 5)


# --- noticing that the option would help ----------------------------------------------------------------


def test_one_warning_names_the_option():
    """A loop that would gain from key="tokens" is told so once."""
    cached = cached_module(TokenEncoder(), freeze=True)
    cached(*padded([[1, 2], [3]]))
    with pytest.warns(UserWarning, match='key="tokens" leaves padding out of the key'):
        cached(*padded([[1, 2], [3]], 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached(*padded([[1, 2], [3]], 6))


class IdsOnly(TokenEncoder):
    """Takes something opaque per row, too."""

    def forward(self, input_ids, attention_mask, meta):
        return self.vectors(input_ids).sum(1)


def test_opaque_rows_with_given_keys():
    """With keys given, a per-row argument without content does not break the loop."""
    cached = cached_module(IdsOnly(), freeze=True)
    ids, mask = padded([[1, 2], [3]])
    for _ in range(2):
        found = cached(ids, mask, [object(), object()], cache_keys=[1, 2])
    assert torch.equal(found, cached.vectors(ids).sum(1))
    assert cache_of(cached).stats.hits == 2


def test_a_mask_of_bfloat16_is_cached():
    """The default keys do not stumble over a mask that numpy has no dtype for."""
    cached = cached_module(TokenEncoder(), freeze=True)
    ids, mask = padded([[1, 2], [3]], dtype=torch.bfloat16)
    for _ in range(2):
        cached(ids, mask)
    assert cache_of(cached).stats.hits == 2


def test_keys_of_rows_are_their_bytes():
    """Nothing but the unpadded bytes is digested for a row of ids."""
    ids, mask = padded([[1, 2], [3]])
    batch = batch_of(ids, mask)
    assert token_keys(batch, find_tokens(batch), 5) == token_keys(
        batch_of(*padded([[1, 2], [3]], 9)), find_tokens(batch_of(*padded([[1, 2], [3]], 9))), 5
    )


@pytest.mark.parametrize(("name", "there"), [("input_ids", True), ("decoder_input_ids", False), ("x_input_ids", False)])
@pytest.mark.parametrize("inside", [False, True])
def test_reading_is_by_the_whole_name(name, there, inside):
    """`decoder_input_ids` is not `input_ids`, alone as in a mapping."""
    ids = torch.ones(2, 3, dtype=torch.int64)
    bound = [("batch", {name: ids})] if inside else [(name, ids)]
    assert tokens_extractor().reads(split(bound, frozenset(), is_row)) is there


class UpTo(nn.Module):
    """Vectors of tokens at positions, of which there are so many."""

    def __init__(self, positions, masked=True):
        super().__init__()
        self.vectors, self.positions, self.masked = nn.Embedding(50, 3), nn.Embedding(positions, 3), masked

    def forward(self, input_ids, attention_mask):
        vectors = self.vectors(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        used = attention_mask[:, :, None] if self.masked else 1
        return {"tokens": vectors * used, "text": (vectors * used).sum(1)}


def test_rows_as_long_as_a_module_takes():
    """Documents that are all cut to the longest length have no room for padding; they are cached all the same."""
    module = cached_module(UpTo(4), key="tokens", freeze=True)
    full = padded([[1, 2, 3, 4], [5, 6, 7, 8], [9, 1, 2, 3]])
    mixed = padded([[5, 6, 7, 8], [1, 2]])
    for batch in (full, full, mixed, mixed):
        expected = UpTo.forward(module, *batch)
        found = module(*batch)
        torch.testing.assert_close(found, expected)
    assert dict(cache_of(module).stats.reasons) == {}
    assert cache_of(module).stats.computed == 4


def test_rows_as_long_as_a_module_takes_that_depend_on_padding():
    """A module that ignores its mask is found out by rows that are cut by a token, and padded again."""
    module = cached_module(UpTo(4, masked=False), key="tokens", freeze=True)
    with pytest.warns(CacheWarning, match="its padding matters"):
        module(*padded([[1, 2, 3, 4], [5, 6, 7, 8]]))


def test_rows_of_which_nothing_can_be_cut():
    """One token a row, and no room for a second one: nothing can be told, and nothing is stored."""
    module = cached_module(UpTo(1), key="tokens", freeze=True)
    batch = padded([[1], [5]])
    for _ in range(2):
        torch.testing.assert_close(module(*batch), UpTo.forward(module, *batch))
    assert dict(cache_of(module).stats.reasons) == {"undecided": 4}


class FourOnly(UpTo):
    """Takes rows of four tokens alone."""

    def forward(self, input_ids, attention_mask):
        if input_ids.shape[1] != 4:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(input_ids, attention_mask)


def test_rows_that_cannot_be_cut_either():
    """Where neither shorter nor longer rows can be run, nothing can be told."""
    module = cached_module(FourOnly(4), key="tokens", freeze=True)
    batch = padded([[1, 2, 3, 4], [5, 6, 7, 8]])
    for _ in range(2):
        torch.testing.assert_close(module(*batch), UpTo.forward(module, *batch))
    assert dict(cache_of(module).stats.reasons) == {"undecided": 4}
