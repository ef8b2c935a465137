"""What a probe takes for granted of a trunk is proved: rows that are served are those that the plain model gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from modcache import CutError, cache_of, recycle

WIDTH = 8


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def both(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A model to recycle and its plain twin."""
    return model.eval(), copy.deepcopy(model).eval()


class Coupled(nn.Module):
    """Rows depend on each other by a share that only small rows notice."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.linear(x)
        return hidden + self.share * hidden.mean(0)


class Normed(nn.Module):
    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk, self.norm, self.head = trunk, nn.LayerNorm(WIDTH, eps=1e-12), nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.trunk(x)))


def quiet_rows(count: int = 16) -> torch.Tensor:
    x = torch.randn(count, WIDTH)
    x[1::2] *= 1e-5  # as silence among speech
    return x


def test_rows_that_are_small_beside_others_are_compared_by_themselves() -> None:
    """A share of other rows that is nothing to large rows and much to small ones is refused."""
    model = recycle(Normed(Coupled(5e-5)).eval(), at="norm")
    with pytest.raises(CutError, match="depend on each other"):
        model(quiet_rows())


def test_small_rows_that_stand_alone_are_stored() -> None:
    """Rows of very different sizes, zero among them, are no reason to refuse a trunk."""
    model, plain = both(Normed(Coupled(0.0)))
    x = quiet_rows()
    x[3] = 0
    recycle(model, at="norm")(x)
    order = torch.randperm(len(x))[:6]
    torch.testing.assert_close(model(x[order]), plain(x[order]))
    assert cache_of(model).stats.hits == 6


# --- ways by values ---------------------------------------------------------------------------------------

ASKING = {
    "all": lambda mask: mask.all(),
    "how many there are": lambda mask: mask.nonzero().shape[0] == mask.numel(),
    "where": lambda mask: len(torch.where(mask == 0)[0]) == 0,
    "the size of a choice": lambda mask: mask[mask.bool()].numel() == mask.numel(),
    "unique": lambda mask: len(mask.unique()) == 1,
    "chosen": lambda mask: torch.masked_select(mask, mask == 0).numel() == 0,
    "repeated": lambda mask: torch.repeat_interleave(mask.long().flatten()).shape[0] == mask.numel(),
    "counted": lambda mask: torch.bincount((1 - mask).long().flatten()).shape[0] == 1,
    "one hot": lambda mask: torch.nn.functional.one_hot((1 - mask).long()).shape[-1] == 1,
    "a range": lambda mask: len(torch.arange(mask.sum().long())) == mask.numel(),
    "a slice": lambda mask: mask.flatten()[: mask.sum().long()].shape[0] == mask.numel(),
    "split": lambda mask: mask.flatten().tensor_split(mask.sum().long()[None].cpu())[1].numel() == 0,
    "text": lambda mask: str(mask.min()) == "tensor(1.)",
    "format": lambda mask: f"{mask.min()}" == "1.0",
    "membership": lambda mask: 0.0 not in mask,
    "list": lambda mask: min(mask.flatten().tolist()) == 1,
    "numpy": lambda mask: mask.numpy().min() == 1,
}


class Deciding(nn.Module):
    """Before the cut, it scales all rows by what it asked of the whole mask; both ways call the same function."""

    def __init__(self, whole: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.whole = whole
        self.trunk, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(x * (1.0 if self.whole(mask) else 2.0)))


@pytest.mark.parametrize("name", ASKING)
def test_what_python_is_told_is_in_the_key(name: str) -> None:
    """An input that only decides by the shape or the text of something is in the key, so no other row is served."""
    model = Deciding(ASKING[name]).eval()
    x, ones = torch.randn(8, WIDTH), torch.ones(8, WIDTH)
    recycle(model, at="head", batch=(x, ones))
    assert cache_of(model).cut.inputs == ("mask", "x")
    ones[:, 5:] = 0
    assert not any(cache_of(model).contains(x, ones))


@pytest.mark.parametrize("name", ASKING)
def test_another_way_by_one_row_of_a_batch_is_noticed(name: str) -> None:
    """Stored rows of a batch in which one new row changes the way of all are not served: such a model is refused."""
    model, plain = both(Deciding(ASKING[name]))
    x, ones = torch.randn(8, WIDTH), torch.ones(8, WIDTH)
    recycle(model, at="head", batch=(x, ones))
    torch.testing.assert_close(model(x, ones), plain(x, ones))
    ones[3, 5:] = 0
    with pytest.raises(CutError, match="the model decides by values"):
        model(x, ones)


class Longest(nn.Module):
    """Before the cut, it scales all rows by whether the longest of the batch is a short one."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        longest = int(mask.sum(1).max())
        return self.head(self.trunk(x * (2.0 if longest < WIDTH else 1.0)))


def masks(*lengths: int) -> torch.Tensor:
    return (torch.arange(WIDTH) < torch.tensor(lengths)[:, None]).float()


def test_a_new_way_is_proved_on_the_rows_that_are_stored() -> None:
    """A row that misses and takes another way alone than its batch takes is not stored: such a model is refused."""
    model = Longest().eval()
    x = torch.randn(8, WIDTH)
    recycle(model, at="head", batch=(x, masks(*[8] * 8)))
    model(x[:7], masks(*[8] * 7))
    with pytest.raises(CutError, match="among other rows"):
        model(x, masks(*[8] * 7, 5))


def test_a_new_way_is_proved_beside_rows_of_others() -> None:
    """Batches that are all short and all long agree in themselves, but not with each other in one batch."""
    model, plain = both(Longest())
    x = torch.randn(8, WIDTH)
    recycle(model, at="head")
    torch.testing.assert_close(model(x, masks(*[8] * 8)), plain(x, masks(*[8] * 8)))
    with pytest.raises(CutError, match="among other rows"):
        model(-x, masks(*[5] * 8))


# --- what ways cost ---------------------------------------------------------------------------------------


class Averaged(nn.Module):
    """Before the cut, it looks at the length of each row in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = Counted(), nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scale = torch.tensor([1.0 / length for length in mask.sum(1).tolist()])
        return self.head(self.trunk(x * mask * scale[:, None]))


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        RUNS.append(len(x))
        return self.linear(x)


RUNS: list[int] = []


def test_a_value_that_is_another_in_each_batch_is_not_looked_at_for_ever() -> None:
    """After some batches, answers that never decided anything are data: hits run nothing, and none is kept."""
    model, plain = both(Averaged())
    x, mask = torch.randn(64, WIDTH), masks(*torch.randint(1, WIDTH + 1, (64,)).tolist())
    recycle(model, at="head")(x, mask)
    for _ in range(20):
        RUNS.clear()
        order = torch.randperm(64)[:16]
        torch.testing.assert_close(model(x[order], mask[order]), plain(x[order], mask[order]))
        RUNS.pop()  # that of the plain one
    assert RUNS == []
    ways = vars(model)["_modcache"]._resuming._ways
    assert not any(known.by_values for known in ways.values())


def test_a_single_row_on_a_new_way_is_looked_at_beside_others() -> None:
    """Single rows, as a service is asked for them, are stored and known once they were seen among earlier rows."""
    model, plain = both(Averaged())
    x, mask = torch.randn(8, WIDTH), masks(1, 2, 3, 4, 5, 6, 7, 8)
    recycle(model, at="head", batch=(x[:4], mask[:4]))(x[:4], mask[:4])
    for _ in range(2):
        RUNS.clear()
        torch.testing.assert_close(model(x[6:7], mask[6:7]), plain(x[6:7], mask[6:7]))
        RUNS.pop()
    assert RUNS == []


class Worded(nn.Module):
    """Before the cut, it asks whether there is padding, and does without a mask where there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mid, self.head = nn.Embedding(10, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.words(input_ids)
        if not bool(attention_mask.all()):
            hidden = hidden * attention_mask[:, :, None]
        hidden = self.mid(hidden) * attention_mask[:, :, None]
        return self.head(hidden.sum(1))


def test_padding_of_token_rows_is_not_compared() -> None:
    """Token rows are stored without what a way leaves at masked positions, so that is no reason to refuse it."""
    model, plain = both(Worded())
    ids, mask = torch.randint(1, 10, (12, WIDTH)), masks(8, 8, 8, 8, 3, 4, 5, 6, 2, 2, 2, 2).long()
    recycle(model, at="mid", key="tokens", batch={"input_ids": ids[:4], "attention_mask": mask[:4]})
    for order in ([0, 1, 2, 3], [4, 5, 6, 7], [0, 4, 1, 5], [8, 9, 6, 2], [3, 9]):
        given = {"input_ids": ids[order], "attention_mask": mask[order]}
        torch.testing.assert_close(model(**given), plain(**given))


# --- plain values that skipped modules leave behind ---------------------------------------------------------

LEFT: dict[str, object] = {"flag": False}
FLAG = False


class Leaving(nn.Module):
    """A trunk that leaves a value behind, which came out the same for all rows so far."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.kind, self.options = nn.Linear(WIDTH, WIDTH), kind, {"flag": False}
        self.state = SimpleNamespace(flag=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.linear(x)
        large = bool(hidden.abs().max() > 100)
        if self.kind == "flag":
            self.flag = large
        elif self.kind == "text":
            self.flag = "large" if large else "small"
        elif self.kind == "size":
            self.flag = (x.shape[1], 2)
        elif self.kind == "item":
            self.options["flag"] = large
        elif self.kind == "object":
            self.state.flag = large
        elif self.kind == "method":
            self.note(large)
        elif self.kind == "global item":
            LEFT["flag"] = large
        elif self.kind == "global":
            self.note_globally(large)
        return hidden

    def note(self, large: bool) -> None:
        self.flag = large

    def note_globally(self, large: bool) -> None:
        global FLAG
        FLAG = large


class Reading(nn.Module):
    def __init__(self, kind: str, reads: bool = True) -> None:
        super().__init__()
        self.trunk, self.head, self.reads = Leaving(kind), nn.Linear(WIDTH, 2), reads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.head(self.trunk(x))
        if not self.reads:
            return found
        kind, trunk = self.trunk.kind, self.trunk
        if kind in ("item", "object"):
            value = trunk.options["flag"] if kind == "item" else trunk.state.flag
        elif kind in ("global", "global item"):
            value = FLAG if kind == "global" else LEFT["flag"]
        else:
            value = trunk.flag
        return found * (2.0 if value in (True, "large", (WIDTH + 1, 3)) else 1.0)


LEAVING = ["flag", "text", "size", "item", "object", "method", "global item", "global"]


@pytest.mark.parametrize("kind", LEAVING)
def test_what_a_skipped_module_leaves_behind_is_refused_where_it_is_read(kind: str) -> None:
    """A flag, a text or a size is another batch's on a resumed call, also if it was the same for the first rows."""
    model = recycle(Reading(kind).eval(), at="head")
    before = copy.deepcopy((LEFT, FLAG))
    with pytest.raises(CutError, match="where others read it"):
        model(torch.randn(4, WIDTH))
    assert before == (LEFT, FLAG)
    assert model.trunk.options == {"flag": False}


@pytest.mark.parametrize("kind", LEAVING)
def test_what_a_skipped_module_leaves_behind_may_be_there(kind: str) -> None:
    """Where nobody reads it after the cut, it is no reason to refuse."""
    model, plain = both(Reading(kind, reads=False))
    x = torch.randn(4, WIDTH)
    torch.testing.assert_close(recycle(model, at="head")(x), plain(x))
    torch.testing.assert_close(model(x), plain(x))
    assert cache_of(model).stats.hits == 4


class Tagging(nn.Module):
    """A trunk that sets an attribute on its input, which is read after the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.tag = bool(x.abs().max() > 100)
        return self.linear(x)


class Tagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = Tagging(), nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(x)) * (2.0 if x.tag else 1.0)


@pytest.mark.parametrize("seen", [False, True])
def test_an_attribute_set_on_an_input_is_refused(seen: bool) -> None:
    """A resumed call would not set it; the first batch may have been seen by the plain model before."""
    model, x = Tagged().eval(), torch.randn(4, WIDTH)
    if seen:
        model(x)
    with pytest.raises(CutError, match="sets tag on"):
        recycle(model, at="head", batch=(x,))
    assert hasattr(x, "tag") == seen
