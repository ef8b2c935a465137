"""What training a head on a frozen MiniLM takes, epoch by epoch, without and with a cache; `figure.py` draws it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks.bench_epoch import Tokenized, Training, definitions, minilm, shuffled
from modcache import MemoryStore, cache_of, cached_module

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from benchmarks.conftest import Report

__all__ = ["minilm"]  # a fixture


@pytest.fixture(autouse=True)
def _threads(measured: bool, request: pytest.FixtureRequest) -> None:
    """Two threads where times count; one in a test, which may have to share the machine with others."""
    request.getfixturevalue("two_threads" if measured else "one_thread")


def test_training(minilm: Any, measured: bool, report: Report) -> None:
    """The same epochs of the same loop, in turn: the cached encoder computes each text once, in the first of them."""
    tokenizer, made = minilm
    rows, batch_size, epochs = (definitions(2_000), 32, 4) if measured else (definitions(16), 8, 2)
    tokenized = Tokenized(tokenizer)
    plain = made()
    cached = cached_module(made(), key="text", prepare=tokenized, store=MemoryStore(1 << 28), freeze=True)
    sides = {"without": lambda texts: plain(**tokenized(texts)), "with": cached}
    loaders = {side: shuffled(rows, batch_size) for side in sides}  # type: ignore[arg-type]  # of the same seed
    trainings = {side: Training() for side in sides}

    for epoch in range(1, epochs + 1):
        for side, encode in list(sides.items())[:: 1 if epoch % 2 else -1]:
            began = time.perf_counter()
            trainings[side].epoch(_encoded(encode, loaders[side]))
            name = f"training a head on MiniLM, {len(rows)} texts, epoch {epoch}, {side} the cache"
            report.number(name, time.perf_counter() - began, "s")

    assert cache_of(cached).stats.computed == len({text for text, _ in rows})
    assert cache_of(cached).stats.hits == epochs * len(rows) - cache_of(cached).stats.computed
    weights = trainings["without"].head.weight
    torch.testing.assert_close(trainings["with"].head.weight, weights, rtol=1e-2, atol=1e-3)


def _encoded(encode: Callable[..., torch.Tensor], loader: Iterable[Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for texts, labels in loader:
        yield encode(texts), labels
