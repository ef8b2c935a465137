"""Rows in a directory: segment files that many processes append to and read at once."""

from __future__ import annotations
