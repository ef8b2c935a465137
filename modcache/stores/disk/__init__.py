"""Rows in a directory: segment files that many processes append to and read at once."""

from __future__ import annotations

from .store import DiskStore, open_directory

__all__ = ["DiskStore", "open_directory"]
