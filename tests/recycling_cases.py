"""The whole table of tiny models: importing a file of them enters them in it."""

from __future__ import annotations

from tests import (
    recycling_models_around,
    recycling_models_calls,
    recycling_models_kinds,
    recycling_models_python,
    recycling_models_shapes,
    recycling_models_state,
)
from tests.recycling_models import CASES

__all__ = ["CASES", "FILES"]

FILES = (
    recycling_models_around,
    recycling_models_calls,
    recycling_models_kinds,
    recycling_models_python,
    recycling_models_shapes,
    recycling_models_state,
)
