"""Find values that modules before the cut put into their own attributes, where they would be stale when resumed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Any

from torch import nn

from ..errors import CutError
from .runs import Capture
from .trace import Trace
from .trees import located

__all__ = ["Stashes", "buffers_of"]

_INNER = frozenset(vars(nn.Module()))
_NUMBERS = (bool, int, float, str, tuple)


class Stashes:
    """What the attributes of a model's modules hold before and after runs."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tensors = {(name, key): _ids(value) for name, key, value in self._attributes()}
        self._buffers = {id(b): b._version for b in model.buffers() if not b.is_inference()}
        self._held = list(model.buffers())  # an id must not be used again
        self._numbers: list[dict[tuple[str, str], Any]] = []
        self.note()

    def _attributes(self) -> Iterator[tuple[str, str, Any]]:
        for name, module in self._model.named_modules():
            for key, value in vars(module).items():
                if key not in _INNER and key != "_modcache":
                    yield name, key, value

    def note(self) -> None:
        """Remember the plain values that attributes have now."""
        self._numbers.append({(n, key): value for n, key, value in self._attributes() if isinstance(value, _NUMBERS)})

    def refuse_tensors(self, trace: Trace, run: Capture) -> None:
        """After a run: refuse tensors of its batch in attributes, and buffers that it wrote or replaced.

        Raises:
            CutError: naming the module and the attribute.
        """
        self.note()
        called = {path for path, _ in run.templates}
        for name, key, value in self._attributes():
            if not _inside(name, called) or _ids(value) == self._tensors.get((name, key), []):
                continue
            if any(mark.kind == "input" for mark in trace.all_marks([leaf for _, leaf in located(value)])):
                raise CutError(
                    f"{name}, which comes before the cut, puts tensors into its attribute {key}; on a resumed call it "
                    "does not run, and they would be those of another batch. Cut at an earlier submodule, or return "
                    "them."
                )
        for name, module in self._model.named_modules():
            for key, buffer in buffers_of(module).items():
                if not _inside(name, called) or buffer is None or buffer.is_inference():
                    continue
                if self._buffers.get(id(buffer)) != buffer._version:
                    raise CutError(
                        f"{name}, which comes before the cut, writes into its buffer {key}; on a resumed call it does "
                        "not run. Cut at an earlier submodule, or take that write out."
                    )

    def refuse_numbers(self, feeding: AbstractSet[str]) -> None:
        """After some runs: refuse plain values that depend on the batch. Counters of calls are let pass.

        Raises:
            CutError: naming the module and the attribute.
        """
        for name, key in {place for numbers in self._numbers for place in numbers}:
            if not _inside(name, feeding):
                continue
            values = [numbers.get((name, key)) for numbers in self._numbers]
            if all(value is values[0] or value == values[0] for value in values) or _is_count(values):
                continue
            raise CutError(
                f"{name}, which comes before the cut, keeps a value of the batch in its attribute {key}; on a resumed "
                "call it does not run. Cut at an earlier submodule, or return it."
            )


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """The buffers of a module by name; TorchScript keeps its own elsewhere."""
    found: dict[str, Any] = vars(module).get("_buffers") or {}
    return found


def _ids(value: Any) -> list[int]:
    return [id(leaf) for _, leaf in located(value)]


def _inside(name: str, paths: AbstractSet[str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def _is_count(values: list[Any]) -> bool:
    """Whether a number grows by the same with each run."""
    if not all(type(value) is int for value in values):
        return False
    return len({after - before for before, after in itertools.pairwise(values)}) == 1
