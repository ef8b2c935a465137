"""Tiny models that a careless recycler gets wrong, each with the cut at which it is parted and what may come of it."""

from __future__ import annotations

import collections
import functools
import random
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from tests.models import DataOutput, EncodedData, EncodedOutput
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
        return {"out": self.above(self.mid(h)), "h": h, "again": (h, Opaque(h=h))}


@hazard()
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


hazard(name="TwoOutputsExtra", extra=True)(TwoOutputs)


@hazard("either", extra=True)
class AuxiliaryLoss(TwoOutputs):
    """A module below gives a number for the whole batch beside its rows."""

    def forward(self, x: torch.Tensor) -> Any:
        h, aux = self.both(x)
        return self.above(self.mid(h)), aux.pow(2).mean()


# --- stashes --------------------------------------------------------------------------------------------

SHELF: dict[str, Any] = {}


class Stashing(nn.Module):
    """A layer that lays its input by."""

    def __init__(self, lay: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self.layer, self.lay = Block(), lay

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.lay(torch.tanh(x))
        return self.layer(x)


@hazard("refused")
class StashInAttribute(Parts):
    """A module below stores a value on itself, which the head reads."""

    class Keeper(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.kept = torch.tanh(x)
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.stem = StashInAttribute.Keeper()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.below(x)) + self.stem.kept)


@hazard("refused")
class StashOnRoot(Parts):
    """The model stores a value from below on itself, and uses it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = self.first(x)
        return self.above(self.mid(self.low(self.kept)) + self.kept)


@hazard("refused", peek=lambda model: model.kept)
class StashForTheUser(Parts):
    """The model stores a value from below on itself, for the user to read."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = self.first(x)
        return self.above(self.mid(self.low(self.kept)))


@hazard(peek=lambda model: (model.kept, model.shape))
class StashOfTheHead(Parts):
    """The model stores values from above the cut, and a shape, for the user to read."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.below(x)
        self.shape = h.shape
        self.kept = self.mid(h)
        return self.above(self.kept)


@hazard("either", peek=lambda model: model.kept)
class StashOfTheCut(Parts):
    """The model stores what enters the cut, for the user to read."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = self.below(x)
        return self.above(self.mid(self.kept))


@hazard("refused")
class StashInClosure(Parts):
    """A module below hands a value to the head by a cell."""

    def __init__(self) -> None:
        super().__init__()
        kept: Any = None

        def lay(x: torch.Tensor) -> None:
            nonlocal kept
            kept = x

        self.stem = Stashing(lay)
        self.take = lambda: kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.below(x)) + self.take())


@hazard("refused")
class StashInGlobal(Parts):
    """A module below hands a value to the head by a global."""

    def __init__(self) -> None:
        super().__init__()
        SHELF.clear()
        self.stem = Stashing(functools.partial(SHELF.__setitem__, "x"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.below(x)) + SHELF["x"])


@hazard("refused")
class StashOnClass(Parts):
    """A module below hands a value to the head by an attribute of its class."""

    class Keeper(Block):
        kept: Any = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            type(self).kept = torch.tanh(x)
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        StashOnClass.Keeper.kept = None
        self.stem = StashOnClass.Keeper()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.below(x)) + StashOnClass.Keeper.kept)


@hazard("refused")
class StashInList(Parts):
    """A module below hands a value to the head by a list that both hold."""

    def __init__(self) -> None:
        super().__init__()
        self.shared: list[torch.Tensor] = []
        self.stem = Stashing(self.shared.append)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.mid(self.below(x))
        z = self.above(z + self.shared[-1])
        self.shared.clear()
        return z


@hazard("refused")
class StashInDeque(Parts):
    """A module below hands a value to the head by a queue that holds two."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: collections.deque[torch.Tensor] = collections.deque(maxlen=2)
        self.stem = Stashing(self.queue.append)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.mid(self.below(x))
        return self.above(z + self.queue[-1])


@hazard("refused")
class StashOnObject(Parts):
    """A module below hands a value to the head by an object that no tree looks into."""

    class Keeper(Block):
        def __init__(self, desk: Opaque) -> None:
            super().__init__()
            self.desk = desk

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.desk.x = torch.tanh(x)
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.desk = Opaque(x=None)
        self.stem = StashOnObject.Keeper(self.desk)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.below(x)) + self.desk.x)


@hazard("refused")
class StashInGenerator(Parts):
    """A module below hands a value to the head by a running generator."""

    def __init__(self) -> None:
        super().__init__()

        def desk() -> Any:
            kept = None
            while True:
                kept = yield kept

        self.box = Opaque(desk=desk())
        next(self.box.desk)
        self.stem = Stashing(self.box.desk.send)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.mid(self.below(x))
        kept, self.box.desk.gi_frame.f_locals["kept"] = self.box.desk.gi_frame.f_locals["kept"], None
        return self.above(z + kept)


@hazard("refused")
class StashOnTensor(Parts):
    """A module below ties a value to its output as an attribute."""

    class Keeper(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = super().forward(x)
            out.skip = torch.tanh(x)
            return out

    def __init__(self) -> None:
        super().__init__()
        self.stem = StashOnTensor.Keeper()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.stem(x)
        return self.above(self.mid(h) + h.skip)


@hazard("refused")
class StashOnParent(Parts):
    """A module below stores a value on the model, which it knows by a weak reference."""

    class Keeper(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.up[0]().kept = torch.tanh(x)
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.stem = StashOnParent.Keeper()
        self.stem.up = [weakref.ref(self)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.below(x)) + self.kept)


@hazard("refused")
class StashByHook(Parts):
    """A hook below, as feature extractors have them, hands a value to the head."""

    def __init__(self) -> None:
        super().__init__()
        seen: dict[str, Any] = {}
        self.seen = lambda: seen
        self.stem.register_forward_hook(lambda module, args, out: seen.update(stem=out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.below(x)) + self.seen()["stem"])


@hazard("refused", batch=square)
class StashOfSizes(Parts):
    """A module below stores the smallest value of the batch as a number."""

    class Keeper(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.kept = float(x.min())
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.stem = StashOfSizes.Keeper()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.below(x)) * self.stem.kept)


@hazard("refused")
class LastTimesState(Parts):
    """What a module below gives depends on the call before."""

    class Keeper(Block):
        def __init__(self) -> None:
            super().__init__()
            self.last = [0.0]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = super().forward(x) + self.last[0]
            self.last[0] = float(x.detach().sum())
            return out

    def __init__(self) -> None:
        super().__init__()
        self.stem = LastTimesState.Keeper()


@hazard("either", peek=lambda model: (model.calls, model.sizes))
class CountsItsCalls(Parts):
    """The model counts its calls and notes their sizes, which changes nothing that it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.sizes.append(len(x))
        return super().forward(x)


@hazard("refused")
class CountsInTheTrunk(Parts):
    """A module below multiplies by the number of its calls."""

    class Counter(Block):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(x) * self.calls

    def __init__(self) -> None:
        super().__init__()
        self.stem = CountsInTheTrunk.Counter()


# --- values that Python demands -------------------------------------------------------------------------


def demanding(name: str, ask: Callable[[torch.Tensor], Any], expect: str = "refused") -> None:
    """A model that asks its layers below for a value before the cut, and goes by the answer."""

    class Demanding(Parts):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a = self.first(x)
            z = self.mid(self.low(a) * (2.0 if ask(a) else 1.0))
            return self.above(z)

    Demanding.__name__ = Demanding.__qualname__ = name
    hazard(expect)(Demanding)


demanding("BranchOnMean", lambda a: a.mean() > 0)
demanding("BranchOnItem", lambda a: a[0, 0].item() > 0)
demanding("BranchOnFloat", lambda a: float(a.detach().sum()) > 0)
demanding("BranchOnList", lambda a: a.tolist()[0][0] > 0)
demanding("BranchOnNumpy", lambda a: np.asarray(a.detach())[0, 0] > 0)
demanding("BranchOnNonzero", lambda a: len((a > 0).nonzero()) % 2)
demanding("BranchOnBooleanIndex", lambda a: a[a > 0].numel() % 2)
demanding("BranchOnUnique", lambda a: len(torch.unique(a > 0)) == 1)
demanding("BranchOnMaximum", lambda a: int(a.argmax()) % 2)
demanding("BranchOnEqual", lambda a: torch.equal(a, a.abs()))
demanding("BranchOnClose", lambda a: torch.allclose(a, a.round()))
demanding("BranchOnText", lambda a: "-" in repr(a))
demanding("BranchOnIteration", lambda a: any(bool((one > 0).all()) for one in a))
demanding("BranchOnContains", lambda a: 0.5 in a)
demanding("BranchOnShape", lambda a: a.shape[0] > 2, "refused")  # rows would depend on the size of their batch
demanding("BranchOnWidth", lambda a: a.shape[-1] == 4 and a.dim() == 2 and a.size(1) == 4, "works")
demanding("BranchOnKind", lambda a: a.is_floating_point() and a.dtype == torch.float64 and not a.is_cuda, "works")
demanding("BranchOnType", lambda a: type(a) is torch.Tensor, "either")
demanding("BranchOnInstance", lambda a: isinstance(a, torch.Tensor) and torch.is_tensor(a), "works")
demanding("BranchOnStrides", lambda a: a.is_contiguous() and a.stride() == (4, 1), "works")
demanding("BranchOnVersion", lambda a: a._version, "either")
demanding("BranchOnIdentity", lambda a: len({id(a), id(a), id(a.T)}) == 2, "either")


@hazard("refused", batch=sequences)
class BranchInside(Parts):
    """A module below scales its whole batch when one row is large."""

    class Scaling(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.abs().max() > 2.4:
                x = x / x.abs().max()
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.stem = BranchInside.Scaling()


@hazard()
class AsksTypeAfterCut(Parts):
    """What entered the cut is asked for its exact class afterwards."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.below(x)
        z = self.mid(h)
        return self.above(z * 2 if type(h) is torch.Tensor else z)


class AsksTypeInCut(nn.Linear):
    """A layer that treats subclasses of tensors in another way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * 2 if type(x) is torch.Tensor else x)


@hazard()
class AsksTypeAtCut(Parts):
    """The cut asks its input for its exact class."""

    def __init__(self) -> None:
        super().__init__()
        self.mid = AsksTypeInCut(4, 4)


@hazard()
class FillsLikeGhosts(Parts):
    """Tensors are made by the shape, dtype and device of a value from below."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        places = torch.arange(a.shape[1], device=a.device)
        row_of_ones = torch.ones(a.size(), dtype=a.dtype, device=a.device)
        least = torch.finfo(a.dtype).min / torch.finfo(a.dtype).max
        return self.above(self.mid(self.low(a)) * row_of_ones * places.to(a.dtype) + least + len(a) * 0)


@hazard("either")
class NewZerosOfGhosts(Parts):
    """Tensors are made by a value from below as a pattern, and used above."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        zeros, ones, like = a.new_zeros(a.shape), a.new_ones(4), torch.full_like(a, 0.5)
        return self.above(self.mid(self.low(a)) + zeros * ones - like)


# --- batch coupling -------------------------------------------------------------------------------------


def coupled(name: str, mix: Callable[[torch.Tensor], torch.Tensor], inside: bool, expect: str = "refused") -> None:
    """A model whose rows depend on their batch, in a module below or in the model's own lines."""

    class Mixing(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return mix(super().forward(x))

    class Coupled(Parts):
        def __init__(self) -> None:
            super().__init__()
            if inside:
                self.stem = Mixing()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.first(x)
            return self.above(self.mid(self.low(h if inside else mix(h))))

    Coupled.__name__ = Coupled.__qualname__ = name
    hazard(expect)(Coupled)


coupled("BatchMean", lambda x: x - x.mean(0), True)
coupled("BatchMeanInGlue", lambda x: x - x.mean(0), False)
coupled("BatchSoftmax", lambda x: x.softmax(0), False)
coupled("BatchSort", lambda x: x.sort(0).values, True)
coupled("BatchRolled", lambda x: x.roll(1, 0), False)
coupled("BatchFlipped", lambda x: x.flip(0), True)
coupled("BatchSum", lambda x: x.cumsum(0), False)
coupled("BatchMaximum", lambda x: x / x.abs().max(), True)
coupled("BatchFirstRow", lambda x: x + x[:1], False)
coupled("BatchSize", lambda x: x * x.shape[0], True)
coupled("BatchPlaces", lambda x: x + torch.arange(x.shape[0], dtype=x.dtype)[:, None], True)
coupled("BatchTinyShare", lambda x: x + 1e-7 * x.mean(0), True)
coupled("BatchSimilarity", lambda x: (x @ x.T) @ x, False)
coupled("BatchReshaped", lambda x: x.reshape(-1, 2).repeat(1, 2)[: x.shape[0]], False)
coupled("RandomTorch", lambda x: x + torch.randn_like(x), True)
coupled("RandomTorchInGlue", lambda x: x + torch.rand(x.shape, dtype=x.dtype), False)
coupled("RandomPython", lambda x: x * random.random(), True)
coupled("RandomNumpy", lambda x: x * float(np.random.rand()), True)
coupled("RandomDropout", lambda x: F.dropout(x, 0.5, training=True), True)
coupled("RandomOneLayer", lambda x: x if torch.rand(()) < 0.5 else x * 2, True)


@hazard()
class BatchNormBelow(Parts):
    """A batch norm in the trunk, which is in eval there."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))


@hazard("refused", alone=False)
class BatchNormWithoutState(Parts):
    """A batch norm below that has no statistics of its own, so that rows are coupled in eval, too."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.BatchNorm1d(4, track_running_stats=False)


@hazard()
class BatchNormAbove(Parts):
    """A batch norm in the head is updated once a step."""

    def __init__(self) -> None:
        super().__init__()
        self.high = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Dropout(0.4))


@hazard("refused")
class BufferWrittenBelow(Parts):
    """A module below counts its calls in a buffer."""

    class Counter(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.steps += 1
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.stem = BufferWrittenBelow.Counter()


@hazard("either")
class BufferReplacedBelow(Parts):
    """A module below replaces a buffer by another tensor."""

    class Counter(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("largest", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.largest = torch.maximum(self.largest, x.detach().max())
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.stem = BufferReplacedBelow.Counter()


@hazard()
class BufferWrittenAbove(Parts):
    """The head counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.high = BufferWrittenBelow.Counter()


@hazard("either")
class BufferWrittenInGlue(Parts):
    """The model counts its calls in a buffer before anything else happens."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return super().forward(x) * self.steps


# --- layouts of the batch -------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention with as many heads as the width has places, heads folded into the batch."""

    def __init__(self, fold: bool = True) -> None:
        super().__init__()
        self.mix, self.out, self.fold = Block(), nn.Linear(4, 4), fold
        self.scores = nn.Softmax(-1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        b, t, d = x.shape
        h = self.mix(x).reshape(b, t, 4, d // 4).transpose(1, 2)
        h = h.reshape(b * 4, t, d // 4) if self.fold else h
        scores = h @ h.transpose(-1, -2)
        if mask is not None:
            scores = scores + mask
        h = self.scores(scores) @ h
        return self.out(h.reshape(b, 4, t, d // 4).transpose(1, 2).reshape(b, t, d))


class Attentive(Parts):
    """Attention below and above; rows, tokens, heads and width may all be four."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(4, 4))
        self.stem, self.low, self.mid = Attention(), Attention(fold=False), Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.low(self.stem(x + self.places[: x.shape[1]]))
        return self.above(self.mid(h)).mean(1)


hazard(batch=square, name="CoincidentalSizes")(Attentive)
hazard("either", at="mid.scores", batch=square, name="CoincidentalHeadsFolded")(Attentive)
hazard("either", at="mid.scores", batch=square, name="CoincidentalHeadsFoldedExtra", extra=True)(Attentive)
hazard(batch=functools.partial(sequences, length=3), name="OtherLengthThanRows")(Attentive)


@hazard(batch=square, name="TableAsArgument")
@hazard(batch=sequences, name="TableAsArgumentOfOtherLength")
class SharedTable(Parts):
    """A table that all rows share, made of a parameter, enters the cut beside the rows; it is as long as the batch."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Embedding(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.places(torch.arange(x.shape[1]))

    class Adding(nn.Linear):
        def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
            return super().forward(x + table)

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mid, self.high = SharedTable.Table(), SharedTable.Adding(4, 4), SharedTable.Adding(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, table = self.below(x), self.table(x)
        return self.head(self.high(self.mid(h, table), table)).mean(1)


@hazard(batch=square)
class MaskByTokens(Attentive):
    """A mask of tokens by tokens, which all rows share, is made live and enters each block."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.full((x.shape[1], x.shape[1]), -9.0, dtype=x.dtype).triu(1)
        return self.above(self.mid(self.low(self.stem(x, mask), mask), mask)).mean(1)


@hazard(batch=square)
class RotaryTable(Attentive):
    """Tables of angles, from a module without parameters, are handed to each block."""

    class Angles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("speeds", torch.tensor([1.0, 0.5, 0.25, 0.1]), persistent=False)

        def forward(self, x: torch.Tensor, places: torch.Tensor) -> Any:
            angles = places[:, :, None].to(x.dtype) * self.speeds
            return angles.cos(), angles.sin()

    class Turned(Attention):
        def forward(self, x: torch.Tensor, angles: Any) -> torch.Tensor:
            return super().forward(x * angles[0] + x.roll(1, -1) * angles[1])

    def __init__(self) -> None:
        super().__init__()
        self.angles = RotaryTable.Angles()
        self.stem, self.low, self.mid = RotaryTable.Turned(), RotaryTable.Turned(), RotaryTable.Turned()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x
        angles = self.angles(h, torch.arange(x.shape[1])[None])
        for block in (self.stem, self.low, self.mid):
            h = block(h, angles=angles)
        return self.above(h).mean(1)


@hazard(batch=square)
class RotaryTableOfBelow(RotaryTable):
    """The tables of angles are made by a value from below as a pattern."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.stem(x, angles=self.angles(x, torch.arange(x.shape[1])[None]))
        angles = self.angles(h, torch.arange(h.shape[1], device=h.device)[None])
        return self.above(self.mid(self.low(h, angles), angles)).mean(1)


@hazard("works", batch=square)
class BatchInFront(Parts):
    """Below the cut, rows lie along dimension 1, and there are as many places as rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.below(x).transpose(0, 1))).transpose(0, 1)


@hazard("works", batch=sequences)
class RecurrentCut(nn.Module):
    """Recurrent layers with rows along dimension 1; states of the first start the second, which is the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.low, self.mid = Block(), nn.LSTM(4, 4), nn.LSTM(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, states = self.low(self.stem(x).transpose(0, 1))
        h, _ = self.mid(h, states)
        return self.head(h[-1])


@hazard("either", batch=time_first)
class TimeFirstInput(Parts):
    """Rows lie along dimension 1 of the input, too, which no key can know."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.below(x).cumsum(0)))


@hazard("works", batch=square)
class FoldedWithWindows(Parts):
    """Below the cut, two windows of each row are rows of their own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        h = self.below(x).reshape(b * 2, t // 2, d)
        return self.above(self.mid(h)).reshape(b, t, -1)


@hazard("either", batch=square)
class FoldedOtherWay(Parts):
    """Windows are folded outside of the rows: the rows of one sample are not neighbours."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        h = self.below(x).reshape(b, 2, t // 2, d).transpose(0, 1).reshape(2 * b, t // 2, d)
        return self.above(self.mid(h)).reshape(2, b, t // 2, -1).transpose(0, 1)


@hazard("works", batch=square)
class FlatTokens(Parts):
    """Below the cut, rows and tokens are one dimension."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        return self.above(self.mid(self.below(x.reshape(b * t, d)))).reshape(b, t, -1)


class ViewsStrictly(nn.Linear):
    """A layer that asks for certain strides."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not x.is_contiguous()
        return super().forward(x.transpose(1, 2).view(x.shape[0], -1).view(-1, 4)).reshape(x.shape)


@hazard(batch=square)
class StridesOfTheCut(Parts):
    """What enters the cut is transposed, and the cut relies on that."""

    def __init__(self) -> None:
        super().__init__()
        self.mid = ViewsStrictly(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.below(x).transpose(1, 2)))


@hazard(batch=images, at="high")
@hazard(batch=images, at="mid", name="ConvolutionsMiddle")
class Convolutions(nn.Module):
    """Convolutions with batch norms below and above."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.mid = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.high = nn.Sequential(nn.BatchNorm2d(4), nn.Dropout2d(0.3))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.high(self.mid(self.stem(x.contiguous(memory_format=torch.channels_last)))).mean((2, 3)))


@hazard("either", batch=sequences)
class PackedBetween(nn.Module):
    """A packed sequence enters the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.head = Block(), nn.GRU(4, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lengths = torch.tensor([1 + place % 3 for place in range(len(x))])
        packed = pack_padded_sequence(self.stem(x), lengths, batch_first=True, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.mid(packed)[0], batch_first=True, total_length=3)[0])


class ToNested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nested.as_nested_tensor(list(self.layer(x).unbind()), layout=torch.jagged)


@hazard("refused", batch=sequences)
class NestedBetween(Parts):
    """A nested tensor enters the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ToNested()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.low(self.stem(x))).to_padded_tensor(0.0))


class SparseLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sparse.mm(x, self.weight)


@hazard("either")
class SparseBetween(Parts):
    """A sparse tensor enters the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.mid = SparseLinear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.below(x).relu().to_sparse()))


@hazard("either")
class ComplexBetween(Parts):
    """Complex numbers enter the cut."""

    class Length(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x.abs())

    def __init__(self) -> None:
        super().__init__()
        self.mid = ComplexBetween.Length()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(torch.fft.fft(self.below(x)).conj()))


@hazard()
class OtherDtypes(Parts):
    """What enters the cut is of half precision, and an index."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, best: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
            return self.layer(x.double() * kept) + best[:, None]

    def __init__(self) -> None:
        super().__init__()
        self.mid = OtherDtypes.Mixed()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.below(x)
        return self.above(self.mid(h.half(), h.argmax(1), kept=h > 0))


# --- writes in place ------------------------------------------------------------------------------------


@hazard("either")
class WritesItsInput(Parts):
    """A module below writes into the caller's tensor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        return super().forward(x)


@hazard("either")
class WritesItsInputBelow(Parts):
    """A module below writes into the caller's tensor, which the head uses."""

    class Writer(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.add_(1))

    def __init__(self) -> None:
        super().__init__()
        self.stem = WritesItsInputBelow.Writer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.below(x)) + x)


@hazard("either")
class WritesAParameterBelow(Parts):
    """A module below renormalises its weight in place, as embeddings with max_norm do."""

    class Renormed(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.weight.renorm_(2, 0, 0.5)
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.stem = WritesAParameterBelow.Renormed()


@hazard("either")
class WritesGhosts(Parts):
    """The model writes into values from below before they enter the cut."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        b = self.low(a)
        b += 1
        b[:, 0] = 0
        b[:, 1:].mul_(2)
        return self.above(self.mid(b))


@hazard("either")
class FillsARoomWithGhosts(Parts):
    """Values from below are copied into a fresh tensor, which enters the cut."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        room = torch.zeros(len(x), 4, dtype=x.dtype)
        room[:, :2] = self.low(a)[:, 2:]
        room[:, 2:] = x[:, :2]
        return self.above(self.mid(room))


class WritesInCut(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return super().forward(x)


@hazard()
class CutWritesItsInput(Parts):
    """The cut writes into its input, which is used again afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.mid = WritesInCut(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.below(x)
        return self.above(self.mid(h) + h)


@hazard()
class HeadWritesCutTensor(Parts):
    """The head writes into what entered the cut."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.below(x)
        z = self.mid(h.clone())
        h[:, 0] = 0
        h.relu_()
        return self.above(z + h)


@hazard()
class InplaceActivationAtCut(Parts):
    """The cut is an activation that writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.mid = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.below(x)
        z = self.mid(h)
        return self.above(z + h)


# --- modules that are met more than once, or in strange ways --------------------------------------------


@hazard()
class SharedBeforeAndAfter(Parts):
    """One layer runs below and above the cut: above it must run, and it is frozen."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.stem(self.mid(self.below(x))))


@hazard()
class SharedActivation(Parts):
    """One dropout serves below and above the cut."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.high(self.drop(self.mid(self.drop(self.below(x)))))))


class Loop(Parts):
    """The cut is called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.mid = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.below(x)
        for _ in range(3):
            h = self.mid(h)
        return self.above(h)


hazard(name="LoopFirst")(Loop)
hazard(name="LoopSecond", call=1)(Loop)
hazard(name="LoopThird", call=2)(Loop)
hazard("refused", name="LoopBeyond", call=3, says="call")(Loop)


@hazard(name="LoopInsideSecond", at="mid.0", call=1)
class LoopInside(Loop):
    """A part of what is called three times is the cut."""


@hazard("either")
class RepeatsByRows(Loop):
    """The cut is called as often as the batch has rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.below(x)
        for _ in range(len(x)):
            h = self.mid(h)
        return self.above(h)


@hazard("either")
class Recursive(Parts):
    """The model calls itself."""

    def forward(self, x: torch.Tensor, depth: int = 1) -> torch.Tensor:
        if depth:
            return self(x, depth - 1)
        return super().forward(x)


@hazard("either")
class TwoNames(Parts):
    """A layer below is registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.alias = self.low
        self.again = self.mid

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.alias(self.first(x))))


@hazard("either", at="mid", name="CutOfTwoNames")
class CutByOtherName(TwoNames):
    """The cut is called by its other name."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.again(self.alias(self.first(x))))


@hazard()
class SideTower(Parts):
    """A tower that does not feed the cut runs before it, learns, and drops out."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.4), nn.BatchNorm1d(4, momentum=0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = self.tower(x)
        return self.above(self.mid(self.below(x)) + side)


@hazard(batch=pairs)
class SideTowerOfAnotherInput(SideTower):
    """The tower beside has an input of its own, which is not in the key."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.below(x)
        side = self.tower(y)
        return self.above(self.mid(h) + side)


@hazard(batch=pairs)
class TwoTowersBelow(Parts):
    """Two towers feed the cut, each from its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.below(x) * self.other(y)))


@hazard(batch=pairs, size=4)
class Siamese(Parts):
    """One tower reads both inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.below(x) - self.below(y)))


@hazard("either")
class TrainOnlyHeadBefore(Parts):
    """An extra head on the cut's input runs in training only, before the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> Any:
        h = self.below(x)
        more = self.extra(h) if self.training else None
        return self.above(self.mid(h)), more


@hazard()
class TrainOnlyHeadAfter(TrainOnlyHeadBefore):
    """An extra head on the cut's input runs in training only, after the cut."""

    def forward(self, x: torch.Tensor) -> Any:
        h = self.below(x)
        z = self.mid(h)
        return self.above(z), self.extra(h) if self.training else None


@hazard("either")
class TrainOnlyHeadOfBelow(TrainOnlyHeadBefore):
    """An extra head far below the cut runs in training only."""

    def forward(self, x: torch.Tensor) -> Any:
        a = self.first(x)
        z = self.mid(self.low(a))
        return self.above(z), self.extra(a) if self.training else None


@hazard("either")
class ModulesInAPlainList(Parts):
    """The model calls its layers by a list that it keeps beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = [self.stem, self.low, self.mid]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step in self.steps:
            x = step(x)
        return self.above(x)


@hazard("either")
class BoundMethods(Parts):
    """The model calls its layers by methods that it bound when it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.box = Opaque(low=self.low.forward, mid=functools.partial(self.mid))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.box.mid(self.box.low(self.first(x))))


@hazard("either")
class ForwardByHand(Parts):
    """The model calls the forward methods of its layers instead of the layers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.low.forward(self.stem.forward(x))))


@hazard("either")
class CutForwardByHand(Parts):
    """The model calls the forward method of the cut."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid.forward(self.below(x)))


@hazard()
class WeightsByHand(Parts):
    """The model uses the weights of layers directly, below and above."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.linear(self.first(x), self.low.weight, self.low.bias)
        return F.linear(self.mid(h), self.head.weight) + self.head.bias


@hazard()
class LooksAtItsLayers(Parts):
    """The model asks its layers what they are, slices them, and looks them up in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)])
        self.byname = nn.ModuleDict({"b": nn.Linear(4, 4)})
        self.stem = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x
        for layer in self.layers[:2]:
            h = layer(h) if isinstance(layer, nn.Linear) and layer.in_features == 4 else h
        for layer in list(self.layers)[2:]:
            h = layer(h)
        assert len(self.layers) == 4
        assert sum(1 for _ in self.children()) == 7
        h = getattr(self, "low")(self.byname["b"](h))  # noqa: B009
        return self.head(self._modules["high"](self.get_submodule("mid")(h)))


hazard(at="layers.3", name="CutInAList")(LooksAtItsLayers)
hazard(at="byname.b", name="CutInADict")(LooksAtItsLayers)


@hazard("works")
class Inherits(Plain):
    """The forward of a parent class is called by super, and methods of the model by its class."""

    def above(self, z: torch.Tensor) -> torch.Tensor:
        return Parts.above(self, z) * 2

    def forward(self, *args: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return super().forward(*args, **kwargs)


@hazard("works")
class SwallowsExceptions(Parts):
    """The model hides errors of its block."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.below(x)
        try:
            z = self.mid(h)
        except Exception:
            z = h
        return self.above(z)


@hazard("either")
class SwallowsEverything(Parts):
    """The model hides whatever its block raises."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.below(x)
        try:
            z = self.mid(h)
        except BaseException:
            z = h
        return self.above(z)


@hazard("refused")
class SwallowsRefusals(Parts):
    """The model tries a skip, and does without when that raises."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        z = self.mid(self.low(a))
        try:
            z = z + a
        except Exception:
            z = z * 1
        return self.above(z)


@hazard("refused")
class SwallowsEveryRefusal(Parts):
    """The model tries to read a value from below, and does without whatever is raised."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        try:
            large = bool(a.mean() > 0)
        except BaseException:
            large = False
        return self.above(self.mid(self.low(a)) * (2 if large else 1))


# --- what modules below give ----------------------------------------------------------------------------


def giving(name: str, give: Callable[[torch.Tensor], Any], use: Callable[[Any], Any], expect: str, **more: Any) -> None:
    """A model whose lowest layer gives more than one tensor."""

    class Giver(Block):
        def forward(self, x: torch.Tensor) -> Any:
            return give(super().forward(x))

    class Giving(Parts):
        def __init__(self) -> None:
            super().__init__()
            self.stem = Giver()

        def forward(self, x: torch.Tensor) -> Any:
            h, factor = use(self.stem(x))
            return self.above(self.mid(self.low(h)) * factor)

    Giving.__name__ = Giving.__qualname__ = name
    hazard(expect, **more)(Giving)


class Pair(NamedTuple):
    h: Any
    n: Any


giving("GivesBatchSize", lambda h: (h, h.shape[0]), lambda found: found, "either")
giving("GivesShape", lambda h: {"h": h, "shape": h.shape}, lambda found: (found["h"], found["shape"][0]), "either")
giving("GivesSum", lambda h: (h, float(h.detach().sum())), lambda found: found, "refused")
giving("GivesText", lambda h: [h, f"{float(h.detach()[0, 0]):.3f}"], lambda f: (f[0], float(f[1])), "refused")
giving("GivesNumbers", lambda h: (h, h.detach()[:, 0].tolist()), lambda f: (f[0], sum(f[1])), "refused")
giving("GivesConstant", lambda h: (h, 3, None, "text", True), lambda found: found[:2], "works")
giving("GivesNamedTuple", lambda h: Pair(h, None), lambda found: (found.h, 1.5), "works")
giving("GivesDataclass", lambda h: EncodedData(h, 2), lambda found: (found.vector, found.norm), "works")
giving("GivesModelOutput", EncodedOutput, lambda f: (f.last_hidden_state * f[0], 1), "works")
giving("GivesObject", lambda h: Opaque(h=h), lambda found: (found.h, 1.0), "either")
giving("GivesObjectWithSkip", lambda h: Opaque(h=h, s=h.sin()), lambda f: (f.h, f.s), "refused")
giving("GivesFunction", lambda h: lambda: h, lambda found: (found(), 1.0), "either")
giving("GivesGenerator", lambda h: (one for one in (h, 2.0)), lambda found: (next(found), next(found)), "either")
giving("GivesIterator", lambda h: iter([h, h]), lambda found: (next(found) + next(found), 1.0), "either")
giving("GivesRows", lambda h: list(h.unbind()), lambda found: (torch.stack(found), 1.0), "either")
giving("GivesRowsAndCount", lambda h: h.unbind(), lambda found: (torch.stack(found), len(found)), "refused")
giving("GivesChunks", lambda h: h.chunk(2, 1), lambda found: (torch.cat(found[::-1], 1), 1.0), "works")
giving("GivesNumpy", lambda h: (h, h.detach().numpy()), lambda f: (f[0], torch.from_numpy(f[1]).sum()), "refused")
giving("GivesViews", lambda h: (h, h[:, :2], h), lambda f: (f[0] + f[2], 1.0 if f[0] is f[2] else 2.0), "works")
giving("GivesItsParameter", lambda h: (h, 2.0), lambda found: found, "works")


@hazard("works")
class AppendsToAList(Parts):
    """A module below gives a list, which the model goes on with."""

    class Lister(Block):
        def forward(self, x: torch.Tensor) -> Any:
            return [super().forward(x)]

    def __init__(self) -> None:
        super().__init__()
        self.stem = AppendsToAList.Lister()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states = self.stem(x)
        states.append(self.low(states[-1]))
        states.append(self.mid(states[-1]))
        return self.above(states[-1]) * len(states)


@hazard("works")
class CutTakesATree(Parts):
    """The cut takes a dict of lists, by keyword, beside numbers and None; it writes into the dict."""

    class Taking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, states: Any, *, scale: float, none: None = None) -> Any:
            states["out"] = self.layer(states["h"][0] * states["h"][1]) * scale
            return states

    def __init__(self) -> None:
        super().__init__()
        self.mid = CutTakesATree.Taking()

    def forward(self, x: torch.Tensor) -> Any:
        h = self.below(x)
        states = self.mid(states={"h": [h, h * 2], "x": x}, scale=1.5, none=None)
        return self.above(states["out"]), sorted(states), states["h"][0]


@hazard("works", batch=pairs)
class LiveArgumentOfCut(Parts):
    """The cut takes a value from below and an input that was not below: that one is not stored."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, mask: torch.Tensor, flag: bool) -> torch.Tensor:
            return self.layer(x).masked_fill(mask, 0.0) * (2 if flag else 1)

    def __init__(self) -> None:
        super().__init__()
        self.mid = LiveArgumentOfCut.Masked()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.below(x), y > 0, flag=bool(y.sum() > 0)))


@hazard("either")
class CutOfInputsOnly(Parts):
    """Nothing that enters the cut was computed below; what is computed below goes around it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        return self.above(self.mid(x) + a)


@hazard("either")
class GivesTheInput(Parts):
    """A module below gives the caller's tensor back beside its output, and the head uses it."""

    class Both(Block):
        def forward(self, x: torch.Tensor) -> Any:
            return x, super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.stem = GivesTheInput.Both()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        same, h = self.stem(x)
        return self.above(self.mid(self.low(h)) + same)


@hazard(frozen=frozenset({"stem.weight", "stem.bias", "low.weight", "low.bias"}))
class NoGradBelow(Parts):
    """The user has fenced the layers below off from autograd."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            h = self.below(x)
        return self.above(self.mid(h))


# --- parameters -----------------------------------------------------------------------------------------


@hazard(batch=tokens)
@hazard(batch=tokens, at="high", name="TiedHeadHigher")
class TiedHead(nn.Module):
    """The table of the embedding is the weight of the head, so that both are frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors, self.stem = nn.Embedding(9, 4), Block()
        self.mid, self.high = nn.Linear(4, 4), nn.Dropout(0.3)
        self.head = nn.Linear(4, 9)
        self.head.weight = self.vectors.weight

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.stem(self.vectors(ids))) * mask[:, :, None]
        return self.head(self.high(self.mid(h)))


@hazard()
class DirectParameters(Parts):
    """Parameters of the model itself are used below, above, and on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.randn(4))
        self.both = nn.Parameter(torch.randn(4))
        self.turn = nn.Parameter(torch.randn(4, 4))
        self.scale = nn.Parameter(torch.randn(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.below(x + self.offset) @ self.turn.T * self.both
        return self.above(self.mid(h) + self.both) * self.scale


@hazard(batch=sequences)
class ClassToken(Parts):
    """A token of the model's own is put before each row, and read at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), self.below(x)], 1)
        return self.above(self.mid(h)[:, 0])


@hazard(batch=sequences)
class PooledCut(Parts):
    """What enters the cut is one place of what was computed below."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.below(x).cumsum(1)[:, -1]))


@hazard("either")
class HyperNetwork(Parts):
    """The weight of a layer above is computed by a layer below from the row."""

    def __init__(self) -> None:
        super().__init__()
        self.maker = nn.Linear(4, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.below(x)
        w = self.maker(h).reshape(-1, 4, 4)
        return self.above(torch.bmm(w, self.mid(h)[:, :, None])[:, :, 0])


@hazard("works")
class MakesWeightsOfParameters(Parts):
    """The weight of a layer above is computed from parameters only, before the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.left @ self.right
        return self.above(F.linear(self.mid(self.below(x)), weight))


@hazard("works")
class Parametrized(Parts):
    """Weights below and above are parametrized: orthogonal, weight norm, spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.low)
        parametrizations.spectral_norm(self.stem)
        parametrizations.weight_norm(self.mid[0])
        parametrizations.spectral_norm(self.head)


@hazard("either")
class Pruned(Parts):
    """A pruned layer below sets its weight before each call."""

    def __init__(self) -> None:
        super().__init__()
        prune.random_unstructured(self.low, "weight", 0.5)
        prune.random_unstructured(self.head, "weight", 0.5)


class LowRank(nn.Module):
    """A linear layer with an adapter."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.b(self.a(self.drop(x)))


@hazard()
class Adapted(Parts):
    """Layers below and above have adapters; those below are frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.mid = LowRank(self.low), LowRank(nn.Linear(4, 4))


@hazard()
class FrozenByTheUser(Parts):
    """Some parameters on both sides were frozen before, and stay so when all is undone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem.requires_grad_(False)
        self.high.requires_grad_(False)


@hazard(quiet_glue=True)
class FunctionalDropoutBelow(Parts):
    """The model drops out by a function what feeds the cut, and what follows it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.dropout(self.below(x), 0.4, self.training)
        return self.head(F.dropout(self.mid(h), 0.4, self.training))


@hazard()
class NoiseForTheHead(Parts):
    """Noise is drawn before the cut, and used above it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(len(x), 4, dtype=x.dtype)
        return self.above(self.mid(self.below(x)) + noise * self.head.weight.sum())


# --- inputs ---------------------------------------------------------------------------------------------


@hazard(batch=named("x", "labels", batch=lambda rows: (*vectors(rows), torch.tensor([n % 2 for n in rows]))))
class Labels(Parts):
    """The loss is computed inside, from labels that are not in the key."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = super().forward(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return EncodedOutput(last_hidden_state=loss, pooler_output=logits)


def labels_at_times(rows: Sequence[int]) -> Batch:
    """Some batches have labels, some a factor for the trunk, some both."""
    batch: dict[str, Any] = {"x": vectors(rows)[0]}
    if rows[0] in (0, 1):
        batch["labels"] = torch.tensor([number % 2 for number in rows])
    if rows[0] in (1, 3, 7):
        batch["factor"] = 2.0
    return batch


@hazard(batch=labels_at_times, tolerance=1e-10)
class LaterKeywords(Parts):
    """Keywords come and go; one of them changes what is computed below."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)  # a row with another factor is another row, so that none is counted

    def forward(self, x: torch.Tensor, labels: Any = None, factor: float = 1.0) -> Any:
        logits = super().forward(x * factor)
        return logits, None if labels is None else F.cross_entropy(logits, labels)


@hazard("refused", batch=lambda rows: {"x": vectors(rows)[0], **({"skip": True} if rows[0] == 1 else {})})
class LaterSkip(Parts):
    """A keyword that comes later asks for a skip."""

    def forward(self, x: torch.Tensor, skip: bool = False) -> torch.Tensor:
        a = self.first(x)
        z = self.mid(self.low(a))
        return self.above(z + a if skip else z)


@hazard(batch=tokens)
class MaskedTokens(Parts):
    """Token rows whose mask feeds the trunk and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors = nn.Embedding(9, 4, padding_idx=0)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = self.below(self.vectors(ids)) * mask[:, :, None]
        h = h - h.mean(1, keepdim=True)
        return self.above((self.mid(h) * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True))


@hazard(batch=lambda rows: {"ids": tokens(rows, 4 + len(rows) % 3)["ids"]})
class LengthsOfBatches(Parts):
    """Each batch has another length, and places count from a table of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors, self.places = nn.Embedding(9, 4), nn.Embedding(9, 4)
        self.stem = nn.Linear(4, 4)  # the same number of a row is another row in a batch of another length

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.vectors(ids) + self.places(torch.arange(ids.shape[1]))
        return self.above(self.mid(self.below(h))).mean(1)


@hazard("either", batch=lambda rows: (list(vectors(rows)[0]),))
class ListOfRows(Parts):
    """The input is a list of rows."""

    def forward(self, x: list[torch.Tensor]) -> torch.Tensor:
        return super().forward(torch.stack(x))


@hazard("either", batch=lambda rows: ({"a": {"b": vectors(rows)[0]}, "n": [vectors(rows)[0] * 2]},))
class TreeOfInputs(Parts):
    """The input is a dict of dicts and lists."""

    def forward(self, x: Any) -> torch.Tensor:
        return super().forward(x["a"]["b"] + x["n"][0])


@hazard("either", batch=lambda rows: ([f"text {number}" for number in rows],))
class Texts(Parts):
    """The input is a list of texts, encoded by a method of the model."""

    def forward(self, texts: list[str]) -> torch.Tensor:
        x = torch.tensor([[float(ord(text[-1])), len(text), 1.0, 0.5] for text in texts], dtype=torch.float64)
        return super().forward(x / 50)


def strange(rows: Sequence[int]) -> Batch:
    (x,) = vectors(rows)
    for place, number in enumerate(rows):
        x[place] = {1: float("nan"), 2: float("inf"), 3: -0.0, 5: 0.0}.get(number, x[place])
    return (x,)


@hazard(batch=strange)
class StrangeRows(Parts):
    """Rows of NaN, of infinities, and of both zeros, which differ by what is computed of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.below(torch.atan(1 / x).nan_to_num(0.3))
        return self.above(self.mid(h))


@hazard("refused", batch=lambda rows: (vectors(rows)[0].requires_grad_(),), says="grad")
class InputNeedsGrad(Parts):
    """The input wants a gradient, which no stored row can give."""


@hazard("either", batch=lambda rows: (vectors(rows)[0], vectors(rows)[0].clone().requires_grad_()))
class HeadInputNeedsGrad(Parts):
    """An input that does not feed the cut wants a gradient."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.below(x)) * y)


class NotATensor:
    """An argument without content."""


@hazard("either", batch=lambda rows: (*vectors(rows), NotATensor()))
class StrangeArgument(Parts):
    """An argument has no key, and is not used."""

    def forward(self, x: torch.Tensor, context: Any) -> torch.Tensor:
        return super().forward(x)


class Past:
    """What was computed so far, as decoders keep it."""

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []

    def grown(self, h: torch.Tensor) -> torch.Tensor:
        self.kept.append(h)
        return torch.stack(self.kept).sum(0)


@hazard("refused", batch=lambda rows: (*vectors(rows), Past()))
class CacheArgument(Parts):
    """A cache of values is handed in, and filled below and above."""

    def forward(self, x: torch.Tensor, past: Past) -> torch.Tensor:
        h = past.grown(self.below(x))
        return self.above(past.grown(self.mid(h)))


@hazard("refused")
class CacheInside(Parts):
    """A cache of values is made in the model, filled below and above, and given back."""

    def forward(self, x: torch.Tensor) -> Any:
        past = Past()
        h = past.grown(self.first(x))
        z = self.mid(past.grown(self.low(h)))
        return self.above(z), past.kept


# --- kinds of models ------------------------------------------------------------------------------------


def scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)).double())


def traced_child() -> nn.Module:
    model = Plain().double().eval()
    model.low = torch.jit.trace(model.low, torch.randn(2, 4, dtype=torch.float64))
    return model


def scripted_cut() -> nn.Module:
    model = Plain().double()
    model.mid = nn.Sequential(torch.jit.script(model.mid))
    return model


def compiled_root() -> nn.Module:
    return torch.compile(Plain().double(), backend="eager")


def compiled_root_in_place() -> nn.Module:
    model = Plain().double()
    model.compile(backend="eager")
    return model


def compiled_child(name: str) -> nn.Module:
    model = Plain().double()
    setattr(model, name, torch.compile(getattr(model, name), backend="eager"))
    return model


def patched(name: str) -> nn.Module:
    """A forward is replaced on the instance, as accelerate does it."""
    model = Plain().double()
    module = model.get_submodule(name)
    inner = module.forward
    module.forward = lambda *args, **kwargs: inner(*args, **kwargs) * 2
    return model


for _name, _made, _at, _expect in (
    ("ScriptedRoot", scripted, "1", "refused"),
    ("TracedChild", traced_child, "mid", "either"),
    ("ScriptedCut", scripted_cut, "mid", "either"),
    ("CompiledRoot", compiled_root, "_orig_mod.mid", "refused"),
    ("CompiledRootInPlace", compiled_root_in_place, "mid", "either"),
    ("CompiledBelow", functools.partial(compiled_child, "low"), "mid", "either"),
    ("CompiledCut", functools.partial(compiled_child, "mid"), "mid", "either"),
    ("CompiledAbove", functools.partial(compiled_child, "high"), "mid", "works"),
    ("PatchedRoot", functools.partial(patched, ""), "mid", "refused"),
    ("PatchedBelow", functools.partial(patched, "low"), "mid", "either"),
    ("PatchedCut", functools.partial(patched, "mid"), "mid", "either"),
    ("PatchedAbove", functools.partial(patched, "high"), "mid", "works"),
):
    CASES.append(Case(_name, _made, _at, vectors, _expect, plays=_name not in ("ScriptedRoot", "CompiledRoot")))


@hazard("either")
class GeneratorOutput(Parts):
    """The model gives a generator, which computes when it is asked."""

    def forward(self, x: torch.Tensor) -> Any:
        h = self.below(x)
        for scale in (1.0, 2.0):
            yield self.above(self.mid(h) * scale)


@hazard("either")
class LazyOutput(Parts):
    """The model gives a function's result for later."""

    def forward(self, x: torch.Tensor) -> Any:
        a = self.first(x)
        z = self.mid(self.low(a))
        return (part for part in (self.above(z), a))


@hazard(at="encoder.layers.1", batch=sequences, tolerance=1e-9)
class TorchTransformer(nn.Module):
    """Layers of torch's own transformer, with their fast path."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Block()
        layer = nn.TransformerEncoderLayer(4, 2, 8, 0.2, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.stem(x)).mean(1))


@hazard(batch=sequences)
class FunctionalAttentionBelow(Parts):
    """Functions that torch implements in C run on values from below, in the model's own lines."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.below(x)
        h = F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None])[:, 0]
        h = F.layer_norm(torch.einsum("btd,de->bte", h, self.low.weight), (4,))
        h = F.pad(h, (0, 0, 1, 0)).unfold(1, 2, 1).mean(-1)
        return self.above(self.mid(h))


class Doubled(torch.autograd.Function):
    """Twice the input, with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 2


@hazard("works")
class OwnFunction(Parts):
    """Functions with a backward of their own stand below and above."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(Doubled.apply(self.mid(Doubled.apply(self.below(x)))))


@hazard("either")
class VectorisedBelow(Parts):
    """Layers below and above are mapped over the rows by torch.func."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.func.vmap(self.low)(self.first(x))
        return torch.func.vmap(self.head)(self.mid(h))


@hazard("either")
class FunctionalCallBelow(Parts):
    """A layer below is called with weights that are handed in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = {name: value * 2 for name, value in self.low.named_parameters()}
        h = torch.func.functional_call(self.low, weights, (self.first(x),))
        return self.above(self.mid(h))


@hazard()
class CheckpointedHead(Parts):
    """The head is computed again on the way back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.below(x)
        return self.above(checkpoint(self.mid, h, use_reentrant=False))


@hazard("either")
class CheckpointedTrunk(Parts):
    """The trunk would be computed again on the way back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = checkpoint(self.below, x, use_reentrant=False)
        return self.above(checkpoint(self.mid, h, use_reentrant=False))


@hazard("either")
class CheckpointAroundTheCut(Parts):
    """What is computed again on the way back holds the cut."""

    def upper(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.below(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.upper, x, use_reentrant=False)


@hazard("works")
class UsesDataOutput(Parts):
    """Modules without parameters below give objects, and just run."""

    def __init__(self) -> None:
        super().__init__()
        self.data = DataOutput()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.data(self.below(x))
        return self.above(self.mid(found.vector))


@hazard("refused")
class UsesNormOfDataOutput(UsesDataOutput):
    """A module without parameters, below, hands a value around the cut."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.data(self.below(x))
        return self.above(self.mid(found.vector) * found.norm[:, None])


@hazard("works")
class ReadsTraining(Parts):
    """The head asks whether it trains; so do the layers below, in a trunk that never does."""

    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) * (2 if self.training else 1)

    def __init__(self) -> None:
        super().__init__()
        self.low, self.mid = ReadsTraining.Asking(), ReadsTraining.Asking()


@hazard("either", at="mid")
class LayerDropped(Parts):
    """The cut is left out at random in training."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.below(x)
        if not (self.training and torch.rand(()) < 0.5):
            h = self.mid(h)
        return self.above(h)


@hazard("either", quiet_glue=True)
class LayerDroppedBelow(Parts):
    """A layer below is left out at random, in training only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        if not (self.training and random.random() < 0.5):
            h = self.low(h)
        return self.above(self.mid(h))
