"""Tiny models that hand values on in hiding, ask for them, or mix their rows."""

from __future__ import annotations

import collections
import functools
import random
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tests.recycling_models import (
    Parts,
    hazard,
    sequences,
    square,
)
from tests.recycling_oracle import Block, Opaque

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


@hazard("either", peek=lambda model: model.calls)
class CountsItsCalls(Parts):
    """The model counts its calls, which changes nothing that it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
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
demanding("BranchOnText", lambda a: repr(a).count("-") % 2)
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
    """A module below scales its whole batch when one row is large, as none of the first batch is."""

    class Scaling(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.abs().max() > 2.2:
                x = x / x.abs().max()
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.stem = BranchInside.Scaling()


@hazard("either")
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
