"""Tiny models that call their modules in strange ways, or whose modules give more than tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from tests.models import EncodedData, EncodedOutput
from tests.recycling_models import (
    BELOW,
    Parts,
    Plain,
    hazard,
    pairs,
)
from tests.recycling_oracle import Block, Opaque

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
giving("GivesViews", lambda h: (h, h[:, :2], h), lambda f: (f[0] + f[2], 1.0), "works")
giving("GivesTheSameTwice", lambda h: (h, h), lambda f: (f[0], 1.0 if f[0] is f[1] else 2.0), "either")
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
        self.stem = nn.Linear(4, 4)  # rows on another way through Python may be looked at again: not counted
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


@hazard(frozen=BELOW, below=frozenset({"stem", "drop", "low"}))
class NoGradBelow(Parts):
    """The user has fenced the layers below off from autograd."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            h = self.below(x)
        return self.above(self.mid(h))
