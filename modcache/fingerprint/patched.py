"""Functions of torch that somebody replaced for the whole process, as some libraries tell their users to do."""

from __future__ import annotations

from torch.nn import functional

from .code import of_library

__all__ = ["FUNCTIONAL", "patched_functions"]

FUNCTIONAL = vars(functional)
"""The namespace that the forwards of torch's layers read their functions from."""

_AS_IMPORTED = dict(FUNCTIONAL)


def patched_functions() -> dict[str, object]:
    """What stands in `torch.nn.functional` now and is not torch's own, by name."""
    return {
        name: value
        for name, value in FUNCTIONAL.items()
        if value is not _AS_IMPORTED.get(name) or not of_library(getattr(value, "__module__", None))
    }
