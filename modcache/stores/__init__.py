"""Where rows are kept: the protocol that every store meets, and the stores in memory; that on disk is in `disk`."""

from __future__ import annotations

from .memory import MemoryStore
from .protocol import Describes, Found, Store, StoreStats, bytes_of
from .tiered import TieredStore

__all__ = ["Describes", "Found", "MemoryStore", "Store", "StoreStats", "TieredStore", "bytes_of"]
