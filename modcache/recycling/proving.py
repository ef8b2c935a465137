"""Look at ways to a cut that were never looked at: do rows come out as they are stored, and the same among others?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import CutError
from ..keys.tokens import find_tokens
from .alike import rows_agree
from .branches import Branches
from .captures import captured_rows
from .kinds import Asked, with_values
from .plan import Plan, Stored
from .sampling import places_of
from .shadow import Shadow

__all__ = ["Proof", "Sample", "sample_of"]

Rows = tuple[torch.Tensor, ...]


class Sample(NamedTuple):
    """A row of an earlier batch, which took a way of its own, and what is stored of it.

    Args:
        values: its inputs, by path, one row each.
        shared: the inputs that all rows of its batch shared.
        rows: the tensors of its record.
    """

    values: Mapping[str, Any]
    shared: tuple[tuple[str, object], ...]
    rows: Rows

    def goes_with(self, asked: Asked) -> bool:
        """Whether it may be put among the rows of a call."""
        columns, shared = asked.batch.columns, asked.batch.shared
        if any(column.single for column in columns) or [column.path for column in columns] != list(self.values):
            return False
        if [path for path, _ in shared] != [path for path, _ in self.shared]:
            return False
        return all(
            mine is yours or (isinstance(mine, bool | int | float | str) and mine == yours)
            for (_, mine), (_, yours) in zip(shared, self.shared, strict=True)
        )


def sample_of(asked: Asked, stored: Rows) -> Sample | None:
    """The first row of a call, if it can be put among the rows of another."""
    columns = asked.batch.columns
    if any(column.single for column in columns):
        return None
    values = {column.path: _own(column.value[:1]) for column in columns}
    return Sample(values, asked.batch.shared, tuple(rows[:1].detach().clone() for rows in stored))


class Proof:
    """A call whose batch took a way that was never looked at.

    Args:
        plan: how calls of its kind are parted.
        shadow: of the model.
        forward: the model's own.
        asked: the call.
        tokens: whether token rows are stored without their padding.
        ways: notes which way the model takes.
    """

    def __init__(
        self, plan: Plan, shadow: Shadow, forward: Callable[..., Any], asked: Asked, ways: Branches, *, tokens: bool
    ) -> None:
        self._plan, self._shadow, self._forward, self._asked, self._ways = plan, shadow, forward, asked, ways
        self._tokens = tokens

    def refuse_other(self, stored: Rows) -> None:
        """Is what is stored of the rows of this batch what it gives for them?

        Raises:
            CutError: it is not.
        """
        again = self._captured(self._asked, slice(None))
        kept = self._differs(stored, again, self._lengths(self._asked))
        if kept is not None:
            raise CutError(
                f"{self._plan.at}: on the way to the cut the model decides by values, by sizes or by what earlier "
                f"calls left behind, and {kept} comes out otherwise than it was stored. Cut at an earlier submodule, "
                "or make the way the same."
            )

    def refuse_coupled(
        self, samples: Sequence[Sample], given: Mapping[str, Any] | None = None, computed: Rows | None = None
    ) -> None:
        """Do rows come out the same among all rows of the batch and of earlier ones, and among some of them?

        Args:
            samples: rows of earlier batches that go with these.
            given: the inputs of those rows of the batch that were computed.
            computed: what they gave, which is to be stored.

        Raises:
            CutError: they do not.
        """
        asked, count = self._asked, self._asked.batch.size
        mixed = _joined(asked, samples) if samples else asked
        whole, lengths = self._captured(mixed, slice(None)), self._lengths(mixed)
        for place, sample in enumerate(samples, count):
            self._compare(_taken(whole, [place]), sample.rows, _some(lengths, [place]))
        if given is not None and computed is not None:
            places = places_of(asked, given)
            held = [number for number, place in enumerate(places) if place >= 0]
            places = [places[number] for number in held]
            self._compare(_taken(whole, places), _taken(computed, held), _some(lengths, places))
        parts = [slice(0, count, 2), slice(1, count, 2)] if count > 1 else []
        parts += [slice(0, 2)] if count > 4 else []
        parts += [slice(None)] if samples else []
        for part in parts:
            own = range(count)[part]
            self._compare(_taken(whole, own), self._captured(asked, part), _some(lengths, own))

    def _captured(self, asked: Asked, part: slice) -> Rows:
        return captured_rows(self._plan, self._shadow, self._forward, asked, part, self._ways)

    def _compare(self, rows: Rows, others: Rows, lengths: np.ndarray | None) -> None:
        kept = self._differs(rows, others, lengths)
        if kept is not None:
            raise CutError(
                f"{self._plan.at}: on the way to the cut the model decides by values or sizes of the whole batch, and "
                f"{kept} comes out otherwise for a row among other rows. Cut at an earlier submodule, or make "
                "the way the same."
            )

    def _differs(self, rows: Rows, others: Rows, lengths: np.ndarray | None) -> Stored | None:
        """The first of the stored tensors in which rows differ, beside their padding if they have a length."""
        for kept, one, other in zip(self._plan.per_row, rows, others, strict=True):
            if lengths is not None:
                one, other = _unpadded(one, other, lengths)
            if one.shape != other.shape or not rows_agree(one, other, self._plan.floor):
                return kept
        return None

    def _lengths(self, asked: Asked) -> np.ndarray | None:
        found = find_tokens(asked.batch) if self._tokens else None
        return None if found is None else found.lengths


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _taken(rows: Rows, places: Sequence[int]) -> Rows:
    return tuple(tensor[list(places)] for tensor in rows)


def _some(lengths: np.ndarray | None, places: Sequence[int]) -> np.ndarray | None:
    return None if lengths is None else lengths[list(places)]


def _unpadded(one: torch.Tensor, other: torch.Tensor, lengths: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens without what lies beyond their lengths; they may be padded to different widths."""
    if one.dim() < 2 or one.dim() != other.dim() or not len(one) == len(other) == len(lengths):
        return one, other
    width = min(one.shape[1], other.shape[1])
    if not len(lengths) or width < lengths.max():
        return one, other
    kept = torch.arange(width, device="cpu") < torch.from_numpy(lengths)[:, None]
    kept = kept.to(one.device).reshape(*kept.shape, *(1,) * (one.dim() - 2))
    first, second = one[:, :width], other[:, :width]
    return torch.where(kept, first, torch.zeros_like(first)), torch.where(kept, second, torch.zeros_like(second))


def _joined(asked: Asked, samples: Sequence[Sample]) -> Asked:
    """The call with some more rows."""
    columns = tuple(
        column._replace(value=_longer(column.value, [sample.values[column.path] for sample in samples]))
        for column in asked.batch.columns
    )
    arguments = with_values(asked.arguments, {column.path: column.value for column in columns})
    return asked._replace(
        arguments=arguments, batch=asked.batch._replace(size=asked.batch.size + len(samples), columns=columns)
    )


def _longer(value: Any, rows: Sequence[Any]) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.cat([value, *(row.to(value.device) for row in rows)])
    if isinstance(value, np.ndarray):
        return np.concatenate([value, *rows])
    return type(value)([*value, *(item for row in rows for item in row)])
