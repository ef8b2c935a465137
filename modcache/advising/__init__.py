"""Say which cut of a model pays: every candidate measured in the same few steps, nothing changed."""

from __future__ import annotations

from .advice import Advice
from .asking import advise

__all__ = ["Advice", "advise"]
