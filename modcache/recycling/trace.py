"""Follow values through a forward: which parameters, buffers, inputs and modules a tensor was made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .asks import ESCAPES, shows_values
from .trees import located

__all__ = ["BY_PYTHON", "Mark", "Trace"]


class Mark(NamedTuple):
    """Something that values are made of: ``kind`` is "parameter", "buffer", "input" or "module".

    The number is that of the call of a module; of others it is ``BY_PYTHON`` where they only came in by what Python
    asked of them.
    """

    kind: str
    name: str
    number: int = 0


BY_PYTHON = -1

Marks = frozenset[Mark]
_NONE: Marks = frozenset()
_SHAPE_ONLY = frozenset(
    f"aten::{name}"
    for name in "zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full "
    "new_empty new_empty_strided sym_size sym_stride sym_numel".split()
)


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, every operation hands the marks of its inputs on to its outputs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._marks: dict[int, Marks] = {}
        self._held: dict[int, torch.Tensor] = {}  # an id must not be used again
        self._by_memory: dict[int, list[int]] = {}
        self._everything: Marks = _NONE  # what Python knows, and may put into anything
        self.written: list[Marks] = []
        """The marks of what was there before and was written in place."""
        self.dtypes: set[torch.dtype] = set()
        """Of all results: what was computed less precisely inside shows in the rest."""
        self._given: set[int] = set()
        self._functions = _Functions(self)

    def __enter__(self) -> Any:
        """Begin to follow."""
        entered = super().__enter__()  # type: ignore[no-untyped-call]
        self._functions.__enter__()  # type: ignore[no-untyped-call]
        return entered

    def __exit__(self, *exc: object) -> None:
        """End it."""
        self._functions.__exit__(*exc)  # type: ignore[no-untyped-call]
        super().__exit__(*exc)  # type: ignore[no-untyped-call]

    def mark(self, tensors: Iterable[torch.Tensor], mark: Mark, *, given: bool = False) -> None:
        """Put a mark on tensors; ``given`` ones were there before the forward, which must not write into them."""
        for tensor in tensors:
            self._put(tensor, self.marks_of(tensor) | {mark})
            if given:
                self._given.add(_memory(tensor))

    def marks_of(self, tensor: torch.Tensor) -> Marks:
        """What a tensor was made of."""
        known = self._marks.get(id(tensor))
        if known is not None:
            return known
        found = self._everything  # a view that nobody saw being made: it is what its memory is
        for other in self._by_memory.get(_memory(tensor), ()):
            found |= self._marks[other]
        return found

    def all_marks(self, value: Any) -> Marks:
        """What the tensors of a structure were made of."""
        return frozenset().union(*(self.marks_of(tensor) for _, tensor in located(value)))

    def escaped(self, value: Any) -> None:
        """Values got into Python, and from there they may get into anything."""
        self._everything |= _asked(self.all_marks(value))

    def _put(self, tensor: torch.Tensor, marks: Marks) -> None:
        if id(tensor) not in self._held:
            self._held[id(tensor)] = tensor
            self._by_memory.setdefault(_memory(tensor), []).append(id(tensor))
        self._marks[id(tensor)] = marks

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """One operation."""
        kwargs = kwargs or {}
        name = func._schema.name
        marks = _NONE if name in _SHAPE_ONLY else self.all_marks((args, kwargs)) | self._everything
        result = func(*args, **kwargs)
        if shows_values(func, args):
            self._everything |= _asked(marks)
        for tensor in _written(func._schema, args, kwargs):
            memory = _memory(tensor)
            if memory in self._given:
                self.written.append(self.marks_of(tensor))
            for other in self._by_memory.get(memory, ()):
                self._marks[other] |= marks
            self._put(tensor, self.marks_of(tensor) | marks)
        for _, tensor in located(result):
            self._put(tensor, self._marks.get(id(tensor), _NONE) | marks)
            self.dtypes.add(tensor.dtype)
        return result


class _Functions(TorchFunctionMode):
    """Sees what leaves torch without an operation."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", None)
        if name in ESCAPES or (name == "tensor_split" and isinstance(args[-1], torch.Tensor)):
            self._trace.escaped((args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _asked(marks: Marks) -> Marks:
    return frozenset(mark if mark.kind == "module" else mark._replace(number=BY_PYTHON) for mark in marks)


def _memory(tensor: torch.Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except Exception:  # a wrapper or a sparse tensor has none
        return id(tensor)


def _written(schema: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterable[torch.Tensor]:
    if not schema.is_mutable:
        return
    for number, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            yield from (tensor for _, tensor in located(value))
