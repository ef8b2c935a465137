"""The two ways to run a shadow: up to the cut for the rows that are missing, and from the cut on for all rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import CutError
from .branches import Branches
from .gates import Place
from .ghosts import Ghost, filled
from .origins import Origin, Spec, spec_of
from .shadow import eval_twin
from .trace import Mark, Trace
from .trees import ATOMS, Step, hidden_tensors, located, mapped

__all__ = ["Called", "Capture", "Reached", "Resume", "Template", "template_of"]

Called = tuple[str, int]
"""The name of a module, and the number of a call of it within one forward."""


class Reached(BaseException):
    """The cut is reached, and nothing after it is needed."""


class Template(NamedTuple):
    """What a module returned, with shapes in the places of tensors.

    Args:
        value: the structure.
        origins: of each tensor in it.
    """

    value: Any
    origins: tuple[Origin, ...]

    def ghosts(self, sheet: Resume) -> Any:
        """The same structure with ghosts in it."""
        origins = iter(self.origins)
        return mapped(self.value, lambda spec: Ghost(sheet, spec, next(origins)), Spec)


def template_of(output: Any, called: Called) -> Template:
    """The shapes of what a module returned."""
    return Template(mapped(output, spec_of), tuple(Origin(*called, step) for step, _ in located(output)))


class Capture:
    """A forward of the modules before the cut, which ends there; in eval mode.

    Args:
        call: the number of the call of the cut at which it ends.
        keep: whose outputs are wanted beside the arguments of the cut; ``None`` keeps all.
        trace: follows values, if that is wanted.
    """

    passing = False

    def __init__(self, call: int, keep: AbstractSet[Called] | None = None, trace: Trace | None = None) -> None:
        self.call = call
        self._keep = keep
        self._trace = trace
        self._counts: Counter[str] = Counter()
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.outputs: dict[Called, Any] = {}
        self.templates: dict[Called, Template] = {}
        self.bare: set[Called] = set()
        self.cut_calls = 0
        self.branches: Branches | None = None

    def called(self, place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module behind a gate, unless it is the cut."""
        number = self._counts[place.path]
        self._counts[place.path] += 1
        if place.cut:
            self.cut_calls += 1
            if number == self.call:
                self.arguments = args, kwargs
                raise Reached
        before = self._hidden(args, kwargs)
        output = self._inside(eval_twin(place.module), args, kwargs)
        called = place.path, number
        if self._trace is not None:
            self._look_at(place, output, before, self._hidden(args, kwargs))
            self._trace.mark((tensor for _, tensor in located(output)), Mark("module", *called))
        if place.bare:
            self.bare.add(called)
            return output
        if self._keep is None or called in self._keep:
            self.outputs[called] = output
        self.templates[called] = template_of(output, called)
        return output

    def _inside(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.branches is None:
            return module(*args, **kwargs)
        self.branches.inside = True
        try:
            return module(*args, **kwargs)
        finally:
            self.branches.inside = False

    def _hidden(self, args: Any, kwargs: Any) -> list[torch.Tensor]:
        return [] if self._trace is None else [*hidden_tensors((args, kwargs)), *_listed((args, kwargs))]

    def _look_at(self, place: Place, output: Any, before: list[torch.Tensor], after: list[torch.Tensor]) -> None:
        if len(before) != len(after) or any(one is not other for one, other in zip(before, after, strict=True)):
            raise CutError(
                f"{place.path}, which comes before the cut, puts tensors into an object that it is given (a key-value "
                "cache, a list); on a resumed call it does not run. Switch that off (use_cache=False), or cut at an "
                "earlier submodule."
            )
        for tensor in (tensor for _, tensor in located(output)):
            if tensor.is_nested or tensor.layout is not torch.strided:
                raise CutError(
                    f"{place.path}, which comes before the cut, returns a nested, packed or sparse tensor, of which "
                    "nobody can tell the rows. Cut at an earlier submodule, or give it padded tensors."
                )
            if set_on := sorted(getattr(tensor, "__dict__", {})):
                raise CutError(
                    f"{place.path}, which comes before the cut, sets {set_on[0]} on a tensor that it returns, which is "
                    "not stored. Cut at an earlier submodule, or return it."
                )
        if next(located(output, np.ndarray), None) is not None:
            raise CutError(
                f"{place.path}, which comes before the cut, returns a numpy array, which has no rows to store. Cut at "
                "an earlier submodule, or return a tensor."
            )
        if next(hidden_tensors(output), None) is not None:
            raise CutError(
                f"{place.path}, which comes before the cut, returns an object with tensors inside (a "
                f"{_opaque_name(output)}), which cannot be stored. Switch that off (use_cache=False), or cut at an "
                "earlier submodule."
            )


def _ghosts_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Step, Ghost]:
    """The ghosts among the arguments of a module: in its positional (0) or named (1) ones."""
    found: dict[Step, Ghost] = {}
    given: tuple[Iterable[tuple[int | str, Any]], ...] = enumerate(args), kwargs.items()
    for group, values in enumerate(given):
        for step, value in values:
            if type(value) is Ghost:
                found[group, step] = value
            elif type(value) not in ATOMS:
                found.update(located(value, Ghost, (group, step)))
    return found


def _listed(value: Any) -> list[torch.Tensor]:
    """The tensors in lists and mappings, which a module may change."""
    return [tensor for _, tensor in located(value)]


def _opaque_name(value: Any) -> str:
    names = sorted({type(part).__name__ for _, part in located(value, object)})
    return ", ".join(names)


class Resume:
    """A forward of the user's own model code in which nothing before the cut is computed.

    Args:
        call: the number of the call of the cut at which the stored values come in.
        templates: what the modules before the cut return, but for values.
        live: modules that come before the cut and do not feed it: they run.
        twins: modules that are used before and after the cut.
        values: the stored tensors among the arguments of the cut, by place; ``None`` ends there.
        extras: stored outputs of modules.
        known: outputs that may be taken, because it is to be found out which are needed.
    """

    passing = False
    reached = False
    derived = False
    fires = False
    error: CutError | None = None
    branches: Branches | None = None
    ghostly: tuple[Step, ...] = ()
    _watching = False

    def __init__(
        self,
        call: int,
        templates: Mapping[Called, Template],
        live: AbstractSet[Called],
        twins: AbstractSet[str],
        values: Mapping[Step, torch.Tensor] | None,
        extras: Mapping[Origin, torch.Tensor],
        known: Mapping[Called, Any] | None = None,
    ) -> None:
        self._call = call
        self._templates = templates
        self._live = live
        self._twins = twins
        self._values = values
        self._extras = extras
        self._known = known
        self._counts: dict[str, int] = {}
        self.touched: set[int] = set()
        self.needed: dict[Origin, None] = {}
        self.after: set[str] = set()

    def called(self, place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module behind a gate, or hand out ghosts in its stead."""
        path = place.path
        if self.reached:
            self.after.add(path)
            args, kwargs = filled(args, kwargs)
            return place.module(*args, **kwargs)
        number = self._counts.get(path, 0)
        self._counts[path] = number + 1
        called = path, number
        if place.cut and number == self._call:
            self._bind(path, args, kwargs)
            args, kwargs = filled(args, kwargs)
            return place.module(*args, **kwargs)
        template = self._templates.get(called)
        if template is not None and called not in self._live:
            alone = type(template.value) is Spec  # what most modules return
            ghosts = Ghost(self, template.value, template.origins[0]) if alone else template.ghosts(self)
            return self._hooked(place.module, args, kwargs, ghosts) if self.fires else ghosts
        if place.bare:
            module = eval_twin(place.module) if path in self._twins else place.module
            return module(*args, **kwargs)
        if called in self._live:
            args, kwargs = filled(args, kwargs)
            return place.module(*args, **kwargs)
        raise self.failed(
            CutError(
                f"{path} is called before the cut (call {number}), but was not when this kind of call was probed: the "
                "way to the cut depends on values, on chance (layer drop) or on training mode. Cut at an earlier "
                "submodule, or make the way the same."
            )
        )

    def _hooked(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """What the hooks of a module make of an output that is not computed."""
        for number, hook in module._forward_hooks.items():
            with_kwargs = number in module._forward_hooks_with_kwargs
            given = (module, args, kwargs, output) if with_kwargs else (module, args, output)
            result = hook(*given)
            output = output if result is None else result
        return output

    def _bind(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ghosts = _ghosts_in(args, kwargs)
        self.ghostly = tuple(ghosts)
        if self._values is None:
            raise Reached
        self.unwatch()
        if ghosts.keys() != self._values.keys():
            raise self.failed(
                CutError(f"{path} is given other tensors from before the cut than when this kind of call was probed.")
            )
        for step, ghost in ghosts.items():
            ghost.bind(self._values[step].requires_grad_() if ghost.wants_grad else self._values[step])
        self.reached = True
        self.passing = self._known is None

    def watch(self) -> None:
        """Note from here up to the cut which way is taken."""
        if self.branches is not None:
            self._watching = True
            self.branches.watch()

    def unwatch(self) -> None:
        """Note no more, if the cut was not reached."""
        if self._watching and self.branches is not None:
            self._watching = not self.branches.unwatch()

    def value_of(self, origin: Origin, ghost: Ghost) -> torch.Tensor:
        """The stored value of a module's output."""
        value = self._extras.get(origin)
        if value is not None:
            return value
        if self._known is not None and (origin.path, origin.number) in self._known:
            self.needed[origin] = None
            found: torch.Tensor = dict(located(self._known[origin.path, origin.number]))[origin.place]
            return found
        with torch._C.DisableTorchFunctionSubclass():
            shape, dtype = tuple(ghost.shape), ghost.dtype
        raise self.failed(
            CutError(
                f"{origin}, of shape {shape} and {dtype}, is made before the cut and used after it, but it is no "
                "argument of the cut, so it is not stored. Cut at a later submodule, or give extra=True, which stores "
                "it too."
            )
        )

    def failed(self, error: CutError) -> CutError:
        """Remember the first error: the model's own code may swallow it."""
        if self.error is None:
            self.error = error
        return error
