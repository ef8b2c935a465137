"""Tiny modules with names, which tests use instead of making their own."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils import ModelOutput

__all__ = [
    "BatchCoupled",
    "ConstantsOutput",
    "CountingEncoder",
    "DataOutput",
    "DictOutput",
    "Dropout",
    "Encoded",
    "EncodedData",
    "EncodedOutput",
    "EveryTree",
    "ModelOutputEncoder",
    "NamedOutput",
    "Noisy",
    "Normalised",
    "Scaled",
    "StridedModel",
    "TextEncoder",
    "TiedModel",
    "TokenEncoder",
    "encoder",
]


class CountingEncoder(nn.Module):
    """A linear layer that counts its calls and remembers how many rows each had."""

    def __init__(self, inputs: int = 3, outputs: int = 2) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)
        self.seen = _Seen()

    @property
    def calls(self) -> int:
        return len(self.seen.sizes)

    @property
    def rows(self) -> int:
        return sum(self.seen.sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.sizes.append(len(x))
        return self.layer(x)


class _Seen:
    """Holds what a module saw, out of sight of its fingerprint."""

    def __init__(self) -> None:
        self.sizes: list[int] = []


class Scaled(nn.Module):
    """Rows times a number that all rows share, plus an offset per row."""

    def forward(self, x: torch.Tensor, scale: Any = 1.0, offset: torch.Tensor | None = None) -> torch.Tensor:
        scaled = x * scale
        return scaled if offset is None else scaled + offset


class TextEncoder(nn.Module):
    """The mean of a vector for each byte of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors = nn.Embedding(256, 4)

    def forward(self, texts: list[str]) -> torch.Tensor:
        return torch.stack(
            [self.vectors(torch.tensor([0, *text.encode("utf-8", "surrogatepass")])).mean(0) for text in texts]
        )


class TokenEncoder(nn.Module):
    """One vector per token and one per text; padding changes neither within a text's length."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors = nn.Embedding(50, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        vectors = self.vectors(input_ids) * attention_mask[:, :, None]
        return {"tokens": vectors, "text": vectors.sum(1)}


class TiedModel(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 3, bias=False)
        self.down = nn.Linear(3, 3, bias=False)
        self.down.weight = self.up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


class StridedModel(nn.Module):
    """Gives a transposed view, so that no row of its output is contiguous."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, 2 * x, -x], dim=1).transpose(1, 2)


class DictOutput(nn.Module):
    """A dict of two tensors and a constant."""

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        return {"twice": 2 * x, "sum": x.sum(1), "kind": "dict"}


class Encoded(NamedTuple):
    """A named pair."""

    vector: Any
    norm: Any


class NamedOutput(nn.Module):
    """A namedtuple."""

    def forward(self, x: torch.Tensor) -> Encoded:
        return Encoded(2 * x, x.norm(dim=1))


@dataclass
class EncodedData:
    """A plain dataclass."""

    vector: Any
    norm: Any = None


class DataOutput(nn.Module):
    """A dataclass."""

    def forward(self, x: torch.Tensor) -> EncodedData:
        return EncodedData(2 * x, x.norm(dim=1))


@dataclass
class EncodedOutput(ModelOutput):
    """A ``ModelOutput`` as transformers makes them."""

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class ModelOutputEncoder(nn.Module):
    """A ``ModelOutput`` with a tuple and a field that is None."""

    def forward(self, x: torch.Tensor) -> EncodedOutput:
        return EncodedOutput(last_hidden_state=2 * x, hidden_states=(x + 1, x - 1))


class ConstantsOutput(nn.Module):
    """Every kind of constant beside a tensor."""

    def forward(self, x: torch.Tensor) -> tuple[object, ...]:
        return x + 1, None, "text", 7, True, float("inf"), -0.0, {1: x, None: 2}


class EveryTree(nn.Module):
    """All kinds of containers, one in another."""

    def forward(self, x: torch.Tensor) -> OrderedDict[str, object]:
        return OrderedDict(
            pair=(x, [x + 1]),
            named=Encoded(x, {"deep": (2 * x,)}),
            data=EncodedData(x),
            out=EncodedOutput(x),
            none=None,
        )


class Dropout(nn.Module):
    """Random in training, the identity in eval."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(x)


class Noisy(nn.Module):
    """Random always."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)


class BatchCoupled(nn.Module):
    """Each row less the mean of its batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


class Normalised(nn.Module):
    """A batch norm: coupled and changing its buffers in training, row by row in eval."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def encoder() -> CountingEncoder:
    """A fresh encoder, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return CountingEncoder()
