"""Notice which ways a forward took, by values or by sizes, so that a way that was never looked at is looked at."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .asks import answer_of
from .trace import Mark, Trace

__all__ = ["Branch", "Branches"]

Branch = tuple[object, ...]
"""Where Python asked a tensor for a value, and what the answer was; or where it called a function of torch at all."""

_TORCHS = str(Path(torch.__file__).parent)
_codes: dict[int, types.CodeType] = {}  # an id must not be used again


class Branches(TorchFunctionMode):
    """While it is entered, every value that Python asks for is noted, and every place where it calls torch.

    Args:
        known: answers that were looked at before, and places (without an answer) that do not matter.
        trace: tells what a value was made of.
    """

    def __init__(self, known: set[Branch] | frozenset[Branch] = frozenset(), trace: Trace | None = None) -> None:
        super().__init__()
        self._known = known
        self.trace = trace
        self.new: set[Branch] = set()
        self.marks: dict[Branch, frozenset[Mark]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """One function of torch."""
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_TORCHS):
            frame = frame.f_back
        place = id(frame.f_code), frame.f_lasti
        if place not in self._known:
            _codes[place[0]] = frame.f_code
            self.new.add(place)
        result = func(*args, **(kwargs or {}))
        answer = answer_of(getattr(func, "__name__", ""), args, kwargs or {}, result)
        if answer is not None:
            self._note(answer, (args, kwargs))
        return result

    def irrelevant(self, inputs: Iterable[str]) -> set[Branch]:
        """The places where values were asked for that none of these inputs went into."""
        names = set(inputs)
        return {
            place
            for place, marks in self.marks.items()
            if not any(mark.kind == "input" and mark.name in names for mark in marks)
        }

    def _note(self, answer: object, args: Any) -> None:
        frame = sys._getframe(2)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_TORCHS):
            frame = frame.f_back
        code = frame.f_code
        place = (code.co_filename, code.co_firstlineno, code.co_name, frame.f_lasti)
        if self.trace is not None:
            self.marks[place] = self.marks.get(place, frozenset()) | self.trace.all_marks(args)
        if place not in self._known and (*place, answer) not in self._known:
            self.new.add((*place, answer))
