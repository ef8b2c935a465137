"""Look again at what modules refer to: containers, closures, classes, slots, context variables, imports."""

from __future__ import annotations

import itertools
import operator
import sys
import types
from typing import TYPE_CHECKING, Any

from .code import installed_class
from .memoized import body_without, memoized
from .turns import LONG, Places, parted

if TYPE_CHECKING:
    import contextvars

    from .seen import Seen

__all__ = ["Outside"]

_chain = itertools.chain.from_iterable
_is = operator.is_


class Outside:
    """What a walk came across beside the attributes of modules, and what was there.

    Args:
        seen: what the walk came across.
    """

    def __init__(self, seen: Seen) -> None:
        at_once, self.later = parted([*seen.mappings.values(), *seen.sequences.values()])
        self._mappings = [value for value in at_once if isinstance(value, dict)]
        self._sequences = [value for value in at_once if not isinstance(value, dict)]
        # The bodies of the user's own classes; those of installed ones are looked at in turn.
        own = [cls for cls in seen.classes.values() if cls not in seen.busy and not installed_class(cls)]
        self._bodies = [vars(cls) for cls in own if not memoized(cls)]
        self._noting = [(vars(cls), names) for cls in own if (names := memoized(cls))]
        self._noting_sizes, self._noting_members = self._members()
        self._sized = [*self._mappings, *self._sequences, *self._bodies]
        self._sized += [value for value in self.later if len(value) > LONG]  # a small one shows its length in turn
        self._sizes = list(map(len, self._sized))
        self._cells = [cell for cell, _ in seen.cells.values()]
        self._empty_slots = [(value, name) for value, _, empty in seen.slotted.values() for name in empty]
        self._memories = list(seen.memories.values())
        self._bytes = list(map(bytes, self._memories))
        self._absent = tuple(seen.absent)
        self._variables, self._locals = list(seen.variables.values()), list(seen.locals.values())
        self._current = self._all_current()
        self._any_current = bool(self._variables or self._locals)
        others = self._noting, self._empty_slots, self._memories, self._absent, self._any_current
        self.anything = bool(self._sized or any(others))
        groups: Places = [
            (iter, self._mappings),
            (dict.values, self._mappings),
            (iter, self._sequences),
            (types.MappingProxyType.values, self._bodies),
        ]
        self.groups = [(get, places) for get, places in groups if places]
        """What is in these is to be the very same: getters of several values, and what each is to be called with."""
        self.ones: Places = [(operator.attrgetter("cell_contents"), self._cells)]
        """The same, for getters of one value."""

    def same(self) -> bool:
        """Whether all is as it was but for what is in `groups` and `ones`, of which there is as much as there was."""
        return (
            [*map(len, self._sized)] == self._sizes
            and (not self._empty_slots or not any(itertools.starmap(hasattr, self._empty_slots)))
            and (not self._memories or [*map(bytes, self._memories)] == self._bytes)
            and (not self._absent or not self.imported())
            and (not self._any_current or self._same_current())
            and (not self._noting or self._same_members())
        )

    def imported(self) -> bool:
        """Whether a Python module that code imports when it runs is there now, and was not before."""
        return any(map(sys.modules.__contains__, self._absent))

    def _members(self) -> tuple[list[int], list[object]]:
        """What classes hold on which installed code notes something, and how many."""
        bodies = list(itertools.starmap(body_without, self._noting))
        return list(map(len, bodies)), list(_chain(bodies))

    def _same_members(self) -> bool:
        sizes, members = self._members()
        return sizes == self._noting_sizes and all(map(_is, members, self._noting_members))

    def _all_current(self) -> list[object]:
        """What context variables and thread-local objects hold for whoever asks."""
        fields = list(map(vars, self._locals))
        return [*map(_bound_to, self._variables), *_chain(fields), *_chain(map(dict.values, fields))]

    def _same_current(self) -> bool:
        now = self._all_current()
        return len(now) == len(self._current) and all(map(_is, now, self._current))


_UNBOUND = object()


def _bound_to(variable: contextvars.ContextVar[Any]) -> object:
    return variable.get(_UNBOUND)
