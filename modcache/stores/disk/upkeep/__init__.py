"""Looking after a cache directory while no store has it open: list, check, reclaim, erase, export."""

from __future__ import annotations

from .check import verify
from .contents import NoNamespaceError, du, find_namespace, listing, show, stats
from .erase import clear, forget
from .exports import export
from .reclaim import gc

__all__ = [
    "NoNamespaceError",
    "clear",
    "du",
    "export",
    "find_namespace",
    "forget",
    "gc",
    "listing",
    "show",
    "stats",
    "verify",
]
