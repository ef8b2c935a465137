"""What becomes of the rows of the states that a module has left."""

from __future__ import annotations

from collections import deque

from torch import nn

from .memo import Memo
from .naming import Naming

__all__ = ["Succession"]

_KEPT = 8
"""States of weights that keep changing whose rows stay: an average of weights that is swapped in and out is served."""

_FUTILE = 5
"""New states in a row, with fewer hits than computed rows between them, whose rows are not worth a place on a disk.

A few hits say nothing: twins of rows in the same batch are hits, too.
"""


class Succession:
    """Follows one module from state to state.

    Args:
        naming: names the states.
    """

    def __init__(self, naming: Naming) -> None:
        self._naming = naming
        self._latest: int | None = None
        self._left: deque[int] = deque()  # the states of changing weights, the first one left first
        self._changes = self._hits = self._computed = 0
        self._newest = -1  # states are numbered as they come

    @property
    def latest(self) -> int | None:
        """The state of the latest call."""
        return self._latest

    def enter(self, memo: Memo, module: nn.Module, state: int) -> list[int]:
        """A call finds the module in another state than the one before.

        Rows of the state before are the first to go when room is needed. Those of weights that are trained, or change
        without ever a hit, are written to no disk, and leave memory when eight more states came.

        Returns:
            The states of which nothing is kept any more.
        """
        before, self._latest = self._latest, state
        new, self._newest = state > self._newest, max(state, self._newest)
        if before is None:
            return []
        trained = any(parameter.requires_grad for parameter in module.parameters())
        hits, computed = memo.hits - self._hits, memo.computed - self._computed
        self._changes = self._changes + 1 if new and (hits < computed or not hits) else 0
        self._hits, self._computed = memo.hits, memo.computed
        changing = trained or self._changes >= _FUTILE
        memo.keep_in_memory(changing)
        if changing and not memo.findings.anything_blocked:  # else it was told already what is wrong with it
            _say_why(memo, trained)
        for namespace in self._naming.names_of(before):
            memo.retire(namespace)
        if state in self._left:
            self._left.remove(state)
        if changing and before not in self._left:
            self._left.append(before)
        return [self._forget(memo, self._left.popleft()) for _ in range(len(self._left) - _KEPT)]

    def _forget(self, memo: Memo, state: int) -> int:
        for namespace in self._naming.forget_state(state):
            memo.drop_from_memory(namespace)
        return state


def _say_why(memo: Memo, trained: bool) -> None:
    if not trained:
        memo.say(
            "weights keep changing",
            f"its weights were other ones at {_FUTILE} calls in a row, so nothing that is stored is ever served. It is "
            "frozen: is it still in an optimizer, or an average of weights that are trained?",
        )
    elif memo.word.lasts:
        memo.say(
            "trained, so kept in memory",
            "its trainable weights change, so its rows stay in memory: on the disk, each step would leave rows that no "
            "later run can use. Wrap it with freeze=True if it is not to be trained.",
        )
