"""What does it cost, on every call, to be sure that a module is still what it was?"""

from __future__ import annotations

import platform
import statistics
import time
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from modcache.fingerprint import Identity

if TYPE_CHECKING:
    from collections.abc import Callable


def bert(layers: int, width: int, heads: int) -> nn.Module:
    """A BERT of random weights: what is looked at does not depend on them."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        vocab_size=1000,
    )
    return transformers.BertModel(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "one linear layer": lambda: nn.Linear(768, 768),
    "MiniLM, 6 layers": lambda: bert(6, 384, 12),
    "BERT, 12 layers": lambda: bert(12, 768, 12),
}


def timed(call: Callable[[], object], rounds: int = 1000) -> list[float]:
    """Microseconds of each round."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter_ns()
        call()
        found.append((time.perf_counter_ns() - start) / 1e3)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_recheck(name: str) -> None:
    """A still module gives the very same answer; a write behind autograd's back gives another state."""
    module = MODELS[name]().eval().requires_grad_(False)
    identity = Identity()
    start = time.perf_counter_ns()
    first = identity.check(module, True)
    looked = (time.perf_counter_ns() - start) / 1e6
    for grad in (False, True):
        times = sorted(timed(lambda grad=grad: identity.check(module, grad)))
        assert identity.check(module, grad) is first
        p99 = times[len(times) * 99 // 100]
        print(
            f"\n{name}, grad {'on ' if grad else 'off'}:"
            f" median {statistics.median(times):6.1f} µs, p99 {p99:6.1f} µs"
            f" (first look {looked:.0f} ms; {platform.processor() or platform.machine()})",
            end="",
        )
    with torch.no_grad():
        next(iter(module.parameters())).data.add_(1)
    assert identity.check(module, True).state != first.state
