"""What a probe takes for granted of a trunk is proved: rows that are served are those that the plain model gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

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
    model, plain = both(Deciding(ASKING[name]))
    x, ones = torch.randn(8, WIDTH), torch.ones(8, WIDTH)
    padded = ones.clone()
    padded[:, 5:] = 0
    recycle(model, at="head", batch=(x, ones))
    assert cache_of(model).cut.inputs == ("mask", "x")
    for mask in (ones, padded):
        torch.testing.assert_close(model(x, mask), plain(x, mask))


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
