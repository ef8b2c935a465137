"""Tell the user what went wrong behind the loop, each kind of thing once."""

from __future__ import annotations

from ...notices import warn

__all__ = ["tell"]


def tell(troubles: list[tuple[str, str]], told: set[str]) -> None:
    """Warns of what went wrong since, and forgets it.

    Args:
        troubles: the kind and the text of each.
        told: the kinds that were told already, which this adds to.
    """
    while troubles:
        kind, text = troubles.pop(0)
        if kind not in told:
            told.add(kind)
            warn(text)
