"""Say what a tensor without values stands for: its shape, and what it would have been made by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from ..errors import CutError
from .asks import Around, name_of
from .trees import Step, located

if TYPE_CHECKING:
    from .ghosts import Ghost

__all__ = ["Derived", "Origin", "Sheet", "Spec", "spec_of"]


class Spec(NamedTuple):
    """What is known of a tensor that nobody computed."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def spec_of(tensor: torch.Tensor) -> Spec:
    """Shape, strides, dtype and device of a tensor."""
    return Spec(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


class Origin(NamedTuple):
    """A ghost that stands for an output of a module: its name, the number of the call, the place in the output."""

    path: str
    number: int
    place: Step

    def __str__(self) -> str:
        again = f" (call {self.number})" if self.number else ""
        return f"the output of {self.path}{again}"


class Derived(NamedTuple):
    """A ghost that the model's own code made of others.

    Args:
        func: a function of torch.
        args: what it was given.
        kwargs: what it was given by name.
        place: of the ghost in what it gives.
        versions: of the tensors among the arguments that have values already.
        written: how often ghosts among them were written in place before; not those whose memory it shares.
        around: grad mode and autocast, as the model's own code had them.
        chance: the state of the random numbers, if it draws some.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    place: Step
    versions: tuple[tuple[torch.Tensor, int], ...]
    written: tuple[tuple[Ghost, int], ...]
    around: Around
    chance: torch.Tensor | None

    def __str__(self) -> str:
        found = (tensor for _, tensor in located((self.args, dict(self.kwargs))))
        names = sorted({str(tensor.source) for tensor in found if hasattr(tensor, "source")})
        return f"what {name_of(self.func)}(...) gives of {' and '.join(names)}"


class Sheet(Protocol):
    """What ghosts ask of the call that they belong to."""

    reached: bool
    """Whether the cut was reached, so that ghosts must have values."""
    touched: set[int]
    """Memory (of the meta device) that was written in place."""
    derived: bool
    """Whether any ghost was made of others."""

    error: CutError | None
    """The first error."""

    def value_of(self, origin: Origin, ghost: Ghost) -> torch.Tensor:
        """The stored value of a module's output, if it is one of those that are stored."""

    def failed(self, error: CutError) -> CutError:
        """Remember an error, which the model's own code might swallow."""
