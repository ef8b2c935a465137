"""What a probe takes for granted of a trunk is proved: rows that are served are those that the plain model gives."""

from __future__ import annotations

import copy
from collections.abc import Iterator

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
