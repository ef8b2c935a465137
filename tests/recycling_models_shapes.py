"""Tiny models whose rows lie in other places than dimension 0, or that write in place."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.recycling_models import (
    Parts,
    hazard,
    images,
    sequences,
    square,
    time_first,
)
from tests.recycling_oracle import Block

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

    def __init__(self) -> None:
        super().__init__()
        self.mid = nn.Tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.below(x)
        z = self.mid(h)
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
