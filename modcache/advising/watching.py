"""Watch a step of a model go by: the order in which it reaches the candidates, and when."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import UsageError
from ..recycling.runs import Called
from ..recycling.trees import located

__all__ = ["Pass", "Reached", "Run", "Watch", "clock_of", "reached_calls"]

Run = Callable[[], Callable[[], torch.Tensor]]
"""Makes a step ready, and gives what runs it: a forward, and the loss of it."""


def clock_of(device: torch.device) -> Callable[[], float]:
    """Tells the time when all that was asked of a device is done."""
    if device.type in ("cpu", "meta"):
        return time.perf_counter

    def now() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return now


class Reached(NamedTuple):
    """In which order a step goes through a model.

    Args:
        cuts: the calls of the candidates, and after how many calls of modules each came.
        last: after how many calls each module was called for the last time.
    """

    cuts: Mapping[Called, int]
    last: Mapping[str, int]

    def called_from(self, cut: Called) -> frozenset[str]:
        """The modules that are called from a cut on."""
        return frozenset(path for path, moment in self.last.items() if moment >= self.cuts[cut])


def reached_calls(model: nn.Module, candidates: Sequence[str], ready: Run) -> Reached:
    """The order in which a step reaches the candidates; this run is for warming up, too.

    Raises:
        UsageError: a step cannot be timed.
    """
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    cuts: dict[Called, int] = {}
    last: dict[str, int] = {}
    counts: dict[str, int] = {}
    moments = itertools.count()

    def entered(module: nn.Module, _: Any) -> None:
        moment = next(moments)
        for path in paths[module]:
            last[path] = moment
            if path in candidates:
                cuts[path, counts.setdefault(path, 0)] = moment
                counts[path] += 1

    handles = [module.register_forward_pre_hook(entered) for module in paths]
    try:
        loss = ready()()
    finally:
        for handle in handles:
            handle.remove()
    _refuse_reentrant(loss)
    return Reached(cuts, last)


def _refuse_reentrant(loss: torch.Tensor) -> None:
    """Refuse a graph that hides parameters: their gradients could not be asked for, and would seem to cost nothing.

    Raises:
        UsageError: there is a reentrant checkpoint in it.
    """
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise UsageError(
                "advise(...) cannot time gradient checkpointing with use_reentrant=True, which hides what it trains "
                "from autograd: checkpoint with use_reentrant=False while you ask"
            )
        nodes += [following for following, _ in node.next_functions]


# --- stamps ---------------------------------------------------------------------------------------------


@dataclass
class Pass:
    """One forward as it is going on.

    Args:
        stamps: when each cut was reached.
        tensors: what it was given that passes gradients on.
        spans: when each call of the modules that run in spite of a cut ended, and how long it took.
    """

    stamps: dict[Called, float] = field(default_factory=dict)
    tensors: dict[Called, list[torch.Tensor]] = field(default_factory=dict)
    spans: dict[Called, tuple[float, float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    open: list[tuple[Called, float]] = field(default_factory=list)
    ended: bool = False

    def number_of(self, path: str) -> int:
        """The number of the next call of a module."""
        number = self.counts.get(path, 0)
        self.counts[path] = number + 1
        return number


class Watch:
    """Hooks that tell the pass that is going on what is reached; a recomputation in the backward is no pass."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.passing = Pass(ended=True)

    @contextlib.contextmanager
    def on(self, model: nn.Module, cuts: Sequence[str], spans: Sequence[str]) -> Iterator[Watch]:
        """Watch these submodules."""
        handles = []
        try:
            for path in dict.fromkeys((*cuts, *spans)):
                module = model.get_submodule(path)
                if path in spans:
                    handles.append(module.register_forward_hook(self._left(path), always_call=True))
                pre = self._entered(path, path in cuts, path in spans)
                handles.append(module.register_forward_pre_hook(pre, with_kwargs=True))
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _entered(self, path: str, cut: bool, span: bool) -> Callable[..., None]:
        def entered(module: nn.Module, args: Any, kwargs: Any) -> None:
            passing = self.passing
            if passing.ended:
                return
            called = path, passing.number_of(path)
            moment = self.now()
            if cut:
                passing.stamps[called] = moment
                passing.tensors[called] = [one for _, one in located((args, kwargs)) if one.requires_grad]
            if span:
                passing.open.append((called, moment))

        return entered

    def _left(self, path: str) -> Callable[..., None]:
        def left(module: nn.Module, args: Any, output: Any) -> None:
            passing = self.passing
            if not passing.ended and passing.open and passing.open[-1][0][0] == path:
                called, began = passing.open.pop()
                moment = self.now()
                passing.spans[called] = moment, moment - began

        return left
