"""Prove that what comes after a cut does not look at masked positions, where token rows hold zeros."""

from __future__ import annotations

import torch

from ..arguments import Arguments
from ..errors import CutError
from ..keys.tokens import find_tokens
from .alike import difference
from .axes import from_rows, to_rows
from .captures import value_in
from .kinds import Asked, with_values
from .origins import Origin
from .plan import Plan
from .sampling import value_at
from .trees import mapped
from .trials import Trials

__all__ = ["refuse_padding"]


def refuse_padding(trials: Trials, plan: Plan, asked: Asked, batch: Arguments, count: int) -> None:
    """Is the result the same when the trunk gives zeros at masked positions?

    Raises:
        CutError: it is not.
    """
    columns = tuple(column._replace(value=value_at(batch, column.path)) for column in asked.batch.columns)
    tokens = find_tokens(asked.batch._replace(size=count, columns=columns))
    if tokens is None:
        return
    kept = torch.arange(tokens.width, device="cpu") < torch.from_numpy(tokens.lengths)[:, None]
    if bool(kept.all()) and tokens.width > 1:
        kept[0, -1] = False  # no row is padded, so one is made shorter
    values = {column.path: column.value for column in columns}
    mask = values[tokens.mask]
    values[tokens.mask] = torch.where(kept.to(mask.device), mask, torch.zeros_like(mask))
    arguments = with_values(batch, values)
    output, found = trials.full(arguments), trials.captured(arguments)
    tensors = {}
    for stored in plan.stored:
        value = value_in(found, stored.source).detach().clone()
        if stored.axis is not None:
            rows = to_rows(value, stored.axis)
            if rows.dim() > 1 and rows.shape[1] == tokens.width:
                rows = torch.where(_beside(kept, rows), rows, torch.zeros_like(rows))
            value = from_rows(rows, stored.axis)
        tensors[stored.source] = value
    crossing = {source: value for source, value in tensors.items() if not isinstance(source, Origin)}
    extras = {source: value for source, value in tensors.items() if isinstance(source, Origin)}
    again = trials.resumed(plan, found, arguments, crossing, extras)

    def seen(leaf: torch.Tensor) -> torch.Tensor:
        per_token = leaf.dim() > 1 and leaf.shape[:2] == kept.shape
        return torch.where(_beside(kept, leaf), leaf, torch.zeros_like(leaf)) if per_token else leaf

    if (differs := difference(mapped(output, seen), mapped(again, seen), plan.floor)) is not None:
        raise CutError(
            f'{plan.at}: with key="tokens" the trunk gives zeros at masked positions, and what comes after the cut '
            f"looks at them ({differs}). Leave key= out, or cut at a later submodule."
        )


def _beside(kept: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Which positions are kept, in a shape that goes with rows of tokens."""
    return kept.to(rows.device).reshape(*kept.shape, *(1,) * (rows.dim() - 2))
