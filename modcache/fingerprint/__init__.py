"""What a module is in content, and whether it is still what it was at the last look."""

from .callables import callable_digest
from .context import context, context_facts
from .facts import UNDETERMINED, Bookkeeping, Fingerprint, Standing
from .identity import Identity
from .training import first_in_training

__all__ = [
    "UNDETERMINED",
    "Bookkeeping",
    "Fingerprint",
    "Identity",
    "Standing",
    "callable_digest",
    "context",
    "context_facts",
    "first_in_training",
]
