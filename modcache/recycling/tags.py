"""Attributes that a forward sets on the tensors that it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..errors import CutError

__all__ = ["Tags"]


class Tags:
    """What attributes some tensors have; those that are set meanwhile are found, and taken away again.

    Args:
        tensors: the inputs of a call.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._before: list[tuple[dict[str, Any], dict[str, Any]]] = [(vars(one), dict(vars(one))) for one in tensors]

    def put_back(self) -> None:
        """Have those that there were."""
        for now, before in self._before:
            now.clear()
            now.update(before)

    def refuse(self, at: str, again: Callable[[], object]) -> None:
        """After a run up to the cut: it must not have set any.

        Args:
            at: the name of the cut.
            again: runs the model up to the cut.

        Raises:
            CutError: it did.
        """
        found = sorted({name for now, was in self._before for name in now if now[name] is not was.get(name, self)})
        if not found and any(was for _, was in self._before):  # an earlier call may have set the same
            for now, _ in self._before:
                now.clear()
            try:
                again()
                found = sorted({name for now, _ in self._before for name in now})
            except Exception:  # they are read before the cut, so they are the user's own
                found = []
        self.put_back()
        if found:
            raise CutError(
                f"{at}: before the cut, the forward sets {found[0]} on a tensor that it is given, which a resumed "
                "call would not do. Cut at an earlier submodule, or return it."
            )
