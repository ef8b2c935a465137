"""`advise` measures what a cut costs and gains, names the one that pays, and touches nothing."""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from modcache import Advice, CutError, UsageError, UsageTypeError, advise, cached_module, recycle, uncached
from modcache.advising.blocks import blocks_of
from modcache.advising.costs import Costs, Size, advised_cut, break_even
from modcache.advising.reading import disk_of, gather_seconds

NAP = 0.006  # seconds: longer than what a busy machine adds to a nap that goes well


# --- models ---------------------------------------------------------------------------------------------


class _Napping(torch.autograd.Function):
    """The identity, with a nap on the way back."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        time.sleep(NAP)
        return grad


class Slow(nn.Module):
    """Naps once in the forward, once for the gradient of its weight, and once for that of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(NAP)
        return _Napping.apply(x) * 0.5 + _Napping.apply(self.weight)


class Stack(nn.Module):
    """Blocks one after the other, and a layer behind them."""

    def __init__(self, *blocks: nn.Module, width: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.last = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def slow(count: int = 4) -> Stack:
    return Stack(*(Slow() for _ in range(count)))


class Norms(nn.Module):
    """Everything that a step leaves behind: statistics, counters, dropped values, a remembered tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(4, 1)
        self.calls = 0
        self.sizes: list[int] = []
        self.mean = torch.zeros(4)
        self.fails_at = math.inf

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.sizes.append(len(x))
        if self.calls > self.fails_at:
            raise RuntimeError("the model failed")
        self.mean += x.detach().mean(0)
        random.random(), np.random.random()
        self.latest = x.detach()
        return self.last(self.drop(self.norm(self.first(x))))


def sequence(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(one, two) for one, two in itertools.pairwise(widths)))


@pytest.fixture(scope="module")
def advice() -> Advice:
    """What is said of four slow blocks and a layer."""
    return advise(slow(), torch.randn(6, 4), rows=60, epochs=5)


EIGHT = Size(8)


def made(**changes: float) -> Costs:
    """Costs of a cut, of which only some matter."""
    zero = dict.fromkeys(("trunk", "forward", "backward", "fixed", "reading", "parameters"), 0.0)
    return Costs(**{**zero, "row_bytes": 4, **changes})


def advised(step: float = 1.0, size: Size = EIGHT, **changes: float) -> Any:
    return advised_cut("block", 0, False, (), step, made(**changes), size)


# --- what it measures -----------------------------------------------------------------------------------


def test_seconds_of_each_cut_are_those_of_its_parts(advice):
    """A cut saves the forward before it, the backward before it, and the gradient of its own input."""
    assert [cut.at for cut in advice.cuts] == ["blocks.1", "blocks.2", "blocks.3", "last"]
    assert advice.forward_seconds == pytest.approx(4 * NAP, rel=0.3)
    assert advice.backward_seconds == pytest.approx((4 + 3) * NAP, rel=0.3)
    for cut, below in zip(advice.cuts, range(1, 5), strict=True):
        above = 4 - below
        naps = above + above + max(above - 1, 0)  # forwards, weights, inputs but that of the cut
        assert cut.head_seconds == pytest.approx(naps * NAP, rel=0.3, abs=NAP / 3)
        assert cut.trunk_seconds == pytest.approx(below * NAP, rel=0.3)


def test_the_way_back_of_a_tower_is_counted():
    """Where a tower that does not feed the cut runs before it, it runs and trains on every step."""

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.side = Slow()
            self.below = Slow()
            self.above = Slow()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            side = self.side(x)
            return self.above(self.below(x)) + side

    found = advise(Towers(), torch.randn(6, 4), candidates=["above"])
    (cut,) = found.cuts
    assert cut.trunk_seconds == pytest.approx(NAP, rel=0.3)
    assert cut.head_seconds == pytest.approx(4 * NAP, rel=0.3)  # two forwards, two weights
    assert cut.parameters == pytest.approx(1 / 3)


def test_tied_weights_are_named_and_not_trained():
    """A weight of the trunk that the head uses, too, takes no time on the way back, and is named."""

    class Tied(Stack):
        def __init__(self) -> None:
            super().__init__(Slow(), Slow(), Slow())
            self.blocks[2].weight = self.blocks[0].weight

    found = advise(Tied(), torch.randn(6, 4), candidates=["blocks.2"])
    (cut,) = found.cuts
    assert cut.head_seconds == pytest.approx(NAP, rel=0.3)  # the forward alone; `last` takes nothing
    assert cut.frozen == ("blocks.0.weight", "blocks.2.weight")
    assert "the head uses blocks.0.weight, blocks.2.weight, too" in str(found)


def test_each_call_of_a_block_is_a_cut():
    """A block that is called again and again can be cut at each call."""

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.block = Slow()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            for _ in range(3):
                x = self.block(x)
            return x

    found = advise(Loop(), torch.randn(6, 4), candidates=["block"])
    assert [(cut.at, cut.call) for cut in found.cuts] == [("block", 0), ("block", 1), ("block", 2)]
    assert found.cuts[2].frozen == ("block.weight",)
    assert found.cuts[2].head_seconds == pytest.approx(NAP, rel=0.3)  # its weight is in the trunk, too
    assert "block, call=2" in str(found)


def test_nothing_trained_is_the_forward_alone():
    """Without grad, or with all parameters frozen, a step is a forward."""
    model, batch = slow(2), torch.randn(6, 4)
    with torch.no_grad():
        without = advise(model, batch)
    frozen = advise(model.requires_grad_(False), batch)
    for found in (without, frozen):
        assert found.backward_seconds == 0.0
        assert found.step_seconds == pytest.approx(2 * NAP, rel=0.3)
        assert found.cuts[-1].head_seconds < NAP
        assert "forward alone, nothing is trained" in str(found)


def test_a_frozen_trunk_saves_its_forward():
    """Where the user has frozen what is below, a cut there saves no backward."""
    model = slow(3)
    model.blocks[:2].requires_grad_(False)
    found = advise(model, torch.randn(6, 4), candidates=["blocks.2"])
    assert found.step_seconds == pytest.approx(4 * NAP, rel=0.3)
    assert found.cuts[0].head_seconds == pytest.approx(2 * NAP, rel=0.3)


def test_bytes_of_a_row_are_those_of_what_crosses():
    """What is stored of a row is what the trunk computes and hands to the cut, and neither inputs nor labels."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(4, 10)
            self.exact = nn.Linear(4, 3, dtype=torch.float64)
            self.top = Top()

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return self.top(self.wide(x), self.exact(x.double()), x, labels)

    class Top(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return self.scale * sum(tensor.sum() for tensor in tensors)

    batch = {"x": torch.randn(5, 4), "labels": torch.arange(5)}
    (cut,) = advise(Pair(), batch, rows=1_000, candidates=["top"]).cuts
    assert cut.row_bytes == 10 * 4 + 3 * 8
    assert cut.data_bytes == 64_000
    assert cut.total_seconds is None


def test_a_skip_takes_extra():
    """Where a value goes around the cut, the advice is to store it, too."""

    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below, self.above = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.below(x)
            return self.above(h.relu()) + h

    found = advise(Skip(), torch.randn(6, 4), candidates=["above"])
    (cut,) = found.cuts
    assert cut.extra
    assert cut.row_bytes == 2 * 4 * 4
    assert "above, extra=True" in str(found)


def test_a_cut_that_would_be_refused_is_told_with_its_reason():
    """What `recycle` refuses is no cut, and the report has the reason."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below, self.above = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.below(x)
            return self.above(h) if h.mean() > 100 else self.above(-h)

    found = advise(Branch(), torch.randn(6, 4), candidates=["above"])
    assert found.cuts == ()
    assert found.best is None
    ((name, why),) = found.refused
    assert name == "above"
    assert f"at above: no cut here: {why}" in str(found)
    with pytest.raises(CutError) as error:
        recycle(Branch(), "above", batch=torch.randn(6, 4))
    assert str(error.value) == why


def test_what_is_advised_can_be_done():
    """A recycled model stores what was said, and freezes what was said."""
    from modcache import cache_of

    model, batch = sequence(4, 5, 6, 2), torch.randn(6, 4)
    for cut in advise(model, batch).cuts:
        with_cut = recycle(model, cut.at, batch=batch)
        known = cache_of(with_cut).cut
        frozen = sum(model.get_parameter(name).numel() for name in known.frozen)
        assert known.row_bytes == cut.row_bytes
        assert frozen / sum(value.numel() for value in model.parameters()) == pytest.approx(cut.parameters)
        uncached(model)


# --- what it leaves alone -------------------------------------------------------------------------------


def everything(model: nn.Module) -> list[Any]:
    """What may change on a model, as values that can be compared."""
    found: list[Any] = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, dict):
                found.append((name, key, [(inner, _seen(item)) for inner, item in value.items()]))
            else:
                found.append((name, key, _seen(value)))
    for name, value in model.named_parameters():
        found.append((name, id(value), value._version, value.requires_grad, _seen(value.grad)))
    return found


def _seen(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return id(value), value._version, value.tolist()
    return (
        (id(value), list(value)) if isinstance(value, list) else value if isinstance(value, bool | int) else id(value)
    )


def prepared() -> Norms:
    model = Norms()
    model.register_forward_hook(lambda *_: None)
    model.norm.register_full_backward_hook(lambda *_: None)
    model(torch.randn(8, 4)).sum().backward()
    model.drop.eval()
    model.first.bias.requires_grad_(False)
    return model


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_as_it_was(training):
    """Parameters, gradients, statistics, attributes, modes, hooks and random numbers are what they were."""
    model = prepared()
    model.norm.train(training)
    batch = torch.randn(6, 4)
    given_batch, before = (batch.clone(), batch._version), everything(model)
    advise(model, batch, candidates=["norm", "last"])
    assert everything(model) == before
    assert (batch._version, torch.equal(batch, given_batch[0])) == (given_batch[1], True)


@pytest.mark.parametrize("calls", [1, 2, 4, 20])
def test_the_model_is_as_it_was_when_it_raises(calls):
    """A model that fails at its first step, or at a later one, is left as it was, and its error comes out."""
    model, batch = prepared(), torch.randn(6, 4)
    model.fails_at = model.calls + calls
    before = everything(model)
    with pytest.raises(RuntimeError, match="the model failed"):
        advise(model, batch, candidates=["last"])
    assert everything(model) == before


def test_a_loss_that_raises_leaves_no_trace():
    """So does an error of the user's loss."""
    model, batch = prepared(), torch.randn(6, 4)
    before = everything(model)
    with pytest.raises(ZeroDivisionError):
        advise(model, batch, loss=lambda _: 1 / 0)
    assert everything(model) == before


def test_a_graph_from_before_can_still_be_run_backwards():
    """Advice in the middle of a step spoils nothing that the step has saved for its backward."""
    model, twin = Norms().train(), Norms().train()
    twin.load_state_dict(model.state_dict())
    batch = torch.randn(8, 4)
    torch.manual_seed(1)
    loss = model(batch).square().sum()
    advise(model, batch, candidates=["last"])
    loss.backward()
    torch.manual_seed(1)
    twin(batch).square().sum().backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0)


def test_optimizers_inside_of_the_backward_do_not_step():
    """Nothing is accumulated, so what waits for accumulated gradients is not called."""

    def explode(_: torch.Tensor) -> None:
        raise AssertionError("a gradient was accumulated")

    model = sequence(4, 4, 2)
    for value in model.parameters():
        value.register_post_accumulate_grad_hook(explode)
    advise(model, torch.randn(6, 4))


def test_a_model_may_write_into_its_batch():
    """The batch that is handed in stays what it is, also where the model changes its input in place."""
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Linear(4, 2))
    batch = torch.randn(6, 4)
    expected = batch.clone()
    advise(model, batch, candidates=["2"])
    assert torch.equal(batch, expected)


# --- what it is asked -----------------------------------------------------------------------------------


def test_batches_are_calls():
    """A mapping is keywords, a tuple positional, anything else the one argument."""
    model = slow(2)
    for batch in ({"x": torch.randn(6, 4)}, (torch.randn(6, 4),), torch.randn(6, 4)):
        assert [cut.at for cut in advise(model, batch).cuts] == ["blocks.1", "last"]


def test_the_loss_is_timed_and_run_backwards():
    """A loss of the user's is part of the step; without one, `loss` of the output or its sum."""

    def late(output: torch.Tensor) -> torch.Tensor:
        time.sleep(5 * NAP)
        return output.sum()

    class WithLoss(Stack):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": super().forward(x).mean(), "logits": x.detach().log()}

    assert advise(slow(1), torch.randn(6, 4), loss=late).forward_seconds == pytest.approx(6 * NAP, rel=0.3)
    assert advise(WithLoss(Slow(), Slow()), torch.randn(6, 4)).backward_seconds == pytest.approx(3 * NAP, rel=0.3)


@pytest.mark.parametrize("loss", [lambda output: output, lambda output: 3.0], ids=["a batch", "a float"])
def test_a_loss_is_one_number(loss):
    """A loss that is no tensor of one element is refused."""
    with pytest.raises(UsageTypeError, match="a tensor of one element"):
        advise(sequence(4, 4, 2), torch.randn(6, 4), loss=loss)


def test_unknown_candidates_are_told_with_the_nearest():
    """A name that is not there is refused, with those that are nearest."""
    with pytest.raises(CutError, match=r"'blocks\.7'.*nearest names are blocks\."):
        advise(slow(2), torch.randn(6, 4), candidates=["blocks.7"])
    with pytest.raises(CutError, match="a ModuleList, which is never called"):
        advise(slow(2), torch.randn(6, 4), candidates=["blocks"])
    with pytest.raises(CutError, match="''"):
        advise(slow(2), torch.randn(6, 4), candidates=[""])


def test_candidates_that_are_never_called_are_refused():
    """A submodule that the forward does not call cannot be asked about; a block that it does not call is left out."""
    model = slow(2)
    model.unused = nn.Linear(4, 4)
    with pytest.raises(CutError, match="unused: never called"):
        advise(model, torch.randn(6, 4), candidates=["last", "unused"])
    assert "unused" not in str(advise(model, torch.randn(6, 4)))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"candidates": "last"}, UsageTypeError, "names of submodules"),
        ({"candidates": [3]}, UsageTypeError, "found 3 among them"),
        ({"candidates": 3}, UsageTypeError, "found 3"),
        ({"rows": 0}, UsageError, "at least 1"),
        ({"rows": 1.5}, UsageTypeError, "whole number"),
        ({"epochs": True}, UsageTypeError, "whole number"),
        ({"loss": 3}, UsageTypeError, "a function of the model's output"),
        ({"store": 3}, UsageTypeError, "the path of the directory"),
        ({"store": ""}, UsageTypeError, "the path of the directory"),
        ({"batch": torch.randn(1, 4)}, UsageError, "at least two rows"),
    ],
)
def test_options_that_cannot_be_right(options, error, says):
    """Each is refused in the user's words."""
    asked = {"batch": torch.randn(6, 4), **options}
    with pytest.raises(error, match=says):
        advise(sequence(4, 4, 2), **asked)


def test_models_that_cannot_be_asked_about(tmp_path):
    """No module, a cached one, a lazy one, TorchScript, a store that is a file, reentrant checkpoints: refused."""
    batch = torch.randn(6, 4)
    with pytest.raises(UsageTypeError, match=r"takes an nn\.Module"):
        advise(len, batch)
    with pytest.raises(UsageError, match="cached or recycled already"):
        advise(cached_module(sequence(4, 4, 2), freeze=True), batch)
    with pytest.raises(UsageError, match="cached or recycled already"):
        advise(recycle(sequence(4, 4, 2), "1", batch=batch), batch)
    with pytest.raises(UsageError, match="call it once first"):
        advise(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)), batch)
    with pytest.raises(CutError, match="TorchScript"):
        advise(torch.jit.script(sequence(4, 4, 2)), batch)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="nothing can be written"):
        advise(sequence(4, 4, 2), batch, store=tmp_path / "file" / "cache")

    class Checkpointed(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(checkpoint(self.blocks[0], x.requires_grad_(), use_reentrant=self.reentrant))

    model = Checkpointed(nn.Linear(4, 4))
    model.reentrant = True
    with pytest.raises(UsageError, match="use_reentrant=False"):
        advise(model, batch, candidates=["last"])
    model.reentrant = False
    assert advise(model, batch, candidates=["last"]).cuts


def test_a_model_that_has_no_cut():
    """One layer has nothing below it; that is an answer, and no error."""
    found = advise(nn.Linear(4, 2), torch.randn(6, 4))
    assert found.cuts == ()
    assert found.best is None
    assert found.reason == "none: there is no candidate"
    assert str(found).endswith(found.reason)


# --- blocks ---------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A block as models have it: attention, norm, and two layers with something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)
        self.mlp = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))


class Residual(nn.Module):
    """A block with two equal parts inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(_conv(), _conv())
        self.shortcut = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))


def _conv() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))


def _named(**children: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


class Stage(nn.Module):
    """Blocks and what makes them smaller."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.LayerNorm(2), nn.Linear(2, 2)])
        self.layers = nn.ModuleList(Block() for _ in range(count))


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (nn.Linear(2, 2), []),
        (sequence(2, 2, 2), ["0", "1"]),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), ["0", "2"]),
        (_named(conv=nn.Linear(2, 2), act=nn.ReLU(), fc=nn.Linear(2, 2)), ["conv", "fc"]),
        (_named(features=sequence(2, 2, 2), fc=nn.Linear(2, 2)), ["features.0", "features.1", "fc"]),
        (
            _named(
                body=_named(embeddings=nn.Linear(2, 2), encoder=_named(layer=nn.ModuleList([Block(), Block()]))),
                classifier=nn.Sequential(nn.Flatten(), nn.Linear(2, 2)),
            ),
            ["body.embeddings", "body.encoder.layer.0", "body.encoder.layer.1", "classifier"],
        ),
        (
            _named(stem=_conv(), stages=nn.ModuleList([Stage(2), Stage(1)])),
            ["stem", "stages.0.layers.0", "stages.0.layers.1", "stages.1.layers.0"],
        ),
        (
            _named(one=nn.Sequential(Residual(), Residual()), two=nn.Sequential(Residual()), fc=nn.Linear(2, 2)),
            ["one.0", "one.1", "two.0", "fc"],
        ),
        (_named(encoder=_named(groups=nn.ModuleList([Block()]))), ["encoder.groups.0"]),
    ],
)
def test_blocks_are_what_one_would_name(model, names):
    """Elements of stacks, stages opened, and what stands beside them; nothing inside of a block."""
    found = [name for name in blocks_of(model) if not isinstance(model.get_submodule(name), nn.ModuleList)]
    assert found == names


# --- what follows ---------------------------------------------------------------------------------------


@given(
    step=st.floats(0.1, 10),
    filling=st.floats(0.1, 100),
    recycled=st.floats(0.1, 10),
)
def test_break_even_is_the_first_epoch_that_ends_ahead(step, filling, recycled):
    """Adding up epoch by epoch finds the same one."""
    found = break_even(step, filling, recycled)
    if recycled >= step:
        assert found is None
        return
    assert found is not None
    plain, spent = step, filling
    for _ in range(found - 1):
        assert spent >= plain - 1e-6 * plain
        plain, spent = plain + step, spent + recycled
    assert spent < plain + 1e-6 * plain


def test_a_step_is_head_and_fixed_and_reading():
    """The seconds of a recycled step, its ratio, and those of a step that fills."""
    cut = advised(1.0, Size(8), trunk=0.25, forward=0.125, backward=0.25, fixed=0.0625, reading=0.0625)
    assert (cut.head_seconds, cut.seconds, cut.ratio) == (0.375, 0.5, 2.0)
    assert cut.time == 0.625
    assert cut.filling_seconds == 0.75
    assert (cut.break_even, cut.pays) == (1, True)
    assert (cut.data_bytes, cut.disk_ratio, cut.total_seconds) == (None, None, None)


def test_the_disk_is_in_the_time_of_filling_and_may_eat_the_gain():
    """Rows that are written and read at so many bytes a second."""
    disk = {"disk_reading": 64.0, "disk_writing": 32.0}
    cut = advised(1.0, Size(8), trunk=0.25, forward=0.5, row_bytes=4, **disk)
    assert cut.seconds == 0.5  # memory is in front of the disk
    assert cut.disk_ratio == 1.0
    assert cut.disk_eats_gain
    assert cut.filling_seconds == 0.25 + 0.5 + 1.0
    assert not advised(1.0, Size(8), forward=0.5, row_bytes=2, **disk).disk_eats_gain


def test_rows_beyond_memory_are_computed_or_read():
    """Half of the rows have room: the others are computed in each epoch, or come from the disk where there is one."""
    size = Size(8, rows=100, epochs=3, room=200)
    assert advised(1.0, size, trunk=0.25, forward=0.5, row_bytes=4).seconds == 0.5 + 0.125
    disk = {"disk_reading": 256.0, "disk_writing": 1e9}
    assert advised(1.0, size, trunk=0.25, forward=0.5, row_bytes=4, **disk).seconds == 0.5 + 0.0625
    assert advised(1.0, size, trunk=0.25, forward=0.5, row_bytes=2).seconds == 0.5


def test_all_epochs_are_added_up():
    """One that fills, and the others; a last step that is smaller counts as one."""
    cut = advised(1.0, Size(8, rows=17, epochs=4), trunk=0.25, forward=0.5)
    assert cut.total_seconds == 3 * (0.75 + 3 * 0.5)


def report(*cuts: Any, size: Size = EIGHT, step: float = 1.0, refused: Any = ()) -> Advice:
    return Advice("Model", cuts, refused, step / 4, step * 3 / 4, size)


def test_best_is_the_highest_ratio_that_pays():
    """The fastest one is named, unless it does not pay within the epochs."""
    slow_one, fast = advised(forward=0.5), advised(forward=0.25)
    assert report(slow_one, fast).best is fast
    size = Size(8, rows=8, epochs=2)
    late = advised(1.0, size, forward=0.125, trunk=5.0)
    assert late.break_even is None
    assert report(advised(1.0, size, forward=0.5), late, size=size).best.seconds == 0.5
    only = report(late, size=size)
    assert only.best is None
    assert "takes more than 2 epochs" in only.reason


def test_a_gain_that_may_be_noise_is_no_advice():
    """Less than a twentieth is named as what it is, whether or not the number of epochs is known."""
    for size in (Size(8), Size(8, rows=8, epochs=100)):
        small = advised(1.0, size, forward=0.96)
        assert (small.ratio > 1.0, small.break_even) == (True, None)
        assert report(small, size=size).reason == (
            "none: at block, which is the fastest, a step takes 960 ms instead of 1 s, which may be noise"
        )


def test_a_trunk_that_is_cheaper_than_its_rows_is_no_advice():
    """When reading takes longer than computing, no cut is named, and the reason has the numbers."""
    found = report(advised(forward=0.75, reading=0.5), advised(forward=0.5, reading=0.75, fixed=0.05))
    assert found.best is None
    assert found.reason == (
        "none: every trunk is cheaper than reading its rows; at block 500 ms would be spent to save 250 ms"
    )
    real = advise(sequence(4, 4, 4, 4), torch.randn(64, 4))
    assert real.best is None
    assert "cheaper than reading its rows" in str(real)


def test_it_prints_as_a_table(advice):
    """A line for each cut, columns in line, columns without values left out, and the advice in words."""
    lines = str(advice).splitlines()
    assert lines[0].startswith("Stack, 6 rows a step: ")
    assert "5 epochs of 60 rows" in lines[0]
    table = lines[2:7]
    assert table[0].split() == (
        "cut at weights time a row all rows step reading fixed ratio filling pays in epoch 5 epochs".split()
    )
    assert [line.split()[0] for line in table[1:]] == [cut.at for cut in advice.cuts]
    assert len({len(line) for line in table}) == 1
    assert lines[-1] == f"best: last: a step takes {lines[-1].split('takes ')[1]}"
    assert "from disk" not in str(advice)


def test_it_is_plain_values_too(advice):
    """`to_dict` survives JSON, with all numbers, and names the best cut."""
    plain = advice.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["best"] == "last"
    assert plain["cuts"][1]["ratio"] == advice.cuts[1].ratio
    assert plain["size"]["rows"] == 60
    with pytest.raises(AttributeError):
        advice.cuts = ()


def test_notes_name_what_the_numbers_do_not_show():
    """Rows that have no room, a disk that is too slow, and refusals with one reason are told once each."""
    size = Size(8, rows=100, epochs=9, room=200)
    disk = {"disk_reading": 32.0, "disk_writing": 1e9}
    without, with_disk = (advised(1.0, size, forward=0.25, trunk=0.25, **more) for more in ({}, disk))
    text = str(report(without, with_disk, size=size, refused=(("a", "no way"), ("b", "no way"))))
    assert "at block: memory has room for 200 B of rows; the others are computed in each epoch" in text
    assert "at block: memory has room for 200 B of rows; the others come from the disk" in text
    assert "at a, b: no cut here: no way" in text
    slow_disk = advised(1.0, Size(8), forward=0.25, row_bytes=8, **disk)
    assert "at block: the disk would eat the gain" in str(report(slow_disk))


class Axes:
    """Takes down what is drawn on it."""

    def __init__(self) -> None:
        self.bars: dict[str, tuple[list[float], list[float]]] = {}
        self.names: list[str] = []

    def barh(self, places: Any, seconds: list[float], *, left: list[float], label: str) -> None:
        assert len(places) == len(seconds)
        self.bars[label] = left, seconds

    def set_yticks(self, places: Any, names: list[str]) -> None:
        self.names = names

    def __getattr__(self, name: str) -> Any:
        assert name in {"invert_yaxis", "set_xlabel", "set_title", "legend"}
        return lambda *_: None


def test_it_draws_what_a_step_takes(advice):
    """Bars of head, reading and fixed costs, one behind the other, the step as it is first."""
    axes = Axes()
    assert advice.plot(axes) is axes
    assert axes.names == ["as it is", *(cut.at for cut in advice.cuts)]
    assert axes.bars["head"][1] == [advice.step_seconds, *(cut.head_seconds for cut in advice.cuts)]
    left, seconds = axes.bars["fixed"]
    ends = [start + more for start, more in zip(left, seconds, strict=True)]
    assert ends == pytest.approx([advice.step_seconds, *(cut.seconds for cut in advice.cuts)])


def test_drawing_without_matplotlib_says_what_to_install(advice, monkeypatch):
    """The error names the extra."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'modcache\[plot\]'"):
        advice.plot()


# --- reading --------------------------------------------------------------------------------------------


def test_the_disk_is_measured_where_rows_would_lie(tmp_path):
    """A directory that is not there yet lies on its parent's disk; nothing is left there, and nothing is made."""
    found = advise(slow(2), torch.randn(6, 4), store=tmp_path / "not" / "yet")
    assert list(tmp_path.iterdir()) == []
    assert all(cut.disk_ratio is not None for cut in found.cuts)
    assert "from disk" in str(found)
    assert found.store == str(tmp_path / "not" / "yet")
    assert min(disk_of(tmp_path)) > 0


def test_gathering_grows_with_the_bytes():
    """More bytes take longer; none take nothing; rows larger than what is tried out are reckoned from it."""
    cpu = torch.device("cpu")
    assert gather_seconds(0, 8, cpu) == 0.0
    few, many = gather_seconds(1_000, 32, cpu), gather_seconds(100_000, 320, cpu)
    assert 0.0 < few < many < gather_seconds(100_000_000, 320, cpu)
