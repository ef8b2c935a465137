"""The one switch for all cached modules of the process, and the keys that a caller hands to nested ones."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from .errors import UsageError, UsageTypeError
from .locks import lock_of

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["MODES", "KeysAround", "current_mode", "keys_around", "keys_for", "mode", "without_given_keys"]

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")

MODES = ("read-write", "read-only", "refresh", "require-hit", "off")


def _checked(name: object, source: str) -> str:
    if not isinstance(name, str):
        raise UsageTypeError(f"{source} must be one of {', '.join(map(repr, MODES))}; found a {type(name).__name__}")
    if name not in MODES:
        raise UsageError(f"{source} must be one of {', '.join(map(repr, MODES))}; found {name!r}")
    return name


@dataclass(frozen=True, slots=True, eq=False)
class _Switch:
    """One use of `mode`.

    Args:
        name: the mode.
        said_by: what said it as a statement; ``None`` for a block, and for the environment.
    """

    name: str
    said_by: weakref.ref[mode] | None = None


# Those in force, the latest last: blocks of several threads or tasks need not end in the order in which they began.
_switches = [
    _Switch(_checked(os.environ.get("MODCACHE_MODE") or "read-write", "the environment variable MODCACHE_MODE"))
]
_now = {"mode": _switches[0].name}
_lock = lock_of(sys.modules[__name__])

# Asked for on every call, so these two are calls into C without a frame of their own.
current_mode: Callable[[], str] = functools.partial(_now.__getitem__, "mode")
"""The mode that all cached modules of this process are in."""


def _switch(end: _Switch | None = None, begin: _Switch | None = None) -> None:
    with _lock:
        if end is not None and end in _switches:
            at = _switches.index(end)
            after = at + 1
            while end.said_by is None and after < len(_switches) and _switches[after].said_by is not None:
                after += 1  # what was said within a block ends with it
            del _switches[at:after]
        if begin is not None:
            _switches.append(begin)
        while len(_switches) > 2 and _is_final(_switches[-2]) and _switches[-3].said_by is not None:
            del _switches[-3]  # nobody will ever come back to it
        _now["mode"] = _switches[-1].name


def _is_final(switch: _Switch) -> bool:
    """Whether it was said by what nobody can enter any more."""
    return switch.said_by is not None and switch.said_by() is None


class mode(contextlib.AbstractContextManager["mode"]):  # noqa: N801 - used like a function, as `torch.no_grad` is
    """Switch what all cached modules of this process do, at once; as a context manager or a decorator, for a while.

    >>> with mode("off"):
    ...     pass  # modules run as if they were not cached
    >>> @mode("require-hit")
    ... def evaluate(): ...  # nothing is computed within it

    Args:
        name: ``"read-write"`` (the default) serves stored rows and stores computed ones;
            ``"read-only"`` stores nothing; ``"refresh"`` computes every row and overwrites what is stored;
            ``"require-hit"`` raises `CacheMissError` instead of computing, and so checks no batch either: a row that
            was stored by itself is served as it came out by itself; ``"off"`` runs modules uncached.

    Raises:
        UsageError: the name is none of these (a ``ValueError``).

    The environment variable ``MODCACHE_MODE`` sets the mode that a process starts in, unless it is empty.
    """

    def __init__(self, name: str) -> None:
        self._name = _checked(name, "mode(...)")
        self._said = _Switch(self._name, weakref.ref(self))
        self._entered: list[_Switch] = []
        _switch(begin=self._said)

    def __call__(self, function: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
        """The function, in this mode while it runs."""
        _switch(end=self._said)  # not from now on

        @functools.wraps(function)
        def within(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
            with mode(self._name):
                return function(*args, **kwargs)

        return within

    def __enter__(self) -> Self:
        self._entered.append(_Switch(self._name))
        _switch(end=self._said, begin=self._entered[-1])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _switch(end=self._entered.pop())


@dataclass(frozen=True, slots=True, eq=False)
class KeysAround:
    """Keys for the rows of every cached module that runs inside `keys_for`.

    Args:
        keys: one per row.
        calls: how often each module was called so far; a second call of one module is about other inputs,
            so its number goes into the key.
    """

    keys: object
    calls: dict[str, int] = field(default_factory=dict)

    def number(self, module: str) -> int:
        """The number of this call of the module inside the block, from 0."""
        number = self.calls.get(module, 0)
        self.calls[module] = number + 1
        return number


_given: contextvars.ContextVar[KeysAround | None] = contextvars.ContextVar("modcache_keys", default=None)


keys_around: Callable[[], KeysAround | None] = _given.get
"""What `keys_for` gave to the running block, if anything."""


@contextlib.contextmanager
def without_given_keys() -> Iterator[None]:
    """Take no notice of `keys_for` inside: what runs there is not the batch that the keys are for."""
    token = _given.set(None)
    try:
        yield
    finally:
        _given.reset(token)


@contextlib.contextmanager
def keys_for(ids: object) -> Iterator[None]:
    """Give keys to the cached modules nested in a model, which cannot be handed ``cache_keys=`` directly.

    >>> import torch
    >>> from modcache import cached_module, cache_of
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)).requires_grad_(False)
    >>> _ = cached_module(model[0], freeze=True)
    >>> batch, ids = torch.randn(4, 2), torch.tensor([3, 1, 4, 15])
    >>> for epoch in range(2):
    ...     with keys_for(ids):
    ...         scores = model(batch)
    >>> cache_of(model[0]).stats.hits
    4

    Args:
        ids: one key per row: ints, strings, bytes, tuples of these, a 1-D integer tensor or array, or a tuple of such.

    A module that is called several times in one block (two towers that share an encoder) has other rows each time,
    so the number of the call is part of the key.
    """
    token = _given.set(KeysAround(ids))
    try:
        yield
    finally:
        _given.reset(token)
