"""From a state that a module was in to the namespace of its rows."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Mapping

from torch import nn

from .digest import KEY_SCHEME, digest, encode, frame
from .fingerprint import UNDETERMINED, Fingerprint, Identity, context_facts
from .locks import lock_of
from .requested import Requested

__all__ = ["Context", "Naming", "State"]

Context = tuple[object, ...]

State = tuple[int, Context]
"""The number of what a module is, and what around it changes results."""


class Naming:
    """Names the states of one module: by their content, or by a number as long as nobody digested large weights.

    Args:
        identity: follows the content of the module.
        requested: the options of `cached_module`, which are part of a name.
        undigested_from: bytes of weights above which they are not digested for the sake of a name alone.
    """

    def __init__(self, identity: Identity, requested: Requested, undigested_from: int) -> None:
        self._identity = identity
        self._options = (requested.options.extractor.name, requested.version, requested.per_row)
        self._undigested_from = undigested_from
        self._lock = lock_of(self)
        self.token = uuid.uuid4().hex
        """Tells this module from all others of all processes."""
        self._names: dict[State, str] = {}
        self._fingerprints: dict[int, Fingerprint] = {}
        self._undigested: set[str] = set()  # names that stand for a number of this process, not for content

    def name(self, module: nn.Module, now: State) -> str:
        """The namespace of a state that the module is in."""
        with self._lock:
            found = self._names.get(now)
            if found is None:
                found = self._names[now] = self._name(module, now)
            return found

    def _name(self, module: nn.Module, now: State) -> str:
        state, around = now
        if sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers())) <= self._undigested_from:
            self._fingerprints[state] = self._identity.fingerprint(module)
        known = self._fingerprints.get(state)
        if known is not None:
            return self._digest(known.digest, around)
        name = self._digest(encode((self.token, state)), around)
        self._undigested.add(name)
        return name

    def _digest(self, content: bytes, around: Context) -> str:
        extractor, version, per_row = self._options
        parts = (KEY_SCHEME, content, around, extractor, version, per_row)
        return digest(frame(b"namespace", encode(parts))).hex()

    def name_by_content(self, module: nn.Module, now: State, rename: Callable[[str, str], None]) -> str:
        """The namespace of a state by its content, whatever has to be digested for it.

        Args:
            module: it is in this state.
            now: the state.
            rename: called with the name so far and the new one, where rows were stored under a number.
        """
        known = self._identity.fingerprint(module)
        name = self._digest(known.digest, now[1])
        if now[0] == UNDETERMINED:  # in training, say: the number stands for any weights, and nothing is stored
            return name
        with self._lock:
            self._fingerprints[now[0]] = known
            before = self._names.setdefault(now, name)
            if before in self._undigested:
                self._undigested.discard(before)
                self._names[now] = name
                rename(before, name)
            return self._names[now]

    def fingerprint(self, state: int) -> Fingerprint | None:
        """What the module was in a state, if its weights were digested then."""
        return self._fingerprints.get(state)

    def names(self) -> list[str]:
        """All namespaces that the module had so far."""
        return list(dict.fromkeys(self._names.values()))

    def names_of(self, state: int) -> list[str]:
        """The namespaces that a state had, one for each context."""
        return [name for (known, _), name in tuple(self._names.items()) if known == state]

    def forget_state(self, state: int) -> list[str]:
        """Forget a state that is not expected to come back; the namespaces that it had."""
        with self._lock:
            self._fingerprints.pop(state, None)
            gone = [now for now in self._names if now[0] == state]
            return [self._names.pop(now) for now in gone]

    def parts(self) -> Mapping[str, Mapping[str, bytes]]:
        """For each namespace so far, its named parts: those of the module's state, and the context's."""
        found = {}
        for (state, around), name in tuple(self._names.items()):
            known = self._fingerprints.get(state)
            own = {} if known is None else dict(known.parts)
            own.update({part: encode(value) for part, value in context_facts(around).items()})
            found[name] = own
        return found

    def forget(self, held: Collection[str]) -> None:
        """Forget all states but those of namespaces that hold rows."""
        with self._lock:
            self._fingerprints.clear()
            self._names = {now: name for now, name in self._names.items() if name in held}
