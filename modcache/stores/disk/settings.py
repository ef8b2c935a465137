"""The settings of the catalogue: what diskcache is opened with, and what its file may say."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

__all__ = ["COUNTS", "SCHEMA", "SETTINGS"]

SETTINGS: Final[Mapping[str, str | int]] = MappingProxyType(
    {
        "statistics": 0,
        "tag_index": 0,
        "eviction_policy": "none",
        "size_limit": 1 << 62,
        "cull_limit": 0,
        "disk_min_file_size": 1 << 62,  # no value ever becomes a file
        "disk_pickle_protocol": 0,
        "sqlite_auto_vacuum": 0,
        "sqlite_cache_size": 256,
        # No journal lies beside the file: a kill in the middle of a write costs the catalogue, which is rebuilt.
        "sqlite_journal_mode": "memory",
        "sqlite_mmap_size": 0,  # a file truncated underneath a map kills the process
        "sqlite_synchronous": 0,
    }
)

COUNTS: Final = frozenset({"count", "size", "hits", "misses"})
"""Settings that diskcache keeps count in; any whole number may stand there."""

SCHEMA: Final = frozenset(
    {
        ("table", "Settings"),
        ("index", "sqlite_autoindex_Settings_1"),
        ("table", "Cache"),
        ("index", "Cache_key_raw"),
        ("index", "Cache_expire_time"),
        ("trigger", "Settings_count_insert"),
        ("trigger", "Settings_count_delete"),
        ("trigger", "Settings_size_insert"),
        ("trigger", "Settings_size_update"),
        ("trigger", "Settings_size_delete"),
    }
)
"""What diskcache makes in the file; a view in a table's place could compute for ever."""
