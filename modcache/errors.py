"""What modcache raises and warns with; every error is also the built-in that a caller would already catch.

ModcacheError
├── UsageError           (ValueError)    an option, a name or a count that cannot be right
├── UsageTypeError       (TypeError)     a thing of a type that cannot be used
├── NotCachedError       (ValueError)    a verb was asked of a module that is not cached
├── LayeredError         (RuntimeError)  something was put on top of the cached module since
├── KeyExtractionError   (TypeError, ValueError)  a key extractor answered with no key
├── CutError             (ValueError)    a model cannot be parted at a submodule, or not for this call
├── CacheMissError       (KeyError)      `mode("require-hit")` met rows that are not stored
├── StaleRecordError     (RuntimeError)  `verify=` recomputed a row and found another one stored
└── FormatVersionError   (ValueError)    a cache directory was written by a newer modcache
"""

from __future__ import annotations

__all__ = [
    "CacheMissError",
    "CacheWarning",
    "CutError",
    "FormatVersionError",
    "KeyExtractionError",
    "LayeredError",
    "ModcacheError",
    "NotCachedError",
    "StaleRecordError",
    "UsageError",
    "UsageTypeError",
]


class ModcacheError(Exception):
    """The root of all errors of modcache."""


class UsageError(ModcacheError, ValueError):
    """An option, a name or a count that cannot be right."""


class UsageTypeError(ModcacheError, TypeError):
    """A thing of a type that cannot be used here."""


class NotCachedError(ModcacheError, ValueError):
    """`uncached` or `cache_of` was asked of a module that is not cached."""


class LayeredError(ModcacheError, RuntimeError):
    """`uncached` cannot undo, because something was layered on top of the cached module since."""


class KeyExtractionError(ModcacheError, TypeError, ValueError):
    """A key extractor gave something that cannot be a key; nothing was stored."""


class CutError(ModcacheError, ValueError):
    """A model cannot be parted there, or not for this call: with the reason, the module at fault, and the way out."""


class CacheMissError(ModcacheError, KeyError):
    """Rows were missing although `mode("require-hit")` promised that none would be."""

    # KeyError prints the repr of its argument; a message of several words should read as one.
    __str__ = Exception.__str__


class StaleRecordError(ModcacheError, RuntimeError):
    """A stored row differs from what the module gives now (found by `verify=`)."""


class FormatVersionError(ModcacheError, ValueError):
    """A cache directory has a format that this version cannot read; it names both numbers."""


class CacheWarning(UserWarning):
    """Something could not be cached: what, why, and what to do. The result of the call is right."""
