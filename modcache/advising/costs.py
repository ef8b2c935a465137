"""What a cut would cost and gain, worked out of what was measured of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["NOISE", "AdvisedCut", "Costs", "Size", "advised_cut", "break_even"]


NOISE = 1.05
"""A ratio below it may be the machine's mood."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is trained on.

    Args:
        batch: rows of a step.
        rows: rows of the data set, if that is known.
        epochs: how often they are gone through, if that is known.
        room: bytes of rows that memory has room for.
    """

    batch: int
    rows: int | None = None
    epochs: int | None = None
    room: int | None = None

    @property
    def steps(self) -> int | None:
        """Steps of an epoch."""
        return None if self.rows is None else math.ceil(self.rows / self.batch)


@dataclass(frozen=True, slots=True)
class Costs:
    """What was measured of one cut.

    Args:
        trunk: seconds of the trunk in a step.
        forward: seconds of the head's forward.
        backward: seconds of the head's backward.
        fixed: seconds of a resumed call that neither the rows nor the head take.
        reading: seconds to gather the rows of a step out of memory.
        parameters: share of the parameters that feed the cut.
        row_bytes: what is stored of a row.
        disk_reading: bytes per second, if rows lie on a disk.
        disk_writing: bytes per second, if rows lie on a disk.
    """

    trunk: float
    forward: float
    backward: float
    fixed: float
    reading: float
    parameters: float
    row_bytes: int
    disk_reading: float | None = None
    disk_writing: float | None = None


@dataclass(frozen=True, slots=True)
class AdvisedCut:
    """A submodule at which the model could be cut, and what would follow.

    Args:
        at: its name, for ``recycle(model, at=...)``.
        call: the number of its call.
        extra: whether it takes ``extra=True``, because values go around the cut.
        parameters: share of the parameters that would be frozen, 0 to 1.
        time: share of a step that would be skipped, 0 to 1.
        row_bytes: what would be stored of a row.
        data_bytes: what would be stored of the whole data set.
        trunk_seconds: what the trunk takes for one batch, once per row.
        head_seconds: forward and backward of what is left.
        reading_seconds: reading the rows of a batch.
        fixed_seconds: what a resumed call takes besides.
        seconds: a step, all in all.
        ratio: a step as it is ÷ such a step.
        disk_ratio: the same if each row came from the disk; ``None`` without a directory.
        filling_seconds: a step of the first epoch.
        break_even: in which epoch the time is made good that filling takes; ``None`` if in none of those asked about,
            and where the ratio is below 1.05, which may be noise.
        total_seconds: all epochs, the filling one included.
        frozen: names of parameters that the head uses, too, and that would be frozen with the trunk (tied ones).
    """

    at: str
    call: int
    extra: bool
    parameters: float
    time: float
    row_bytes: int
    data_bytes: int | None
    trunk_seconds: float
    head_seconds: float
    reading_seconds: float
    fixed_seconds: float
    seconds: float
    ratio: float
    disk_ratio: float | None
    filling_seconds: float
    break_even: int | None
    total_seconds: float | None
    frozen: tuple[str, ...] = ()

    @property
    def pays(self) -> bool:
        """Whether it saves time, as soon as there are enough epochs."""
        return self.break_even is not None

    @property
    def disk_eats_gain(self) -> bool:
        """Whether nothing would be gained if each row came from the disk."""
        return self.disk_ratio is not None and self.disk_ratio <= 1.0

    def __str__(self) -> str:
        return self.at + (f", call={self.call}" if self.call else "") + (", extra=True" if self.extra else "")


def advised_cut(
    at: str, call: int, extra: bool, frozen: tuple[str, ...], step: float, costs: Costs, size: Size
) -> AdvisedCut:
    """What follows from what was measured.

    Args:
        at: the name of the cut.
        call: the number of its call.
        extra: whether values go around it.
        frozen: what the head uses of the trunk's parameters.
        step: seconds of a step as it is.
        costs: what was measured.
        size: how much is trained on.
    """
    head = costs.forward + costs.backward
    batch_bytes = costs.row_bytes * size.batch
    data_bytes = None if size.rows is None else size.rows * costs.row_bytes
    beyond = 0.0  # share of the rows that memory has no room for
    if data_bytes and size.room is not None:
        beyond = max(0.0, 1.0 - size.room / data_bytes)
    from_disk = batch_bytes / costs.disk_reading if costs.disk_reading else 0.0
    otherwise = from_disk if costs.disk_reading else costs.trunk  # without a disk they are computed in each epoch
    reading = costs.reading + beyond * otherwise
    seconds = head + costs.fixed + reading
    writing = batch_bytes / costs.disk_writing if costs.disk_writing else 0.0
    # Filling writes behind the loop; it is counted in full, because the loop may have no core to spare.
    filling = costs.trunk + head + costs.fixed + costs.reading + writing
    pays_after = break_even(step, filling, seconds)
    if step < seconds * NOISE or (pays_after and size.epochs is not None and pays_after > size.epochs):
        pays_after = None
    total = None
    if size.steps is not None and size.epochs is not None:
        total = size.steps * (filling + (size.epochs - 1) * seconds)
    return AdvisedCut(
        at=at,
        call=call,
        extra=extra,
        parameters=costs.parameters,
        time=min(max(1.0 - head / step, 0.0), 1.0),
        row_bytes=costs.row_bytes,
        data_bytes=data_bytes,
        trunk_seconds=costs.trunk,
        head_seconds=head,
        reading_seconds=reading,
        fixed_seconds=costs.fixed,
        seconds=seconds,
        ratio=step / seconds,
        disk_ratio=step / (head + costs.fixed + costs.reading + from_disk) if costs.disk_reading else None,
        filling_seconds=filling,
        break_even=pays_after,
        total_seconds=total,
        frozen=frozen,
    )


def break_even(step: float, filling: float, recycled: float) -> int | None:
    """The first epoch after which less time was spent than without a cut; ``None`` if there is none.

    >>> break_even(step=10.0, filling=15.0, recycled=7.0)
    3

    Args:
        step: seconds of a step as it is.
        filling: seconds of a step of the first epoch.
        recycled: seconds of a step of all others.
    """
    if recycled >= step:
        return None
    if filling < step:
        return 1
    return math.floor((filling - recycled) / (step - recycled)) + 1
