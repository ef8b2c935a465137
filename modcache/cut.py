"""What is known of the cut of a recycled model, as plain facts that print readably."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Crossing", "Cut"]


@dataclass(frozen=True, slots=True)
class Crossing:
    """A tensor that is stored because it crosses the cut.

    Args:
        source: where it comes from.
        shape: of one row of the batch that was probed.
        dtype: of its values.
        row_bytes: the bytes of one such row; 0 if all rows share it.
    """

    source: str
    shape: tuple[int, ...]
    dtype: str
    row_bytes: int

    def __str__(self) -> str:
        """One line."""
        size = f"{self.row_bytes:,} bytes a row" if self.row_bytes else "shared by all rows"
        return f"{self.source}: {self.dtype}{list(self.shape)}, {size}"


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a recycled model is cut, and what follows from that.

    Args:
        at: the name of the submodule at whose input the model is cut.
        call: the number of its call in a forward.
        probed: whether a first batch has shown what follows; until then the rest is empty.
        frozen: parameters that feed the cut.
        tied: those of them that have another name, or are used, outside of the trunk.
        bystanders: modules that are called before the cut and do not feed it: they run and train as before.
        stored: the tensors of a record.
        inputs: the inputs of the model that are part of a row's key.
    """

    at: str
    call: int = 0
    probed: bool = False
    frozen: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    bystanders: tuple[str, ...] = ()
    stored: tuple[Crossing, ...] = ()
    inputs: tuple[str, ...] = ()

    @property
    def row_bytes(self) -> int:
        """The bytes of one record of the batch that was probed."""
        return sum(crossing.row_bytes for crossing in self.stored)

    def __str__(self) -> str:
        """A few lines to read."""
        where = f"cut at {self.at}" + (f", call {self.call}" if self.call else "")
        if not self.probed:
            return f"{where}; not probed yet: call the model with a batch of two rows or more, or give recycle batch="
        lines = [
            where,
            f"frozen: {len(self.frozen)} parameters ({_short(self.frozen)})",
            f"tied: {_short(self.tied)}",
            f"bystanders: {_short(self.bystanders)}",
            f"in the key: {_short(self.inputs)}",
            f"stored: {self.row_bytes:,} bytes a row",
            *(f"  {crossing}" for crossing in self.stored),
        ]
        return "\n".join(lines)


def _short(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (f", ... {names[-1]}" if len(names) > 4 else "") if names else "none"
