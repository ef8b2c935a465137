"""modcache: run a frozen ``torch.nn.Module`` once per distinct row."""

from __future__ import annotations

from . import keys
from .advising import Advice, advise
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
from .recycling import recycle
from .stats import CallReport, Stats
from .stores import DiskStore, MemoryStore, Store, TieredStore
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


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("modcache")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
