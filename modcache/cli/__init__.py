"""The command ``modcache``: look into cache directories, and look after them."""

from __future__ import annotations

from .run import main

__all__ = ["main"]
