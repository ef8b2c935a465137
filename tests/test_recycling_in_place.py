"""What is written in place around a cut is never taken for what was there before, whatever the probe's rows showed."""

import copy

import pytest
import torch
from torch import nn

from modcache import CutError, recycle


class Parts(nn.Module):
    """A layer before the cut and one at it; a write in place that changes large values only."""

    def __init__(self):
        super().__init__()
        self.low, self.cut = nn.Linear(4, 4), nn.Linear(4, 4)


class WrittenBefore(Parts):
    def forward(self, x):
        h = self.low(x)
        double = h * 2
        h.clamp_(max=50.0)
        return self.cut(h) + double


class WrittenAfter(Parts):
    def forward(self, x):
        h = self.low(x)
        double = h * 2
        out = self.cut(h)
        h.clamp_(max=50.0)
        return out + double


class WrittenInside(Parts):
    """The module at the cut writes into what it is given."""

    def __init__(self):
        super().__init__()
        self.cut.register_forward_pre_hook(lambda module, args: (args[0].clamp_(max=50.0),))

    def forward(self, x):
        h = self.low(x)
        double = h * 2
        return self.cut(h) + double


class MadeOfWritten(Parts):
    def forward(self, x):
        h = self.low(x)
        h.clamp_(max=50.0)
        double = h * 2
        return self.cut(h) + double


class Features(Parts):
    """Collects what each stage gives, after an activation in place, as backbones of detectors do."""

    def __init__(self):
        super().__init__()
        self.act, self.mid = nn.ReLU(inplace=True), nn.Linear(4, 4)

    def forward(self, x):
        first = self.act(self.low(x))
        second = self.mid(first)
        return [first, second, self.cut(second)]


def small_and_large():
    torch.manual_seed(0)
    return torch.randn(4, 4), torch.randn(4, 4) * 1000


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("cls", [WrittenBefore, WrittenAfter, WrittenInside], ids=lambda cls: cls.__name__)
def test_what_is_made_before_a_write_is_refused_after_it(cls, inference):
    """A value that is worked out after the cut would be made of what was written since, so it is refused."""
    small, large = small_and_large()
    model = cls().eval()
    with pytest.raises(CutError, match="is used after the cut, but what it is made of was changed meanwhile"):
        recycle(model, "cut", batch=(small,))
        with torch.inference_mode(inference), torch.no_grad():
            model(large)


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
def test_what_is_made_after_a_write_is_right(inference):
    """What was written before is part of what is stored, and so of all that is made of it later."""
    small, large = small_and_large()
    plain = MadeOfWritten().eval()
    model = recycle(copy.deepcopy(plain), "cut", batch=(small,))
    for _ in range(2):
        with torch.inference_mode(inference), torch.no_grad():
            torch.testing.assert_close(model(large), plain(large))


def test_a_stage_that_was_activated_in_place_may_be_collected():
    """With ``extra=True`` an output is stored as it is at the cut: with what was written into it on the way."""
    small, large = small_and_large()
    plain = Features().eval()
    with pytest.raises(CutError, match="extra=True"):
        recycle(copy.deepcopy(plain), "cut", batch=(small,))
    model = recycle(copy.deepcopy(plain), "cut", extra=True, batch=(small,))
    for batch in (small, large, large):
        with torch.no_grad():
            torch.testing.assert_close(model(batch), plain(batch))
