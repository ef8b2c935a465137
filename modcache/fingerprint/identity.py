"""Follow one module: what is it now, and is it still what it was at the last look?"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..digest import digest, encode
from ..locks import lock_of
from .facts import UNDETERMINED, Bookkeeping, Fingerprint, Standing
from .settle import Changes, changes
from .strangers import Strangers
from .training import first_in_training
from .walk import Walk, walk
from .watch import LATE_WITHIN, Moved, Watch
from .weights import Weights

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

_SMALL_BUFFER = 1 << 16  # DDP sends its buffers again at each step: these are compared by content, uncounted
_SAME_IN_A_ROW = 3
_MOVES_IN_A_ROW = 8
_CALM_AFTER = 2
_KNOWN_STATES = 1 << 12  # whose number is known when they come back
_STATES = 64  # whose fingerprints, part by part, are remembered


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What is kept of a walk: nothing that refers to the outermost module."""

    parts: dict[str, bytes]
    structure: bytes
    opaque: tuple[str, ...]
    fields: dict[str, bytes]
    raw: dict[str, object]
    buffers: frozenset[str]
    unreadable: tuple[str, ...]
    lazy: bool
    training: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class _Look:
    """One consistent answer, swapped in as a whole so that readers need no lock."""

    watch: Watch
    facts: Facts
    standings: tuple[Standing | None, Standing | None]  # without and with grad mode; None: not asked for yet
    since: int  # the check that took it
    wanted: tuple[bool, bool]  # whether a caller can use the state, so that the weights are worth a look


class Identity:
    """Follows the content of one module.

    It holds no reference to the module itself, which holds it. ``check`` may run in several threads.

    Args:
        version: stands for weights that cannot be read.
        eager_bytes: up to this size the weights are digested at the first look, so that a state that comes
            back is known again; larger ones are only counted, until someone asks for the fingerprint.
        also: other things that the results depend on, by name (a function that prepares the inputs): their code
            and what it reaches are followed like the module's own.
        known: what forwards were seen to change on the module that this one is a copy of.
    """

    def __init__(
        self,
        *,
        version: str | None = None,
        eager_bytes: int = 256 << 20,
        also: Mapping[str, object] = MappingProxyType({}),
        known: Bookkeeping | None = None,
    ) -> None:
        self._version = version
        self._also = dict(also)
        self._eager_bytes = eager_bytes
        self._asked = False
        self._lock = lock_of(self)
        self._turns = itertools.count(1)
        self._look: _Look | None = None
        self._weights = Weights()
        self._strangers = Strangers()
        self._states: dict[tuple[bytes, object], int] = {}
        self._numbers = itertools.count()
        self._at: tuple[bytes, object] | None = None  # structure and weights of the last state
        self._epochs = itertools.count()
        self._epoch: tuple[object, int] | None = None
        self._fingerprints: dict[int, Fingerprint] = {}
        self._bookkeeping: dict[str, bytes | None] = {}
        if known is not None:
            self._bookkeeping.update(known.fields)
            self._weights.firsts.update(known.tensors)
        self._first_fields: dict[str, bytes] | None = None
        self._restless = False
        self._same_in_a_row = self._moves_in_a_row = self._calm = 0
        self.turn = 0
        """The number of the last check."""
        self.late_moves = 0
        """How many writes were noticed late."""
        self.spoiled_since = 0
        """The check since which the last of these may have spoiled what was computed."""

    def __reduce__(self) -> tuple[Callable[[], Identity], tuple[()]]:
        """A copy, or what a pickle holds, follows another module: it starts anew."""
        options = {"version": self._version, "eager_bytes": self._eager_bytes, "also": self._also}
        return functools.partial(Identity, **options), ()  # type: ignore[arg-type]

    def check(self, module: nn.Module, grad: bool) -> Standing:
        """What the module is now; the very same object as last time when nothing moved."""
        turn = self.turn = next(self._turns)
        look = self._look
        if (
            look is not None
            and (standing := look.standings[grad]) is not None
            and look.watch.moved(module, grad, turn, look.wanted[grad]) is None
            and not self._moves_in_a_row
        ):
            return standing
        with self._lock:
            return self._check_again(module, grad, turn)

    def _check_again(self, module: nn.Module, grad: bool, turn: int) -> Standing:
        look, moved = self._look, Moved.STRUCTURE
        if look is not None:
            seen = look.watch.moved(module, grad, turn, look.wanted[grad])
            if seen is None:
                return self._unmoved(look, grad)
            moved = seen
        if moved is Moved.LATE and look is not None:
            self._noticed_late(look, turn)
        if moved is Moved.WEIGHTS and look is not None and look.watch.still_readable():
            look = dataclasses.replace(look, watch=look.watch.renewed(), since=turn, standings=(None, None))
        else:
            look = self._walked(module)
        self._moves_in_a_row += moved is Moved.WEIGHTS
        self._calm = 0
        return self._stand(look, grad, counted=moved is Moved.WEIGHTS)

    def _noticed_late(self, look: _Look, turn: int) -> None:
        """Tell since when rows are suspect: none is, if everything was looked at in the check before this one."""
        self._weights.forget_devices(look.watch)
        since = max(look.since, turn - LATE_WITHIN)
        if since < turn - 1:
            self.late_moves += 1
            self.spoiled_since = since

    def _unmoved(self, look: _Look, grad: bool) -> Standing:
        """Nothing moved since the last look: another thread saw it, or the weights have come to rest."""
        standing = look.standings[grad]
        if self._restless:
            self._calm += 1
            if self._calm < _CALM_AFTER and standing is not None:
                return standing
            self._restless, standing = False, None
            look = dataclasses.replace(look, standings=(None, None))
        self._same_in_a_row = self._moves_in_a_row = 0
        return standing if standing is not None else self._stand(look, grad, counted=False)

    # --- looking ---

    def _walked(self, module: nn.Module) -> _Look:
        return self._kept(walk(module, self._bookkeeping, self._also), module)

    def _kept(self, found: Walk, module: nn.Module) -> _Look:
        watch = Watch(found, module)
        unshaped = [(name, type(tensor).__name__) for name, tensor in watch.sealed.items()]
        facts = Facts(
            parts=found.parts,
            structure=digest(
                encode(sorted(found.parts.items())) + encode(unshaped) + self._strangers.said(found.seen.opaque)
            ),
            opaque=tuple(found.seen.opaque),
            fields=found.seen.fields,
            raw=found.raw,
            buffers=found.buffers,
            unreadable=found.unreadable,
            lazy=found.lazy,
            training=first_in_training(found.modules),
        )
        if self._first_fields is None:
            self._first_fields = {**facts.fields, **found.seen.shared}
        usable = not facts.lazy and facts.training is None and (not facts.unreadable or self._version is not None)
        wanted = usable, usable and watch.trainable() is None
        return _Look(watch, facts, (None, None), self.turn, wanted)

    def _stand(self, look: _Look, grad: bool, counted: bool) -> Standing:
        """Put a look in place, with the standing that is asked for worked out."""
        state = UNDETERMINED
        if look.wanted[grad] and not self._restless:
            state = self._state(look, counted)
            if self._restless:
                state = UNDETERMINED
        facts, others = look.facts, look.standings[not grad]
        standing = Standing(
            state=state,
            trainable=look.watch.trainable() if grad else None,
            training=facts.training,
            unreadable=facts.unreadable,
            lazy=facts.lazy,
            restless=self._restless,
        )
        if others == standing and others is not None:
            standing = others
        elif self._look is not None:
            standing = next((old for old in self._look.standings if old == standing and old is not None), standing)
        both = (others, standing) if grad else (standing, others)
        self._look = dataclasses.replace(look, standings=both)
        return standing

    def _state(self, look: _Look, counted: bool) -> int:
        before = self._at
        if self._eager(look.watch):
            weighed = self._weights.weigh(look.watch)
            weights: object = weighed.digest
            heavy = any(not self._light(look, name) for name in weighed.stale)
            if counted:
                self._count(heavy, before is not None and before[1] != weights)
        else:
            weights = self._counted(look.watch)
        self._at = look.facts.structure, weights
        return self._number(self._at)

    def _number(self, at: tuple[bytes, object]) -> int:
        known = self._states.get(at)
        if known is None:
            if len(self._states) >= _KNOWN_STATES:
                self._states.pop(next(iter(self._states)))
            known = self._states[at] = next(self._numbers)
        return known

    def _eager(self, watch: Watch) -> bool:
        return self._asked or sum(leaf.nbytes for leaf in watch.leaves) <= self._eager_bytes

    def _counted(self, watch: Watch) -> object:
        """A number that stands for undigested weights: a new one whenever anything about them moved."""
        leaves = zip(watch.names, watch.leaves, strict=True)
        stamps = [(name, id(leaf), watch.stamp(at)) for at, (name, leaf) in enumerate(leaves)]
        if self._epoch is None or self._epoch[0] != stamps:
            self._epoch = stamps, next(self._epochs)
        return self._epoch[1]

    def _light(self, look: _Look, name: str) -> bool:
        if name not in look.facts.buffers:
            return False
        return bool(look.watch.leaves[look.watch.names.index(name)].nbytes <= _SMALL_BUFFER)

    def _count(self, heavy: bool, changed: bool) -> None:
        if not heavy:
            self._moves_in_a_row = max(0, self._moves_in_a_row - 1)
            return
        self._same_in_a_row = 0 if changed else self._same_in_a_row + 1
        self._restless = self._same_in_a_row >= _SAME_IN_A_ROW or self._moves_in_a_row >= _MOVES_IN_A_ROW

    # --- the rest of the interface ---

    @property
    def bookkeeping(self) -> Bookkeeping:
        """What forwards were seen to change so far."""
        with self._lock:
            return Bookkeeping(dict(self._bookkeeping), dict(self._weights.firsts))

    def settle(self, module: nn.Module) -> str | None:
        """Look at what a forward that has just run left behind.

        Attributes that it changed become bookkeeping: what was first seen stays in the fingerprint, later
        changes are ignored. Returns the name of a weight or buffer that moved meanwhile: what that forward
        computed must not be stored.
        """
        look = self._look
        if look is None or look.watch.moved(module, False, self.turn) is None:
            return None
        with self._lock:
            found = walk(module, self._bookkeeping, self._also)
            self._strangers.changed_by_forward(found.seen.opaque)
            if look.watch.imported():
                renewed = self._kept(found, module)
                self._look = dataclasses.replace(renewed, standings=look.standings)
                if renewed.facts.structure != look.facts.structure:
                    self._look = renewed
                    return "what it reads, by an import,"
                look = self._look
            after = changes(look.watch, look.facts, found, Watch(found, module), self._weights)
            if after.bookkeeping:
                self._remember(after, look)
                self._fingerprints.clear()
                found = walk(module, self._bookkeeping, self._also)
                renewed = self._kept(found, module)
                if after.moved is None:
                    self._look = dataclasses.replace(renewed, standings=look.standings)
                    self._refresh_key(renewed)
            return after.moved

    def _remember(self, after: Changes, look: _Look) -> None:
        first = self._first_fields or {}
        for place in after.bookkeeping:
            leaf = dict(zip(look.watch.names, look.watch.leaves, strict=True)).get(place)
            known = None if leaf is None else self._weights.known(leaf)
            if known is not None:
                self._weights.firsts.setdefault(place, known)
            # b"" for a tensor that was there at first, whose digest is kept above; None for what was not there.
            self._bookkeeping.setdefault(place, first.get(place, None if known is None else b""))

    def _refresh_key(self, look: _Look) -> None:
        """Bookkeeping changes how a state is written down, not which one it is."""
        if self._at is None:
            return
        number = self._number(self._at)
        if self._eager(look.watch):
            weights: object = self._weights.weigh(look.watch).digest
        else:
            weights = self._counted(look.watch)
        self._at = look.facts.structure, weights
        self._states.setdefault(self._at, number)

    def fingerprint(self, module: nn.Module) -> Fingerprint:
        """The content of the module as it is now; computed when asked for, remembered for each state."""
        with self._lock:
            standing = self.check(module, False)
            look = self._look
            assert look is not None
            known = self._fingerprints.get(standing.state)
            if known is not None and standing.state != UNDETERMINED:
                return known
            weighed = self._weights.weigh(look.watch)
            if standing.state != UNDETERMINED:
                self._asked = True
                self._at = look.facts.structure, weighed.digest
                self._states.setdefault(self._at, standing.state)
            found = Fingerprint(
                digest=digest(look.facts.structure + weighed.digest),
                parts={**look.facts.parts, **weighed.parts},
                weights=weighed.digest,
                opaque=look.facts.opaque,
                bookkeeping=tuple(sorted(self._bookkeeping)),
            )
            if len(self._fingerprints) >= _STATES:  # trained while it is used in between: a state a step
                self._fingerprints.pop(next(iter(self._fingerprints)))
            self._fingerprints[standing.state] = found
            return found

    def recheck(self, module: nn.Module) -> bool:
        """Digest everything anew; whether something had changed without having been noticed.

        Weights that were never digested cannot be vouched for: they count as changed.
        """
        with self._lock:
            self.check(module, False)
            before = self._at
            self._asked = True
            self._weights.forget()
            look = self._walked(module)
            self._stand(look, False, counted=False)
            return before is not None and before != self._at

    def drop(self) -> None:
        """Let go of all memory of the module at once; the next check looks anew."""
        with self._lock:
            self._look = self._epoch = None
            self._weights.forget()
