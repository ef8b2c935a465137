"""Tiny models with parameters, inputs and machinery of every kind."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from tests.models import DataOutput, EncodedOutput
from tests.recycling_models import (
    BELOW,
    CASES,
    Parts,
    Plain,
    hazard,
    named,
    sequences,
    tokens,
    vectors,
)
from tests.recycling_oracle import Batch, Block, Case

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


class Stage(nn.Module):
    """A layer and a dropout, which may belong to others as well."""

    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.drop = drop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(torch.tanh(self.layer(x)))


@hazard(at="stages.1", name="OneDropoutForAllStages")
@hazard(at="stages.2.layer", name="OneDropoutForAllStagesInside")
class OneDropout(nn.Module):
    """All stages hold the same dropout, which is to go on dropping in those above the cut."""

    def __init__(self) -> None:
        super().__init__()
        drop = nn.Dropout(0.3)
        self.stem = Block()
        self.stages = nn.ModuleList(Stage(drop) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return x


@hazard(at="stages.1", name="PartOfAStageUsedAgain")
class PartUsedAgain(OneDropout):
    """What is made of the input by a part of the first stage is asked for again after the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Stage(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3))) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.stages[0].drop(x)


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

    def __init__(self, base: nn.Linear, dropout: float = 0.2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        self.drop = nn.Dropout(dropout)

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
    if rows[0] in (0, 1, 12):
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
    """An argument has no key, and is not used: calls may be run as if they were not recycled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)

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


@hazard("either", quiet_glue=True, frozen=BELOW)
class LayerDroppedBelow(Parts):
    """A layer below is left out at random, in training only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        if not (self.training and random.random() < 0.5):
            h = self.low(h)
        return self.above(self.mid(h))
