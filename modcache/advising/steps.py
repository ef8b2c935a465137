"""Time training steps of a model, all cuts at once: stamps where a cut is reached, on the way there and back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from ..recycling.runs import Called
from .watching import Pass, Run, Watch

__all__ = ["Parting", "Steps", "Timed", "timed_steps"]

_ENOUGH_SECONDS = 4.0
_LEAST_ROUNDS = 5
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
    """Seconds of a step.

    Args:
        forward: of the model and the loss.
        backward: of the gradients of everything that is trained; 0.0 if nothing is.
        cuts: of steps that resume.
    """

    forward: float
    backward: float
    cuts: Mapping[Called, Timed]


END: Called = "", -1
"""The end of a forward or of a backward, among the moments at which cuts are reached."""

Moments = Mapping[Called, float]


class _Round(NamedTuple):
    """What one step took.

    Args:
        forward: when each cut was reached.
        live: what ran before each cut, and runs in spite of it.
        backward: when the gradient at each cut was there; empty if nothing is trained.
        stretches: how long the way back from one cut to the parameters behind the one before took, by the latter.
        heads: how long the way back to all parameters of a head took, where it was run on its own.
    """

    forward: Moments
    live: Moments
    backward: Moments
    stretches: Moments
    heads: Moments


def timed_steps(model: nn.Module, partings: Mapping[Called, Parting], ready: Run, now: Callable[[], float]) -> Steps:
    """Run steps again and again, and put a step together out of the shortest time of each of its stretches.

    Stretches, and not whole steps, because on a busy machine the shorter one is the likelier to have gone undisturbed:
    what is left of a step would look too quick beside the whole.

    Args:
        model: is left as it is, but for what a forward in training mode does.
        partings: the cuts in the order in which they are reached.
        ready: makes a step ready.
        now: tells the time.
    """
    watch = Watch(now)
    cuts = tuple(dict.fromkeys(path for path, _ in partings))
    spans = tuple({path for parting in partings.values() for path in parting.live})
    rounds: list[_Round] = []
    began = time.perf_counter()
    with watch.on(model, cuts, spans):
        while len(rounds) < _LEAST_ROUNDS or (
            len(rounds) < _MOST_ROUNDS and time.perf_counter() - began < _ENOUGH_SECONDS
        ):
            rounds.append(_round(model, partings, ready, watch))
    forward = settled([one.forward for one in rounds])
    backward = settled([one.backward for one in rounds])
    live = _shortest([one.live for one in rounds])
    heads = _shortest([one.heads for one in rounds])
    stretches = _shortest([one.stretches for one in rounds])
    found: dict[Called, Timed] = {}
    ways: dict[Called, float] = {}
    after = END
    for cut in reversed([cut for cut in partings if cut in forward]):
        if cut in heads:
            ways[cut] = heads[cut]
        elif cut in stretches and after in backward:
            ways[cut] = backward[after] + stretches[cut]
        else:  # nothing between the two is trained
            ways[cut] = ways.get(after, 0.0)
        spared = forward[cut] - live[cut]
        found[cut] = Timed(spared, forward[END] - spared, ways[cut])
        after = cut
    ordered = {cut: found[cut] for cut in partings if cut in found}
    return Steps(forward[END], backward.get(END, 0.0), ordered)


def settled(rounds: Sequence[Moments]) -> dict[Called, float]:
    """The moments of a run that is put together of the shortest stretch between each two.

    >>> settled([{("a", 0): 1.0, ("b", 0): 5.0}, {("a", 0): 2.0, ("b", 0): 3.0}])
    {('a', 0): 1.0, ('b', 0): 2.0}
    """
    always = [key for key in rounds[0] if all(key in one for one in rounds)]  # a layer may be dropped by chance
    found: dict[Called, float] = {}
    moment, before = 0.0, None
    for key in sorted(always, key=lambda key: rounds[0][key]):
        stretch = min(one[key] - (0.0 if before is None else one[before]) for one in rounds)
        moment += max(stretch, 0.0)
        found[key], before = moment, key
    return found


def _shortest(rounds: Sequence[Moments]) -> dict[Called, float]:
    return {key: min(one[key] for one in rounds if key in one) for key in rounds[0]}


def _round(model: nn.Module, partings: Mapping[Called, Parting], ready: Run, watch: Watch) -> _Round:
    run = ready()
    passing = watch.passing = Pass()
    began = watch.now()
    loss = run()
    ended = watch.now()
    passing.ended = True
    forward = {cut: passing.stamps[cut] - began for cut in partings if cut in passing.stamps}
    live = {}
    for cut in forward:
        spans = [span for (path, _), span in passing.spans.items() if path in partings[cut].live]
        live[cut] = sum(taken for left, taken in spans if left <= passing.stamps[cut])
    forward[END] = ended - began
    if not loss.requires_grad:
        return _Round(forward, live, {}, {}, {})
    return _Round(forward, live, *_backwards(model, partings, passing, loss, watch.now))


@dataclass
class _Arrivals:
    """When the gradients at the cuts were there, and what they are."""

    now: Callable[[], float]
    began: float = 0.0
    moments: dict[Called, float] = field(default_factory=dict)
    grads: dict[Called, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)

    def hook(self, cut: Called, tensor: torch.Tensor) -> Callable[[torch.Tensor], None]:
        """What to call when the gradient of a tensor is there."""

        def arrived(grad: torch.Tensor) -> None:
            # Of several tensors the first counts: what others wait for is trained before the cut.
            self.moments.setdefault(cut, self.now() - self.began)
            self.grads.setdefault(cut, []).append((tensor, grad.detach()))

        return arrived


def _backwards(
    model: nn.Module,
    partings: Mapping[Called, Parting],
    passing: Pass,
    loss: torch.Tensor,
    now: Callable[[], float],
) -> tuple[Moments, Moments, Moments]:
    """The moments of the whole way back, and the seconds of the stretches and heads that are run on their own.

    Once a gradient has arrived at a cut, all that comes after the cut is trained. The cut before it trains in addition
    what lies between the two, without passing a gradient on to its own input, which would be an eighth of the work of
    a block; so that stretch is run once more for its parameters alone.
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
    stretches: dict[Called, float] = {}
    heads: dict[Called, float] = {}
    after: Called | None = None
    for cut in reversed([cut for cut in partings if cut in passing.stamps]):
        parting = partings[cut]
        if after is None or parting.between is None or after not in arrivals.moments:
            head = [parameters[name] for name in parting.head if name in parameters]
            heads[cut] = _seconds(now, [loss], head, None)
        elif parting.between:
            outputs, grads = zip(*arrivals.grads[after], strict=True)
            between = [parameters[name] for name in parting.between if name in parameters]
            stretches[cut] = _seconds(now, outputs, between, grads)
        after = cut
    return {**arrivals.moments, END: whole}, stretches, heads


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
