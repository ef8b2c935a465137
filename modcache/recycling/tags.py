"""Attributes that a forward sets on the tensors that it is given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["Tags"]


class Tags:
    """What attributes some tensors have; those that are set meanwhile are found, and taken away again.

    Args:
        tensors: the inputs of a call.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._before: list[tuple[dict[str, Any], dict[str, Any]]] = [(vars(one), dict(vars(one))) for one in tensors]

    @property
    def there(self) -> bool:
        """Whether there were any."""
        return any(before for _, before in self._before)

    def put_back(self) -> None:
        """Have those that there were."""
        for now, before in self._before:
            now.clear()
            now.update(before)

    def take_away(self) -> None:
        """Have none."""
        for now, _ in self._before:
            now.clear()

    def others(self) -> list[str]:
        """The names of those that are others now than there were."""
        return sorted(
            {name for now, was in self._before for name in now if name not in was or now[name] is not was[name]}
        )

    def now(self) -> list[str]:
        """The names of all that there are now."""
        return sorted({name for now, _ in self._before for name in now})
