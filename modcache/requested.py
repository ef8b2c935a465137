"""What was asked for: the options of `cached_module`, checked."""

from __future__ import annotations

import difflib
import inspect
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypedDict

from .errors import UsageError, UsageTypeError
from .keys.extractors import Extractor, extractor_of
from .memo import Options
from .opening import asked_store
from .stores import Store

__all__ = ["CacheOptions", "Requested", "check_names", "requested_of"]


class CacheOptions(TypedDict, total=False):
    """The options of `cached_module`, for type checkers."""

    key: str | Extractor | Callable[[Any], object] | None
    store: Store | str | os.PathLike[str] | None
    prepare: Callable[..., Any] | None
    broadcast: str | Iterable[str]
    per_row: bool
    version: str | None
    freeze: bool
    verify: float


@dataclass(frozen=True, slots=True)
class Requested:
    """The options of `cached_module` as they were asked for; requests for the same are equal."""

    key: Any = None
    store: Any = None
    prepare: Callable[..., Any] | None = None
    broadcast: frozenset[str] = frozenset()
    per_row: bool = True
    version: str | None = None
    freeze: bool = False
    verify: float = 0.0

    @property
    def options(self) -> Options:
        """What a call needs of them."""
        return Options(extractor_of(self.key), self.prepare, self.broadcast, self.per_row, self.verify)


def requested_of(
    *,
    key: Any = None,
    store: Any = None,
    prepare: Any = None,
    broadcast: Any = (),
    per_row: Any = True,
    version: Any = None,
    freeze: Any = False,
    verify: Any = 0.0,
    **unknown: Any,
) -> Requested:
    """The options, checked.

    Raises:
        UsageError, UsageTypeError: naming the option, what it takes, and what was found.
    """
    if unknown:
        name, known = next(iter(unknown)), list(CacheOptions.__annotations__)
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}? It takes" if near else "it takes"
        raise UsageTypeError(f"cached_module(...) has no option {name!r}; {hint} {', '.join(known)}")
    extractor_of(key)
    store = asked_store(store)
    if prepare is not None and not callable(prepare):
        raise UsageTypeError(f"prepare must be a function of rows that returns inputs of the module; found {prepare!r}")
    names = (
        (broadcast,) if isinstance(broadcast, str) else tuple(broadcast) if isinstance(broadcast, Iterable) else (None,)
    )
    if not all(isinstance(name, str) for name in names):
        raise UsageTypeError(f"broadcast must be names of arguments; found {broadcast!r}")
    if version is not None and not isinstance(version, str):
        raise UsageTypeError(f"version must be a text or None; found {version!r}")
    for name, value in (("per_row", per_row), ("freeze", freeze)):
        if not isinstance(value, bool):
            raise UsageTypeError(f"{name} must be True or False; found {value!r}")
    if isinstance(verify, bool) or not isinstance(verify, int | float):
        raise UsageTypeError(f"verify must be a share from 0.0 to 1.0; found {verify!r}")
    if not 0.0 <= verify <= 1.0:
        raise UsageError(f"verify must be a share from 0.0 to 1.0; found {verify!r}")
    return Requested(key, store, prepare, frozenset(names), per_row, version, freeze, float(verify))


def check_names(function: Callable[..., Any], requested: Requested) -> None:
    """A misspelt name in ``broadcast`` would silently split what is to stay whole."""
    try:
        parameters = inspect.signature(requested.prepare or function).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return
    if "cache_keys" in parameters:
        raise UsageError(
            "its forward has an argument called cache_keys, which is how a cached module is given the keys of rows; "
            "rename it, or cache a submodule"
        )
    if any(value.kind is inspect.Parameter.VAR_KEYWORD for value in parameters.values()):
        return
    for name in requested.broadcast:
        if re.split(r"[.\[]", name)[0] not in parameters:
            known = ", ".join(map(repr, parameters))
            raise UsageError(f"broadcast={name!r} names no argument; those of the forward are {known}")
