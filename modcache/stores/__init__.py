"""Where rows are kept: the protocol that every store meets, and the stores there are."""

from __future__ import annotations

from modcache.stores.memory import MemoryStore
from modcache.stores.protocol import Found, Store, StoreStats

__all__ = ["Found", "MemoryStore", "Store", "StoreStats"]
