"""Run a model while it is probed: in full, up to the cut, and from the cut on with values of another run."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..arguments import Arguments
from ..chance import preserved_randomness
from .branches import Branches
from .captures import Captured, capture, not_reached
from .gates import running
from .ghosts import Ghost, unwrapped
from .kinds import owned
from .origins import Origin
from .plan import Plan
from .runs import Capture, Reached, Resume
from .shadow import Shadow
from .trace import Trace
from .trees import Step, mapped
from .untouched import seed

__all__ = ["Trials"]


class Trials:
    """The ways to run a model that a probe needs; none leaves random numbers in another state.

    Args:
        model: the model.
        forward: its own.
        shadow: of it.
        at: the name of the cut.
        call: its number.
    """

    def __init__(self, model: nn.Module, forward: Callable[..., Any], shadow: Shadow, at: str, call: int) -> None:
        self.model, self.forward, self.shadow, self.at, self.call = model, forward, shadow, at, call
        self.branches = Branches()
        """The ways that were taken."""
        self.fires = False
        """Whether hooks of modules that are skipped are called with stand-ins."""
        self._seeds = itertools.count(1)

    def full(self, arguments: Arguments) -> Any:
        """What the model gives."""
        with torch.inference_mode(False), torch.no_grad(), running(None), preserved_randomness():
            given = owned(arguments)
            return self.forward(self.model, *given.args, **given.kwargs)

    def captured(self, arguments: Arguments, trace: Trace | None = None) -> Captured:
        """What it gives up to the cut, each time with other random numbers."""
        run = Capture(self.call, trace=trace)
        self.branches.trace = trace
        with preserved_randomness():
            seed(next(self._seeds))  # what draws some shall give itself away
            return capture(run, self.shadow, self.forward, arguments, self.at, self.branches)

    def ghostly(self, found: Captured, arguments: Arguments) -> tuple[Step, ...]:
        """The places among the arguments of the cut that only modules before it can fill."""
        run = Resume(self.call, found.capture.templates, frozenset(), frozenset(), None, {})
        with contextlib.suppress(Reached):
            self._resumed(run, arguments)
        if run.error is not None:
            raise run.error
        return run.ghostly

    def resumed(
        self,
        plan: Plan,
        found: Captured,
        arguments: Arguments,
        values: Mapping[Step, torch.Tensor],
        extras: Mapping[Origin, torch.Tensor],
    ) -> Any:
        """What comes after the cut, with these values."""
        return self.finished(
            Resume(self.call, found.capture.templates, plan.live, frozenset(), values, extras), arguments
        )

    def finished(self, run: Resume, arguments: Arguments) -> Any:
        """What a resumed run gives.

        Raises:
            CutError: it did not reach the cut, or asked for what is not stored.
        """
        try:
            output = self._resumed(run, arguments)
        except Exception:
            if run.error is not None:
                raise run.error from None
            raise
        if run.error is not None:
            raise run.error
        if not run.reached:
            raise not_reached(self.at, self.call, 0)
        return output

    def _resumed(self, run: Resume, arguments: Arguments) -> Any:
        self.shadow.put_in_eval()
        run.branches, run.fires = self.branches, self.fires
        with torch.inference_mode(False), torch.no_grad(), running(run), preserved_randomness():
            run.watch()
            try:
                given = owned(arguments)
                output = self.forward(self.shadow.root, *given.args, **given.kwargs)
            finally:
                run.unwatch()
            return mapped(output, unwrapped, Ghost)
