"""Tiny models that lean on Python and on autograd: lazy parts, decorators, threads, copies, gradients inside."""

from __future__ import annotations

import copy
import functools
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.recycling_models import BELOW, Parts, Plain, hazard, named, pairs, sequences, square, vectors
from tests.recycling_oracle import Block

# --- attributes and classes -----------------------------------------------------------------------------


def made_late() -> nn.Linear:
    """A layer that is made without a random number."""
    layer = nn.utils.skip_init(nn.Linear, 4, 4, dtype=torch.float64)
    nn.init.eye_(layer.weight)
    nn.init.ones_(layer.bias)
    return layer


@hazard("either")
class LazyHead(Parts):
    """A layer of the head is made when it is first needed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.mid(self.below(x))
        if not hasattr(self, "late"):
            self.late = made_late().requires_grad_(False)
        return self.above(self.late(z))


@hazard("either")
class LazyTrunk(Parts):
    """A layer below is made when it is first needed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "late"):
            self.late = made_late().requires_grad_(False)
        return self.above(self.mid(self.below(self.late(x))))


@hazard("either")
class Proxy(nn.Module):
    """Attributes that the model has not are those of a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Plain()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.below(x)))


hazard("either", at="inner.mid", name="ProxyInside")(Proxy)


@hazard()
class OwnCall(Parts):
    """The model's class and its block have a call of their own around that of torch."""

    class Calling(nn.Sequential):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs) * 2

    def __init__(self) -> None:
        super().__init__()
        self.low, self.mid = OwnCall.Calling(self.low), OwnCall.Calling(nn.Linear(4, 4))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) + 1


def scaled(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs) * 2

    return wrapper


@hazard()
class Decorated(Parts):
    """The forward is wrapped by a decorator, and takes anything."""

    @scaled
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


@hazard("either", frozen=BELOW, below=frozenset({"stem", "drop", "low"}))
class DecoratedBelow(Parts):
    """A method of the model that makes up the trunk runs without grad by a decorator."""

    @torch.no_grad()
    def below(self, x: torch.Tensor) -> torch.Tensor:
        return super().below(x)


@hazard("either")
class InferenceBelow(Parts):
    """The trunk runs in inference mode, and its value is copied out of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            h = self.low(self.first(x))
        return self.above(self.mid(h.clone()))


@hazard("either")
class CachedProperty(Parts):
    """A table is computed once from a weight below, kept on the model, and used above."""

    @functools.cached_property
    def table(self) -> torch.Tensor:
        return self.low.weight.detach().sum(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.below(x)) * self.table)


REGISTRY: weakref.WeakKeyDictionary[nn.Module, torch.Tensor] = weakref.WeakKeyDictionary()


@hazard("refused")
class RegisteredBySelf(Parts):
    """A value from below is kept in a table of all models, under the model itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        REGISTRY[self] = self.first(x)
        z = self.mid(self.low(REGISTRY[self]))
        return self.above(z + REGISTRY[self])


@hazard()
class AsksForItself(Parts):
    """The model looks itself and its layers up in tables of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = {name: place for place, (name, _) in enumerate(self.named_children())}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert isinstance(self, AsksForItself)
        names = {id(module): name for name, module in self.named_children()}
        return super().forward(x) * (1 + self.numbers[names[id(self.mid)]])


class Growing(nn.Module):
    """Angles for as many places as were ever asked for, kept in a buffer that is replaced when it is too short."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles", torch.zeros(0, 4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.angles) < x.shape[1]:
            places = torch.arange(x.shape[1], dtype=x.dtype)
            self.register_buffer("angles", torch.sin(places[:, None] / torch.arange(1, 5)), persistent=False)
        return self.angles[: x.shape[1]]


@hazard("either", batch=lambda rows: sequences(rows, 3 + len(rows) % 4))
class GrowingTable(Parts):
    """A table that grows with the longest batch is added below and above."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.places = nn.Linear(4, 4), Growing()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = self.places(x)
        return self.above(self.mid(self.below(x + table) + table)).mean(1)


@hazard(batch=sequences)
class MaskWrittenInPlace(Parts):
    """A mask that is made live is written in place before the cut takes it."""

    class Masking(nn.Linear):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return super().forward(x + mask.sum(-1, keepdim=True))

    def __init__(self) -> None:
        super().__init__()
        self.mid = MaskWrittenInPlace.Masking(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(len(x), x.shape[1], x.shape[1], dtype=x.dtype)
        mask.masked_fill_(torch.ones_like(mask, dtype=torch.bool).triu(1), -1.0)
        mask[:, :, 0] += x[:, :, 0]
        mask *= 0.5
        return self.above(self.mid(self.below(x), mask)).mean(1)


@hazard("either")
class WithoutParametersBelow(Parts):
    """What is below the cut has no parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(torch.tanh(x * 2)))


@hazard()
class InputAbove(Parts):
    """The input is used above the cut, too, and given back."""

    def forward(self, x: torch.Tensor) -> Any:
        return self.above(self.mid(self.below(x)) + x), x


@hazard()
class SameArgumentTwice(Parts):
    """The cut takes one tensor three times: by itself, by name, and in a list."""

    class Thrice(nn.Linear):
        def forward(self, x: torch.Tensor, *, again: torch.Tensor, more: list[torch.Tensor]) -> torch.Tensor:
            return super().forward(x) + again * more[0]

    def __init__(self) -> None:
        super().__init__()
        self.mid = SameArgumentTwice.Thrice(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.below(x)
        return self.above(self.mid(h, again=h, more=[h, h]))


@hazard("either")
class ExpandedArgument(Parts):
    """What enters the cut is one value spread over many places, which the cut copies before it writes."""

    class Spread(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.clone().mul_(2)).mean(1)

    def __init__(self) -> None:
        super().__init__()
        self.mid = ExpandedArgument.Spread(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.below(x)[:, None].expand(-1, 3, -1)))


@hazard()
class HookedCut(Parts):
    """The cut has hooks before anyone recycles: one changes its input, one its output, one looks on the way back."""

    def __init__(self) -> None:
        super().__init__()
        self.mid.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        self.mid.register_forward_hook(lambda module, args, found: found + args[0])
        self.mid.register_full_backward_hook(lambda module, inputs, outputs: None)
        self.high.register_full_backward_pre_hook(lambda module, outputs: (outputs[0] * 2,))
        self.low.register_forward_hook(lambda module, args, found: found.abs())


@hazard()
class DropoutAtCut(Parts):
    """The cut is a dropout that writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.mid = nn.Dropout(0.4, inplace=True)


@hazard(batch=named("x", "y", batch=pairs))
class KeywordsOnly(Parts):
    """The forward takes nothing but keywords, and hands them on."""

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.above(self.mid(self.below(inputs["x"])) + inputs.get("y", 0))


@hazard("either", batch=lambda rows: ({"x": vectors(rows)[0], "name": "batch"},))
class MappingInput(Parts):
    """The batch is one mapping, as loaders give it."""

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        return super().forward(batch["x"])


# --- threads, copies, autograd --------------------------------------------------------------------------


@hazard("either")
class ThreadsInside(Parts):
    """A layer below runs in a thread that the model starts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grad = torch.is_grad_enabled()
        h = self.first(x)

        def work() -> torch.Tensor:
            with torch.set_grad_enabled(grad):
                return self.low(h)

        with ThreadPoolExecutor(1) as pool:
            h = pool.submit(work).result()
        return self.above(self.mid(h))


@hazard("either")
class ForkedBelow(Parts):
    """A layer below is forked and waited for, as TorchScript models write it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        later = torch.jit.fork(self.low, self.first(x))
        return self.above(self.mid(torch.jit.wait(later)))


@hazard("either")
class CopiedGhosts(Parts):
    """Values from below are copied by Python's own means."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = copy.copy(self.first(x))
        return self.above(self.mid(self.low(a)) + copy.copy(x))


@hazard("either")
class WrittenData(Parts):
    """Values from below are written behind the back of autograd."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.below(x)
        h.data.mul_(2)
        h.data = h.data + 1
        return self.above(self.mid(h))


@hazard("either")
class WrittenDataAfterCut(Parts):
    """What entered the cut is written behind the back of autograd, afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.mid = nn.Tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.below(x)
        z = self.mid(h)
        h.data.mul_(2)
        return self.above(z + h)


@hazard("either", frozen=BELOW, below=frozenset({"stem", "drop", "low"}))
class DetachesAtCut(Parts):
    """What enters the cut is detached, and made to require grad."""

    def forward(self, x: torch.Tensor) -> Any:
        h = self.below(x).detach().requires_grad_(torch.is_grad_enabled())
        return self.above(self.mid(h)), h


@hazard("either", frozen=BELOW, below=frozenset({"stem", "drop", "low"}))
class GradientInside(Parts):
    """The model differentiates its head by what enters the cut, as energy models do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            h = self.below(x).detach().requires_grad_()
            energy = self.mid(h).pow(2).sum()
            (force,) = torch.autograd.grad(energy, h, create_graph=True)
        return self.above(force)


@hazard("either")
class GradientInsideBelow(Parts):
    """The model differentiates its trunk by the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            h = self.low(self.first(x))
            (force,) = torch.autograd.grad(h.pow(2).sum(), x)
        return self.above(self.mid(force.detach()))


@hazard("either", batch=square)
class BfloatInside(Parts):
    """Part of the trunk, and all that enters the cut, is in a short precision under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.short = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = F.linear(self.first(x).float(), self.short.weight.float())
        return self.above(self.mid(h.double())).mean(1)


@hazard("either")
class ChangesWhatIsGlobal(Parts):
    """A module below changes the default dtype while it runs, and puts it back."""

    class Changing(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.float64)
            try:
                return super().forward(x) + torch.ones(4)
            finally:
                torch.set_default_dtype(before)

    def __init__(self) -> None:
        super().__init__()
        self.stem = ChangesWhatIsGlobal.Changing()


@hazard("refused")
class SkipThroughNumpy(Parts):
    """A value from below leaves torch and comes back above."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        kept = a.detach().numpy()
        return self.above(self.mid(self.low(a)) + torch.from_numpy(kept))


@hazard("refused")
class SkipThroughData(Parts):
    """A value from below goes around the cut by ``data``, and as a plain number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        kept = a.data
        return self.above(self.mid(self.low(a)) * kept.norm(dim=1, keepdim=True))


@hazard("refused")
class SkipThroughFunction(Parts):
    """A function made below remembers a value, and is called above."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        later = functools.partial(torch.add, a)
        return self.above(later(self.mid(self.low(a))))


@hazard("refused")
class SkipThroughParameter(Parts):
    """A value from below is written into a buffer that the head reads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("room", torch.zeros(64, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        self.room[: len(x)] = a.detach()
        return self.above(self.mid(self.low(a)) + self.room[: len(x)].clone())


@hazard("refused")
class SkipThroughInput(Parts):
    """A value from below is written into the caller's tensor, which the head reads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        h = self.low(a)
        x.copy_(a.detach())
        return self.above(self.mid(h) + x)


@hazard("refused")
class SkipOfRows(Parts):
    """Only one row of a value from below is used above, for all rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        return self.above(self.mid(self.low(a)) + a[0])


hazard("either", extra=True, name="SkipOfRowsExtra")(SkipOfRows)


@hazard("either", extra=True)
class SkipOfMean(Parts):
    """The mean over the batch of a value from below is used above."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        return self.above(self.mid(self.low(a)) + a.mean(0))


@hazard("refused")
class MomentOfTheBatch(Parts):
    """The norm of the batch's values from below scales the loss, as a number."""

    def forward(self, x: torch.Tensor) -> Any:
        a = self.first(x)
        scale = torch.linalg.vector_norm(a)
        return self.above(self.mid(self.low(a))), scale
