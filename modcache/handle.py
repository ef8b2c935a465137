"""See through a cached module: what it did, what it holds, why a row hits, and how to drop rows."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from .ask import contained, explained, keys_of, row_count
from .attached import Attached
from .cut import Cut
from .errors import UsageTypeError
from .explain import Explanation
from .memo import Bypass
from .stats import CallHook, Stats
from .stores import Store

__all__ = ["Cache", "HookHandle"]


_numbers = itertools.count()


class HookHandle:
    """Takes a hook away again: ``handle.remove()``."""

    def __init__(self, hooks: dict[int, CallHook], hook: CallHook) -> None:
        self._hooks = hooks
        self._number = next(_numbers)
        hooks[self._number] = hook

    def remove(self) -> None:
        """Stop calling the hook."""
        self._hooks.pop(self._number, None)


class Cache:
    """What `cache_of` gives: the cache of one module.

    >>> import torch
    >>> from modcache import cached_module, cache_of
    >>> encoder = cached_module(torch.nn.Linear(3, 2), freeze=True)
    >>> batch = torch.eye(3)
    >>> _ = encoder(batch)
    >>> cache_of(encoder).contains(batch)
    [True, True, True]
    >>> print(cache_of(encoder).explain(batch * 2)[0])
    row 0: miss, not seen before; differs from the nearest stored row in input
    """

    def __init__(self, module: nn.Module, attached: Attached) -> None:
        self._module = module
        self._attached = attached

    def __repr__(self) -> str:
        stats = self.stats
        return f"Cache({self._attached.memo.name}, {stats.rows} rows, {stats.hit_rate:.0%} hits)"

    @property
    def stats(self) -> Stats:
        """What the module's calls did so far; prints as a table."""
        return self._attached.memo.stats()

    @property
    def store(self) -> Store:
        """Where the rows lie."""
        return self._attached.memo.store

    @property
    def cut(self) -> Cut | None:
        """Where a recycled model is cut, what that froze, and what is stored; ``None`` for other modules."""
        return None

    @property
    def namespace(self) -> str:
        """Names the module as it is now, with the context (autocast, precision) of this moment; 32 hex digits."""
        return self._attached.namespace(self._module)

    @property
    def manifest(self) -> dict[str, Any]:
        """The readable description of the namespace: what is in it, and what could not be fingerprinted."""
        return self._attached.manifest(self._module)

    def contains(self, *args: Any, **kwargs: Any) -> list[bool]:
        """Whether each row of a call is stored; the module is not run.

        A call that would be bypassed has no stored rows.
        """
        try:
            self._attached.refuse(self._module, torch.is_grad_enabled())
            arguments, given = self._attached.asked(self._module, args, kwargs)
            return contained(self._attached.memo, self._attached.name(self._module), arguments, given)
        except Bypass:
            return [False] * row_count(self._attached.memo.options, args, kwargs)

    def explain(self, *args: Any, **kwargs: Any) -> list[Explanation]:
        """Why each row of a call would hit or miss; the module is not run."""
        memo = self._attached.memo
        try:
            self._attached.refuse(self._module, torch.is_grad_enabled())
            namespace = self._attached.namespace(self._module)
            arguments, given = self._attached.asked(self._module, args, kwargs)
            parts, nearest = self._attached.parts(self._module), self._attached.nearest(self._module)
            return explained(memo, namespace, arguments, given, parts, nearest)
        except Bypass as reason:
            why = f"the call is bypassed ({reason.reason}): {reason.advice or 'it is run as if uncached'}"
            return [Explanation(place, False, why) for place in range(row_count(memo.options, args, kwargs))]

    def recheck(self) -> bool:
        """Digest all weights in full; whether something had changed unnoticed (then those rows are dropped)."""
        return self._attached.recheck(self._module)

    def forget(self, *args: Any, **kwargs: Any) -> int:
        """Drop the rows of a call everywhere: in all tiers and all namespaces of the store.

        Returns:
            The number of records dropped; a row may have one in each state and context of the module.
        """
        arguments, given = self._attached.asked(self._module, args, kwargs)
        try:
            _, keyed = keys_of(self._attached.memo, arguments, given)
        except Bypass:
            return 0
        return sum(self.store.delete(namespace, keyed.keys) for namespace in self.store.namespaces())

    def clear(self) -> int:
        """Drop all rows of this module, in the states and contexts it had; their number."""
        return self._attached.clear(self._module)

    def flush(self) -> None:
        """Wait until what was stored would survive the process, where the store can do that."""
        self.store.flush()

    def close(self) -> None:
        """Stop caching: the module runs uncached from now on. A store of its own is given back."""
        self._attached.close()

    def add_hook(self, hook: CallHook) -> HookHandle:
        """Call ``hook(report)`` with one frozen `CallReport` after each call.

        Returns:
            A handle whose ``remove()`` takes the hook away again.

        Raises:
            UsageTypeError: it is not callable (a ``TypeError``).
        """
        if not callable(hook):
            raise UsageTypeError(f"add_hook(...) takes a function of a CallReport; found {hook!r}")
        return HookHandle(self._attached.memo.hooks, hook)
