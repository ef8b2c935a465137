"""Notice which ways a forward took because of values, so that a way that was never looked at is looked at."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["Branch", "Branches"]

Branch = tuple[object, ...]
"""Where Python asked a tensor for a value, and what the answer was."""

_ASKS = frozenset(
    ["__bool__", "__int__", "__float__", "__index__", "item", "tolist", "is_nonzero", "equal", "allclose"]
)
_CARRIES_AWAY = frozenset(["numpy", "__array__", "__dlpack__"])
_TORCHS = str(Path(torch.__file__).parent)
_numbers = itertools.count()


class Branches(TorchFunctionMode):
    """While it is entered, every value that Python asks for is noted.

    Args:
        known: answers that were looked at before.
    """

    def __init__(self, known: set[Branch] | frozenset[Branch] = frozenset()) -> None:
        super().__init__()
        self._known = known
        self.new: set[Branch] = set()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """One function of torch."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", None)
        if name in _ASKS:
            self._note(str(result))
        elif name in _CARRIES_AWAY:
            self._note(next(_numbers))  # what happens to it there, nobody sees: every time is a new one
        return result

    def _note(self, answer: object) -> None:
        frame = sys._getframe(2)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_TORCHS):
            frame = frame.f_back
        code = frame.f_code
        branch = (code.co_filename, code.co_firstlineno, code.co_name, frame.f_lasti, answer)
        if branch not in self._known:
            self.new.add(branch)
