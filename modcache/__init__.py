"""modcache: run a frozen ``torch.nn.Module`` once per distinct row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import keys
from .errors import (
    CacheMissError,
    CacheWarning,
    CutError,
    FormatVersionError,
    KeyExtractionError,
    LayeredError,
    ModcacheError,
    NotCachedError,
    StaleRecordError,
    UsageError,
    UsageTypeError,
)
from .explain import Explanation
from .handle import Cache
from .keys import register_key_extractor
from .modes import keys_for, mode
from .stats import CallReport, Stats
from .stores import MemoryStore, Store, TieredStore
from .wrap import cache_of, cached_module, is_cached, uncached

__all__ = [
    "Advice",
    "Cache",
    "CacheMissError",
    "CacheWarning",
    "CallReport",
    "CutError",
    "DiskStore",
    "Explanation",
    "FormatVersionError",
    "KeyExtractionError",
    "LayeredError",
    "MemoryStore",
    "ModcacheError",
    "NotCachedError",
    "StaleRecordError",
    "Stats",
    "Store",
    "TieredStore",
    "UsageError",
    "UsageTypeError",
    "advise",
    "cache_of",
    "cached_module",
    "is_cached",
    "keys",
    "keys_for",
    "mode",
    "recycle",
    "register_key_extractor",
    "uncached",
]


if TYPE_CHECKING:
    from .advising import Advice, advise
    from .recycling import recycle
    from .stores.disk import DiskStore

    __version__: str
else:
    # Half of what the import would take is for what many programs do without: it comes with its first use.
    _WHEN_ASKED_FOR = {
        "Advice": ".advising",
        "DiskStore": ".stores.disk",
        "advise": ".advising",
        "recycle": ".recycling",
    }

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib.metadata import version

            return version("modcache")
        if name in _WHEN_ASKED_FOR:
            from importlib import import_module

            return getattr(import_module(_WHEN_ASKED_FOR[name], __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
