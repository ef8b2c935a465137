"""Tiny models that rely on what goes on around the values: grad mode, chance, sizes, classes, containers, and time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.recycling_models import Parts, hazard, pairs
from tests.recycling_oracle import Batch, Block

# --- values made before the cut, used after it ----------------------------------------------------------


class Gated(Parts):
    """Has a parameter that does not feed the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(4))


@hazard()
class MadeWithoutGrad(Gated):
    """A product is made without grad before the cut, and used with it after."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.below(x)
        with torch.no_grad():
            side = low * self.gate
        return self.above(self.mid(low) + side)


@hazard()
class FirstUsedWithoutGrad(Gated):
    """A product is made with grad before the cut, and first used without."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.below(x)
        side = low * self.gate
        high = self.mid(low)
        with torch.no_grad():
            mean = side.mean(1, keepdim=True)
        return self.above(high + side - mean)


@hazard()
class MadeUnderAutocast(Gated):
    """A product is made in bfloat16 before the cut, and used outside of autocast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.below(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            side = low.float() @ self.gate.float().diag()
        return self.above(self.mid(low) + side.double())


@hazard("refused", says="chance")
class DrawnBeforeUsedLate(Parts):
    """Noise in the shape of what is not computed is used after the head has drawn."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.rand_like(low := self.below(x))
        return self.above(self.mid(low)) + noise.sum(1, keepdim=True)


@hazard()
class DrawnBeforeUsedAtOnce(Parts):
    """Nothing is drawn between the noise and its use."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.randn_like(low := self.below(x))
        return self.above(self.mid(low) + noise)


@hazard("either")
class DroppedForTheHead(Parts):
    """What crosses the cut is also dropped out before it, for the head."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.below(x)
        side = F.dropout(low, 0.5, self.training)
        return self.above(self.mid(low)) + side.sum(1, keepdim=True)


@hazard(peek=lambda model: model.last)
class KeepsWhatItDetached(Parts):
    """What is left on the model for the user is a tensor like any other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.below(x)
        self.last = low.detach()
        return self.above(self.mid(low))


@hazard()
class MedianOfMany(Parts):
    """A function with several outputs makes what crosses the cut."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.below(x)
        return self.above(self.mid(torch.stack([low, low * 2, low - 1]).median(0).values))


# --- attributes and buffers that only training sets -----------------------------------------------------


class Centred(Parts):
    """Has a centre."""

    def __init__(self) -> None:
        super().__init__()
        self.centre: Any = 0.0


@hazard("refused", says="centre")
class CentreOfTraining(Centred):
    """Training moves what is taken off before the cut."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        high = self.mid(self.below(x) - self.centre)
        if self.training:
            self.centre = 0.9 * self.centre + 0.1 * high.detach().mean(0)
        return self.above(high)


@hazard()
class CentreOfTheHead(Centred):
    """Training moves what is taken off after the cut."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        high = self.mid(self.below(x)) - self.centre
        if self.training:
            self.centre = 0.9 * self.centre + 0.1 * high.detach().mean(0)
        return self.above(high)


class WarmUp(Parts):
    """Counts the steps of training."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0


@hazard("refused")
class WarmUpBelow(WarmUp):
    """After a few steps, another way is taken to the cut."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += self.training
        low = self.below(x)
        return self.above(self.mid(low * 1.5 if self.steps > 3 else low))


@hazard("refused", says="steps")
class WarmUpByAndBy(WarmUp):
    """Each step of training changes what crosses the cut."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += self.training
        return self.above(self.mid(self.below(x) * (1 + 0.1 * self.steps)))


@hazard()
class WarmUpAbove(WarmUp):
    """Each step of training changes what comes after the cut."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += self.training
        return self.above(self.mid(self.below(x))) * (1 + 0.1 * self.steps)


class Mean(Parts):
    """Has a mean, in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))


@hazard("refused")
class MeanOfTraining(Mean):
    """Training moves a buffer before it is used below the cut."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean = self.mean * 0.9 + 0.1 * x.mean(0)
        return self.above(self.mid(self.below(x - self.mean)))


@hazard("refused")
class MovedBeforeItIsUsed(Parts):
    """Training moves a weight of the trunk before each call of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.low.weight.mul_(0.99)
        return super().forward(x)


@hazard("works", act=lambda model: setattr(model, "scale", nn.Parameter(torch.full((4,), 2.0).double(), False)))
class DirectParameterExchanged(Parts):
    """A parameter of the model itself, which feeds the cut, is exchanged by the user."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.below(x) * self.scale))


# --- sizes ----------------------------------------------------------------------------------------------


@hazard("refused")
class AnotherWayForLargeBatches(Parts):
    """A large batch takes another way to the cut."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.below(x)
        return self.above(self.mid(low * 2 if len(x) > 9 else low))


@hazard("refused", size=12)
class LayerForLargeBatches(Parts):
    """A layer below takes another way for more rows than a probe runs on, but not for more than the first batch has."""

    class Low(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = super().forward(x)
            return found.tanh() if len(x) > 9 else found

    def __init__(self) -> None:
        super().__init__()
        self.low = self.Low(4, 4)


# --- classes --------------------------------------------------------------------------------------------


class Demanding(nn.Module):
    """Wants to be told something by each class that is derived from it."""

    def __init_subclass__(cls, *, kind: str) -> None:
        super().__init_subclass__()


class Told(Demanding, kind="low"):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@hazard()
@hazard(at="low", name="DemandingCut")
@hazard(at="low.inner", name="DemandingAncestor")
class DemandingBelow(Parts):
    """A layer's class cannot be derived from without ado."""

    def __init__(self) -> None:
        super().__init__()
        self.low = Told()


class Registry(type):
    """Knows each name once."""

    known: dict[str, type] = {}

    def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> Registry:
        if name in cls.known:
            raise ValueError(f"{name} is known already")
        cls.known[name] = made = super().__new__(cls, name, bases, body)
        return made


class Registered(nn.Linear, metaclass=Registry):
    """A layer that is in the registry."""


@hazard()
class RegisteredBelow(Parts):
    """A layer's class is made by a class that makes each name once."""

    def __init__(self) -> None:
        super().__init__()
        self.low = Registered(4, 4)


@hazard(at="high")
class SliceOfASequential(Parts):
    """Layers below are called as slices."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.low[2:](self.low[:2](self.first(x)))))


# --- containers -----------------------------------------------------------------------------------------


def one_mapping(rows: Sequence[int]) -> Batch:
    x, y = pairs(rows)
    return ({"x": x, "y": y},)


@hazard(batch=one_mapping)
class TakesOutOfItsBatch(Parts):
    """The batch is one mapping, out of which the forward takes things."""

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        side = batch.pop("y")
        return self.above(self.mid(self.below(batch.pop("x")))) + side.sum(1, keepdim=True)


@dataclasses.dataclass
class Configuration:
    """Knows one thing, and is not to be asked for the other."""

    width: int = 4
    depth: int = 2

    def __getattribute__(self, name: str) -> Any:
        if name == "depth":
            raise RuntimeError("ask each layer")
        return super().__getattribute__(name)


@hazard()
class HandsItsConfigurationOn(Parts):
    """A layer below is handed an object of which not all fields can be read."""

    class Low(Block):
        def forward(self, x: torch.Tensor, config: Configuration) -> torch.Tensor:
            return super().forward(x) * config.width

    def __init__(self) -> None:
        super().__init__()
        self.config, self.stem, self.low = Configuration(), nn.Linear(4, 4), self.Low()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.low(torch.tanh(self.stem(x)), config=self.config)))
