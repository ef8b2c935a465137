"""Time training steps of a model, all cuts at once: stamps where a cut is reached, on the way there and back."""

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

__all__ = ["Parting", "Reached", "Steps", "Timed", "clock_of", "reached_calls", "timed_steps"]

_ENOUGH_SECONDS = 3.0
_LEAST_ROUNDS = 3
_MOST_ROUNDS = 40


class Parting(NamedTuple):
    """What a cut parts.

    Args:
        head: names of the parameters that still train.
        between: those of them that the gradient at the next cut does not reach; ``None`` where a step is not a chain
            of cuts (towers that do not feed this one, tied weights), so that the whole way back has to be timed.
        live: modules that are called before the cut, and run in spite of it.
    """

    head: frozenset[str]
    between: frozenset[str] | None
    live: frozenset[str]


class Timed(NamedTuple):
    """Seconds of a step that resumes at a cut.

    Args:
        trunk: of what is skipped.
        forward: of the rest of the forward, the loss included.
        backward: of the backward as far as anything before it is trained.
    """

    trunk: float
    forward: float
    backward: float


class Steps(NamedTuple):
    """Seconds of a step, the shortest of all rounds.

    Args:
        forward: of the model and the loss.
        backward: of the gradients of everything that is trained; 0.0 if nothing is.
        cuts: of steps that resume.
    """

    forward: float
    backward: float
    cuts: Mapping[Called, Timed]


@dataclass
class _Pass:
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
        number = self.counts.get(path, 0)
        self.counts[path] = number + 1
        return number


class _Watch:
    """Hooks that tell the pass that is going on what is reached; a recomputation in the backward is no pass."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.passing = _Pass(ended=True)

    @contextlib.contextmanager
    def on(self, model: nn.Module, cuts: Sequence[str], spans: Sequence[str]) -> Iterator[_Watch]:
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


Run = Callable[[], Callable[[], torch.Tensor]]
"""Makes a step ready, and gives what runs it: a forward, and the loss of it."""


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


def timed_steps(model: nn.Module, partings: Mapping[Called, Parting], ready: Run, now: Callable[[], float]) -> Steps:
    """Run steps again and again, and keep the shortest time of each of their parts.

    Args:
        model: is left as it is, but for what a forward in training mode does.
        partings: the cuts in the order in which they are reached.
        ready: makes a step ready.
        now: tells the time.
    """
    watch = _Watch(now)
    cuts = tuple(dict.fromkeys(path for path, _ in partings))
    spans = tuple({path for parting in partings.values() for path in parting.live})
    rounds: list[Steps] = []
    began = time.perf_counter()
    with watch.on(model, cuts, spans):
        while len(rounds) < _LEAST_ROUNDS or (
            len(rounds) < _MOST_ROUNDS and time.perf_counter() - began < _ENOUGH_SECONDS
        ):
            rounds.append(_round(model, partings, ready, watch))
    always = [cut for cut in partings if all(cut in one.cuts for one in rounds)]  # a layer may be dropped by chance
    return Steps(
        min(one.forward for one in rounds),
        min(one.backward for one in rounds),
        {cut: Timed(*map(min, zip(*(one.cuts[cut] for one in rounds), strict=True))) for cut in always},
    )


def clock_of(device: torch.device) -> Callable[[], float]:
    """Tells the time when all that was asked of a device is done."""
    if device.type in ("cpu", "meta"):
        return time.perf_counter

    def now() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return now


def _round(model: nn.Module, partings: Mapping[Called, Parting], ready: Run, watch: _Watch) -> Steps:
    run = ready()
    passing = watch.passing = _Pass()
    began = watch.now()
    loss = run()
    ended = watch.now()
    passing.ended = True
    forwards = {}
    for cut, parting in partings.items():
        if (moment := passing.stamps.get(cut)) is not None:
            lasting = [span for (path, _), span in passing.spans.items() if path in parting.live]
            live = sum(taken for left, taken in lasting if left <= moment)
            forwards[cut] = moment - began - live, ended - moment + live
    whole, backwards = _backwards(model, partings, passing, loss, watch.now) if loss.requires_grad else (0.0, {})
    return Steps(ended - began, whole, {cut: Timed(*times, backwards.get(cut, 0.0)) for cut, times in forwards.items()})


@dataclass
class _Arrivals:
    """When the gradients at the cuts were there, and what they are."""

    now: Callable[[], float]
    began: float = 0.0
    moments: dict[Called, float] = field(default_factory=dict)
    grads: dict[Called, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)

    def hook(self, cut: Called, tensor: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def arrived(grad: torch.Tensor) -> None:
            # Of several tensors the first counts: what others wait for is trained before the cut.
            self.moments.setdefault(cut, self.now() - self.began)
            self.grads.setdefault(cut, []).append((tensor, grad.detach()))

        return arrived


def _backwards(
    model: nn.Module,
    partings: Mapping[Called, Parting],
    passing: _Pass,
    loss: torch.Tensor,
    now: Callable[[], float],
) -> tuple[float, dict[Called, float]]:
    """Seconds of the whole way back, and of the way back to each cut.

    Once a gradient has arrived at a cut, all that comes after the cut is trained. The cut before it trains in addition
    what lies between the two, without passing a gradient on to its own input, which is more than a tenth of the work
    of a block; so that stretch is run once more for its parameters alone.
    """
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    arrivals = _Arrivals(now)
    handles = [
        tensor.register_hook(arrivals.hook(cut, tensor))  # type: ignore[no-untyped-call]
        for cut in partings
        for tensor in passing.tensors.get(cut, ())
    ]
    try:
        arrivals.began = now()
        whole = _seconds(now, [loss], list(parameters.values()), None)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[Called, float] = {}
    after: Called | None = None
    for cut in reversed([cut for cut in partings if cut in passing.stamps]):
        parting = partings[cut]
        if after is None or parting.between is None or after not in arrivals.moments:
            head = [parameters[name] for name in parting.head if name in parameters]
            found[cut] = _seconds(now, [loss], head, None)
        elif parting.between:
            outputs, grads = zip(*arrivals.grads[after], strict=True)
            between = [parameters[name] for name in parting.between if name in parameters]
            found[cut] = arrivals.moments[after] + _seconds(now, outputs, between, grads)
        else:
            found[cut] = found[after]
        after = cut
    return whole, found


def _seconds(
    now: Callable[[], float],
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor] | None,
) -> float:
    """How long it takes to get the gradients of some tensors; nothing is accumulated anywhere."""
    if not inputs:
        return 0.0
    began = now()
    found = torch.autograd.grad(outputs, inputs, grads, retain_graph=True, allow_unused=True)
    ended = now()
    del found
    return ended - began
