"""Where rows are kept: the protocol that every store meets, and the stores there are."""

from __future__ import annotations

from .disk import DiskStore
from .memory import MemoryStore
from .protocol import Describes, Found, Store, StoreStats, bytes_of
from .tiered import TieredStore

__all__ = ["Describes", "DiskStore", "Found", "MemoryStore", "Store", "StoreStats", "TieredStore", "bytes_of"]
