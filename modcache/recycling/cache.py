"""See through a recycled model: its cut, and the rows of its trunk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ..cut import Crossing, Cut
from ..errors import CutError
from ..explain import Explanation
from ..handle import Cache
from ..stats import Stats
from ..stores import Store
from .plan import Plan, Stored

if TYPE_CHECKING:
    from .recycled import Recycled
    from .trunk import Parted

__all__ = ["RecycledCache", "cut_of"]


class RecycledCache(Cache):
    """What `cache_of` gives of a recycled model: that of its trunk. Asked of a call, it takes the model's arguments."""

    def __init__(self, model: nn.Module, recycled: Recycled) -> None:
        self._model, self._recycled = model, recycled

    def __repr__(self) -> str:
        """In short."""
        stats = self.stats
        name = self._recycled.memo.name
        return f"Cache({name} from {self._recycled.asking.at}, {stats.rows} rows, {stats.hit_rate:.0%} hits)"

    @property
    def cut(self) -> Cut:
        """Where the model is cut, what that froze, and what is stored."""
        return cut_of(self._model, self._recycled)

    @property
    def stats(self) -> Stats:
        """What the model's calls did so far."""
        return self._recycled.memo.stats()

    @property
    def store(self) -> Store:
        """Where the rows lie."""
        return self._recycled.memo.store

    @property
    def namespace(self) -> str:
        """Names the trunk as it is now, for the latest kind of call; 32 hex digits."""
        return self._latest().namespace

    @property
    def manifest(self) -> dict[str, Any]:
        """The readable description of the namespace."""
        return self._latest().manifest

    def contains(self, *args: Any, **kwargs: Any) -> list[bool]:
        """Whether each row of a call is stored; the model is not run."""
        see, inputs = self._asked(args, kwargs)
        return see.contains(**inputs)

    def explain(self, *args: Any, **kwargs: Any) -> list[Explanation]:
        """Why each row of a call would hit or miss; the model is not run."""
        see, inputs = self._asked(args, kwargs)
        return see.explain(**inputs)

    def recheck(self) -> bool:
        """Digest all weights of the trunk in full; whether something had changed unnoticed."""
        return any(see.recheck() for see in self._all())

    def forget(self, *args: Any, **kwargs: Any) -> int:
        """Drop the rows of a call everywhere; the number of records dropped."""
        see, inputs = self._asked(args, kwargs)
        return see.forget(**inputs)

    def clear(self) -> int:
        """Drop all rows of the trunk; their number."""
        return sum(see.clear() for see in self._all())

    def close(self) -> None:
        """Stop caching: the model runs in full from now on, its trunk frozen. A store of its own is given back."""
        self._recycled.closed = True
        self.store.flush()
        if self._recycled.requested.store is None or isinstance(self._recycled.requested.store, str):
            self._recycled.memo.leave_store()

    def add_hook(self, hook: Any) -> Any:
        """Call ``hook(report)`` with one frozen `CallReport` after each call."""
        from ..handle import HookHandle

        return HookHandle(self._recycled.memo.hooks, hook)

    def _all(self) -> list[Cache]:
        return [self._see(parted) for parted in self._recycled.parted.values()]

    def _see(self, parted: Parted) -> Cache:
        parted.take_over(self._recycled.written)
        return Cache(parted.trunk, parted.attached)

    def _latest(self) -> Cache:
        if not self._recycled.parted:
            raise CutError(
                f"{self._recycled.asking.at}: not probed yet, so the trunk has no namespace. Call the model on a batch "
                "of two rows or more, or give recycle(..., batch=...)."
            )
        return self._see(list(self._recycled.parted.values())[-1])

    def _asked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Cache, dict[str, Any]]:
        parted, inputs = self._recycled.trunk_call(self._model, args, kwargs)
        return self._see(parted), inputs


def cut_of(model: nn.Module, recycled: Recycled) -> Cut:
    """What is known of the cut."""
    asking, plans = recycled.asking, list(recycled.plans.values())
    if not plans:
        return Cut(asking.at, asking.call)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    frozen = {name for plan in plans for name in plan.frozen}
    names: dict[int, list[str]] = {}
    for name in frozen:
        names.setdefault(id(parameters.get(name)), []).append(name)
    tied = {name for same in names.values() if len(same) > 1 for name in same}
    latest = plans[-1]
    return Cut(
        at=asking.at,
        call=asking.call,
        probed=True,
        frozen=tuple(sorted(frozen)),
        tied=tuple(sorted(tied)),
        bystanders=tuple(sorted({path for plan in plans for path, _ in plan.live})),
        stored=tuple(map(_crossing, latest.stored)),
        inputs=_inputs(latest),
    )


def _inputs(plan: Plan) -> tuple[str, ...]:
    return plan.inputs


def _crossing(stored: Stored) -> Crossing:
    size = 0 if stored.axis is None else stored.row_bytes
    return Crossing(str(stored), stored.shape, str(stored.dtype).removeprefix("torch."), size)
