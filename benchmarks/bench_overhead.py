"""What a hit costs besides its keys, the look-up and the copy: re-check of the module, and the call itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from benchmarks.bench_hits import Gathered, row_keys
from benchmarks.conftest import FEW, Case, side_by_side
from modcache import MemoryStore, cached_module, mode

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.conftest import Report

TOKENS = 16  # of a row

pytestmark = pytest.mark.usefixtures("one_thread")


def overhead(
    case: Case, report: Report, name: str, module: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor
) -> float:
    """Seconds of a hit beyond keys, look-up and copy, which are measured apart, as small as they can be."""
    with mode("off"):
        expected = module(batch)
    gathered = Gathered(row_keys(batch), expected.flatten(1))

    def parts() -> torch.Tensor:
        return gathered(row_keys(batch))

    with mode("require-hit"):
        torch.testing.assert_close(module(batch), expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(parts().view_as(expected), expected, rtol=0, atol=0)
    sides = side_by_side(case.rounds, None, call=lambda: module(batch), parts=parts)
    report.sides(name, sides)
    return sides.median("call") - sides.median("parts")


@pytest.mark.parametrize("whole", [False, True], ids=["first state", "all states"])
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_bert(grad: bool, whole: bool, measured: bool, report: Report) -> None:
    """A hit of a BERT of 12 layers: 228 modules to look at, 201 tensors.

    Rows of one state (3 KB) have a goal. Rows of all states (48 KB) show what the copy alone does to what comes
    after it: 0.8 MB are moved, and the re-check is out of the processor's cache when it is next run.
    """
    from transformers import BertConfig, BertModel

    class Encoder(nn.Module):
        """BERT's last hidden states as one tensor: all of them, or the first of each row."""

        def __init__(self, layers: int, size: int) -> None:
            super().__init__()
            config = BertConfig(
                vocab_size=1_000, num_hidden_layers=layers, hidden_size=size, intermediate_size=4 * size
            )
            self.bert = BertModel(config)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            states = self.bert(input_ids).last_hidden_state
            return states if whole else states[:, 0]

    case = FEW if measured else FEW.small()
    torch.manual_seed(0)
    encoder = cached_module(Encoder(*((12, 768) if measured else (2, 48))), store=MemoryStore(1 << 28), freeze=True)
    batch = torch.randint(0, 1_000, (case.rows, TOKENS))
    with torch.set_grad_enabled(grad):
        encoder(batch)
        sort = f"8 rows of {'all states' if whole else 'one state'}, {'' if grad else 'no '}grad"
        taken = overhead(case, report, f"hit of BERT-12, {sort}", encoder, batch)
    what = f"overhead of a hit, BERT of 12 layers, grad mode {'on' if grad else 'off'}, µs"
    if whole:
        report.number(f"{what[:-4]}, rows of 48 KB", taken * 1e6, "µs")
    else:
        report.goal(what, taken * 1e6, at_most=170)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_linear(grad: bool, measured: bool, report: Report) -> None:
    """A hit of a single layer."""
    case = FEW if measured else FEW.small()
    torch.manual_seed(0)
    layer = cached_module(nn.Linear(64, 32), store=MemoryStore(1 << 20), freeze=True)
    batch = torch.randn(case.rows, 64)
    with torch.set_grad_enabled(grad):
        layer(batch)
        taken = overhead(case, report, f"hit of a Linear, 8 rows, {'' if grad else 'no '}grad", layer, batch)
    report.goal(f"overhead of a hit, one Linear, grad mode {'on' if grad else 'off'}, µs", taken * 1e6, at_most=30)
