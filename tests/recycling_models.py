"""Tiny models that a careless recycler gets wrong, each with the cut at which it is parted and what may come of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tests.models import EncodedData, EncodedOutput
from tests.recycling_oracle import Batch, Block, Case, Opaque

CASES: list[Case] = []

Model = type[nn.Module]


def row(number: int, *shape: int) -> torch.Tensor:
    """The values of one row, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


def vectors(rows: Sequence[int]) -> Batch:
    return (torch.stack([row(number, 4) for number in rows]),)


def sequences(rows: Sequence[int], length: int = 3) -> Batch:
    return (torch.stack([row(number, length, 4) for number in rows]),)


def time_first(rows: Sequence[int]) -> Batch:
    return (torch.stack([row(number, 3, 4) for number in rows], dim=1),)


def square(rows: Sequence[int]) -> Batch:
    """As many tokens as the first batch has rows, as the width has places, and as there are heads."""
    return sequences(rows, 4)


def images(rows: Sequence[int]) -> Batch:
    return (torch.stack([row(number, 3, 4, 4) for number in rows]),)


def pairs(rows: Sequence[int]) -> Batch:
    return (*vectors(rows), torch.stack([row(number + 1000, 4) for number in rows]))


def named(*names: str, batch: Callable[[Sequence[int]], Batch] = pairs) -> Callable[[Sequence[int]], Batch]:
    return lambda rows: dict(zip(names, batch(rows), strict=True))


def tokens(rows: Sequence[int], length: int = 5) -> Batch:
    ids = torch.stack([torch.randint(1, 9, (length,), generator=torch.Generator().manual_seed(n)) for n in rows])
    lengths = torch.tensor([2 + number % (length - 1) for number in rows])
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"ids": ids * mask, "mask": mask}


def hazard(
    expect: str = "works",
    at: str = "mid",
    batch: Callable[[Sequence[int]], Batch] = vectors,
    name: str = "",
    **more: Any,
) -> Callable[[Model], Model]:
    """Enter a class of models in the table; keywords that `Case` does not know are options of ``recycle``."""
    known = {key: more.pop(key) for key in list(more) if key in Case.__dataclass_fields__}

    def enter(model: Model) -> Model:
        case = Case(name or model.__name__, lambda: model().double(), at, batch, expect, more, **known)
        assert all(case.name != other.name for other in CASES), case.name
        CASES.append(case)
        return model

    return enter


class Parts(nn.Module):
    """What most models here are made of: two layers with dropout below, a block, two layers with dropout above."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Block()
        self.drop = nn.Dropout(0.3)
        self.low = nn.Linear(4, 4)
        self.mid = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.high = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.25))
        self.head = nn.Linear(4, 2)

    def first(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.stem(x))

    def below(self, x: torch.Tensor) -> torch.Tensor:
        return self.low(self.drop(self.first(x)))

    def above(self, z: torch.Tensor) -> torch.Tensor:
        return self.head(self.high(z))

    def forward(self, x: torch.Tensor) -> Any:
        return self.above(self.mid(self.below(x)))


# --- what must work -------------------------------------------------------------------------------------


@hazard()
@hazard(at="low", name="PlainLow")
@hazard(at="high", name="PlainHigh")
@hazard(at="high.1", name="PlainInside")
@hazard(at="head", name="PlainHead")
@hazard("refused", at="stem", name="NothingBelow")
class Plain(Parts):
    """A chain."""


BELOW = frozenset({"stem.weight", "stem.bias", "low.weight", "low.bias"})
"""What is frozen in most models here."""


@hazard("refused", at="spare")
class NeverReached(Parts):
    """A cut that no call comes by."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(4, 4)


@hazard(at="2")
@hazard(at="4", name="SequentialLast")
class InSequential(nn.Sequential):
    """The root is a Sequential, whose parts have numbers for names."""

    def __init__(self) -> None:
        super().__init__(Block(), nn.Dropout(0.3), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


class Residual(nn.Module):
    """Adds what its inner layer makes of the normed input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.inner = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.inner(self.norm(x)))


@hazard(at="blocks.1")
@hazard(at="blocks.1.norm", name="ResidualAtNorm")
@hazard("refused", at="blocks.1.inner", name="ResidualAround", says="extra=True")
@hazard(at="blocks.1.inner", name="ResidualAroundExtra", extra=True)
@hazard("refused", at="blocks.1.drop", name="ResidualAtDrop")
class Residuals(Parts):
    """A residual around the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.below(x)
        for block in self.blocks:
            h = block(h)
        return self.above(h)


@hazard()
class CutTensorAgain(Parts):
    """What enters the cut is used again after later layers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.below(x)
        return self.head(self.high(self.mid(h)) * h + torch.relu(h))


@hazard()
class BranchAfterCut(Parts):
    """Python asks for values of the cut's input, but after the cut."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.below(x)
        z = self.mid(h)
        if h.mean() > 0:
            z = z * 2
        return self.above(z[:, [h.abs().argmax().item() % 4]] + z)


@hazard("refused", says="extra=True")
@hazard(name="UNetExtra", extra=True)
class UNet(Parts):
    """A skip from far below the cut to far above it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        b = self.low(self.drop(a))
        return self.head(torch.cat([self.high(self.mid(b)), a], 1)[:, ::2])


@hazard(batch=named("x", "flag", batch=lambda rows: (*vectors(rows), False)), name="HiddenStatesOff")
@hazard("refused", batch=named("x", "flag", batch=lambda rows: (*vectors(rows), True)), name="HiddenStatesOn")
@hazard(batch=named("x", "flag", batch=lambda rows: (*vectors(rows), True)), name="HiddenStatesExtra", extra=True)
class HiddenStates(Parts):
    """All layers' values are given back when asked for."""

    def forward(self, x: torch.Tensor, flag: bool = False) -> Any:
        states = (self.first(x),)
        states = (*states, self.low(self.drop(states[-1])))
        states = (*states, self.mid(states[-1]))
        out = self.above(states[-1])
        return EncodedOutput(last_hidden_state=out, hidden_states=states if flag else None)


@hazard("refused")
@hazard(name="NestedOutputExtra", extra=True)
class NestedOutput(Parts):
    """A value from below the cut lies deep in the output."""

    def forward(self, x: torch.Tensor) -> Any:
        a = self.first(x)
        return {"deep": [(self.above(self.mid(self.low(a))), {"a": a})], "name": "nested"}


@hazard("refused")
class DataOutputOfBelow(Parts):
    """A value from below the cut lies in a dataclass of the user."""

    def forward(self, x: torch.Tensor) -> Any:
        a = self.first(x)
        return EncodedData(self.above(self.mid(self.low(a))), a)


@hazard("either")
class OpaqueOutputOfBelow(Parts):
    """A value from below the cut lies in an object that no tree looks into."""

    def forward(self, x: torch.Tensor) -> Any:
        a = self.first(x)
        return Opaque(out=self.above(self.mid(self.low(a))), a=a)


@hazard()
class CutTensorInOutput(Parts):
    """What enters the cut is given back, too, and the caller may write into it."""

    def forward(self, x: torch.Tensor) -> Any:
        h = self.below(x)
        return {"out": self.above(self.mid(h)), "h": h, "again": (h, [h])}


@hazard()
class OpaqueOutputOfAbove(Parts):
    """What the head makes is given back in objects that no tree looks into, as a key-value cache is."""

    def forward(self, x: torch.Tensor) -> Any:
        z = self.mid(self.below(x))
        return {"out": self.above(z), "cache": Opaque(layers=[Opaque(keys=z, size=1)], first=None)}


@hazard("refused")
class OpaqueOutputOfBoth(Parts):
    """What is made before the cut lies deep in an object that is given back."""

    def forward(self, x: torch.Tensor) -> Any:
        a = self.first(x)
        z = self.mid(self.low(self.drop(a)))
        return {"out": self.above(z), "cache": Opaque(layers=[Opaque(keys=z), Opaque(keys=a)])}


@hazard("either")
class OpaqueOutputOfTheCut(Parts):
    """What enters the cut is given back in an object that no tree looks into."""

    def forward(self, x: torch.Tensor) -> Any:
        h = self.below(x)
        return self.above(self.mid(h)), Opaque(h=h)


@hazard("either")
class IdentityCut(Parts):
    """The cut gives its input back, and the model asks whether it did."""

    def __init__(self) -> None:
        super().__init__()
        self.mid = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.below(x)
        z = self.mid(h)
        return self.above(z * 2 if z is h else z * 3)


# --- skips that hide ------------------------------------------------------------------------------------


@hazard("refused")
class WhereSkip(Parts):
    """A skip behind torch.where, which takes it for the negative places only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        z = self.mid(self.low(a))
        return self.above(torch.where(z > 0, z, a))


@hazard("refused")
class MaskSkip(Parts):
    """Only the sign of a value from below is used above."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        z = self.mid(self.low(a))
        return self.above(z.masked_fill(a > 0, 0.0))


@hazard("refused")
class IndexSkip(Parts):
    """A value from below chooses places above."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        z = self.mid(self.low(a))
        return self.above(z.gather(1, a.argsort(1)))


@hazard("refused")
class BooleanIndexSkip(Parts):
    """A boolean index from below chooses rows above."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        return self.above(self.mid(self.low(a))[a[:, 0] > 0])


@hazard("refused")
class InPlaceSkip(Parts):
    """A value from below is added in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        z = self.mid(self.low(a)) * 1
        z += a
        return self.above(z)


@hazard("refused")
class OutArgumentSkip(Parts):
    """A value from below is copied into a fresh tensor by its place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        z = self.mid(self.low(a))
        room = torch.zeros(len(x), 8, dtype=x.dtype)
        room[:, :4] = a
        room[:, 4:] = z
        return self.above(room[:, ::2])


@hazard("refused")
class ZeroTimesSkip(Parts):
    """A value from below is multiplied by a gate that training may open; today it is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        return self.above(self.mid(self.low(a)) + self.gate * a)


@hazard("refused", batch=named("x", "y"))
class TrainOnlySkip(Parts):
    """A skip that is taken in training only."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        z = self.mid(self.low(a))
        return self.above(z + a if self.training else z) + y.sum()


@hazard("refused")
class RareSkip(Parts):
    """A skip that is taken when an input asks for it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        z = self.mid(self.low(a))
        if len(x) == 1:
            z = z + a
        return self.above(z)


@hazard("either")
class ViewSkip(Parts):
    """A view of the cut's input, taken before the cut, is used after it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.below(x)
        v = h[:, :2]
        z = self.mid(h)
        return self.above(z + v.repeat(1, 2))


@hazard("either")
class DetachedTarget(Parts):
    """A detached copy of the cut's input, made before the cut, is used after it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.below(x)
        target = h.detach().clone()
        return self.above(self.mid(h)) + (target**2).sum(1, keepdim=True)


@hazard("either")
class WrittenView(Parts):
    """The cut's input is changed in place above, and a view from below sees it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.below(x)
        v = h[:, :2]
        z = self.mid(h.clone())
        h.mul_(2)
        return self.above(z) + v


@hazard("refused")
class TwoOutputs(Parts):
    """A module below gives two values; only one of them enters the cut, both are used."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Block(), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return self.one(x), self.two(x)

    def __init__(self) -> None:
        super().__init__()
        self.both = TwoOutputs.Both()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, aux = self.both(x)
        return self.above(self.mid(h)) + aux.mean(1, keepdim=True)


BOTH = frozenset(f"both.{layer}.{name}" for layer in ("one", "two") for name in ("weight", "bias"))
hazard(name="TwoOutputsExtra", extra=True, frozen=BOTH)(TwoOutputs)


@hazard("either", extra=True, frozen=BOTH)
class AuxiliaryLoss(TwoOutputs):
    """A module below gives a number for the whole batch beside its rows."""

    def forward(self, x: torch.Tensor) -> Any:
        h, aux = self.both(x)
        return self.above(self.mid(h)), aux.pow(2).mean()
