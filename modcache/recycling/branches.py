"""Notice which ways a forward took, by values or by sizes, so that a way that was never looked at is looked at."""

from __future__ import annotations

import sys
import types
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch._C import (
    _get_function_stack_at,
    _len_torch_function_stack,
    _pop_torch_function_stack,
    _push_on_torch_function_stack,
)
from torch.overrides import TorchFunctionMode

from .asks import FACTS, answer_of, sizes_of_answer
from .ghosts import Ghost
from .trace import Mark, Trace

__all__ = ["Branches", "Way", "Ways"]

Way = tuple[object, ...]
"""Where Python asked a tensor for a value, and what the answer was; or where it called a function of torch at all."""

_WITH_ANSWER = 5

_TORCHS = str(Path(torch.__file__).parent)
_codes: dict[int, types.CodeType] = {}  # an id must not be used again


_MANY = 16
"""How often other answers at one place are looked at. After that they are data, and decide nothing."""


class Ways:
    """The ways to a cut that were looked at."""

    def __init__(self) -> None:
        self.places: set[Way] = set()
        """Those where all ways were looked at."""
        self._answers: dict[Way, set[object]] = {}
        self._looks: Counter[Way] = Counter()

    def knows(self, place: Way, answer: str) -> bool:
        """Whether this answer was looked at, or all at this place."""
        return place in self.places or answer in self._answers.get(place, ())

    @property
    def by_values(self) -> bool:
        """Whether any depends on values."""
        return bool(self._answers)

    def learn(self, ways: Iterable[Way]) -> None:
        """These were looked at, together."""
        answered = set()
        for way in ways:
            if len(way) == _WITH_ANSWER:
                self._answers.setdefault(way[:-1], set()).add(way[-1])
                answered.add(way[:-1])
            else:
                self.places.add(way)
        self._looks.update(answered)
        for place in answered:
            if self._looks[place] >= _MANY:
                self.places.add(place)
                del self._answers[place]


class Branches(TorchFunctionMode):
    """While it is entered, every value that Python asks for is noted, and every place where it calls torch.

    Args:
        known: answers that were looked at before, and places (without an answer) that do not matter.
        trace: tells what a value was made of.
    """

    def __init__(self, known: Ways | None = None, trace: Trace | None = None) -> None:
        self._known = Ways() if known is None else known
        self.trace = trace
        self.inside = False
        """Whether a module of the trunk runs. Sizes that tell values are data there, as those of an expert's rows."""
        self.new: set[Way] = set()
        self.marks: dict[Way, frozenset[Mark]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """One function of torch."""
        frame = sys._getframe(1)
        if (id(frame.f_code), frame.f_lasti) not in self._known.places:
            self._note_place(frame)
        if func in FACTS:  # which tell no values, and are most of what is asked
            if args and type(args[0]) is Ghost and args[0].value is None:
                with torch._C.DisableTorchFunctionSubclass():  # what it would say itself, at more expense
                    return func(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        answer = answer_of(name, result)
        if answer is None and not self.inside:
            answer = sizes_of_answer(name, args, kwargs or {}, result)
        if answer is not None:
            self._note(answer, (args, kwargs))
        return result

    def watch(self) -> None:
        """Be entered."""
        _push_on_torch_function_stack(self)

    def unwatch(self) -> bool:
        """Be left, and say so, unless the model's own code entered another mode since."""
        count = _len_torch_function_stack()
        if not count or _get_function_stack_at(count - 1) is not self:
            return False
        _pop_torch_function_stack()
        return True

    def irrelevant(self, inputs: Iterable[str]) -> set[Way]:
        """The places where values were asked for that none of these inputs went into."""
        names = set(inputs)
        return {
            place
            for place, marks in self.marks.items()
            if not any(mark.kind == "input" and mark.name in names for mark in marks)
        }

    def _note_place(self, frame: types.FrameType) -> None:
        frame = _outside_of_torch(frame)
        place = id(frame.f_code), frame.f_lasti
        if place not in self._known.places:
            _codes[place[0]] = frame.f_code
            self.new.add(place)

    def _note(self, answer: object, args: Any) -> None:
        frame = _outside_of_torch(sys._getframe(2))
        code = frame.f_code
        place = (code.co_filename, code.co_firstlineno, code.co_name, frame.f_lasti)
        if self.trace is not None:
            self.marks[place] = self.marks.get(place, frozenset()) | self.trace.all_marks(args)
        if not self._known.knows(place, said := str(answer)):
            self.new.add((*place, said))


def _outside_of_torch(frame: types.FrameType) -> types.FrameType:
    """The innermost of the frames that are no part of torch."""
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_TORCHS):
        frame = frame.f_back
    return frame
