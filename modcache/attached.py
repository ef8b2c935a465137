"""What hangs on a cached module: from the module as it is now to the namespace of its rows, or to a bypass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from functools import partial
from typing import Any

import torch
from torch import nn

from .arguments import Arguments, Binder
from .call import bypass, call
from .errors import UsageTypeError
from .fingerprint import UNDETERMINED, Bookkeeping, Fingerprint, Identity, Standing, context, context_facts
from .forwards import forward_of
from .freezing import Before
from .hit import Missed, Site, hit
from .keys.keyed import Given
from .manifests import facts_of
from .memo import Bypass, Memo
from .modes import keys_around
from .naming import Context, Naming, State
from .notices import log
from .opening import open_store
from .precision import tolerance_of
from .refusals import refuse_standing, unusual
from .requested import Requested
from .running import Host
from .stores import MemoryStore, Store
from .succession import Succession
from .theirs import is_meant, noting
from .undisturbed import undisturbed

__all__ = ["Attached"]

_LARGE = 256 << 20
"""Bytes of weights up to which they are digested at once (some 20 ms), so that a state that comes back is known."""
_NEVER = 1 << 62

_STATES = 64

_FAST_PRODUCTS: dict[object, float] = {"tf32": 1e-2, "high": 1e-2, "bf16": 5e-2, "medium": 5e-2}
"""How far apart float32 results may be where products are less exact than float32."""


class Attached:
    """What hangs on a cached module. It does not hold the module, so a module still dies with its last user.

    Args:
        name: the class name of the module.
        requested: the options.
        inside: a forward that had been patched on the instance; it is called in place of the class's.
        store: shared with the module that this one is a copy of.
        known: what forwards were seen to change on that one.
    """

    def __init__(
        self,
        name: str,
        requested: Requested,
        inside: Callable[..., Any] | None = None,
        store: Store | None = None,
        known: Bookkeeping | None = None,
    ) -> None:
        self.requested = requested
        self.inside = inside
        self.before: Before | None = None
        self.at_first: Callable[[nn.Module], None] | None = None
        """What is left to be done to the module at its first call."""
        self.closed = False
        advice = None
        if store is None:
            store, advice = open_store(requested.store)
        self.memo = Memo(name, requested.options, store)
        if advice is not None:
            self.memo.say("directory unusable", advice)
        # Rows in memory are seen by this process alone, so large weights need no digest there.
        undigested_from = _LARGE if isinstance(store, MemoryStore) else _NEVER
        functions = {"prepare": requested.prepare, "key function": self.memo.options.extractor.function}
        self.identity = Identity(
            version=requested.version,
            eager_bytes=undigested_from,
            also={name: function for name, function in functions.items() if function is not None},
            known=known,
        )
        self._binder: Binder | None = None
        self._naming = Naming(self.identity, requested, undigested_from)
        self._succession = Succession(self._naming)
        self._wrapped = datetime.now(timezone.utc)
        self._sites: dict[State, Site] = {}
        self._fine: list[Standing | None] = [None, None]  # standings that were looked at and are no reason to bypass
        self._late_moves = 0

    # --- copies

    def __deepcopy__(self, copies: dict[int, Any]) -> Attached:
        """A copy has an identity and counts of its own, shares the store, and knows what a forward changes."""
        inside, known = copy.deepcopy(self.inside, copies), self.identity.bookkeeping
        other = Attached(self.memo.name, self.requested, inside, self.memo.store, known)
        other.before, other.closed = self.before, self.closed
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle holds the options, not the rows."""
        made_with = self.memo.name, self.requested, self.inside, self.before, self.closed, self.identity.bookkeeping
        return _restored, made_with

    # --- a call

    def forward(
        self, module: nn.Module, original: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What the module's forward gives, from the store where it can."""
        keys = kwargs.pop("cache_keys", None)
        grad = torch.is_grad_enabled()
        try:
            given = self._given(keys)  # also for a call that is bypassed: it has its number among those in keys_for
            standing = self.refuse(module, grad)
            if self.identity.late_moves != self._late_moves:
                self._drop_spoiled()
            now = standing.state, context()
            site = self._sites.get(now) or self._look(module, now)
            if standing.state != self._succession.latest:
                self._enter(module, standing.state)
            output = hit(self.memo, site, args, kwargs, given, grad)
            if type(output) is not Missed:
                return output
            settle, kept = partial(self.identity.settle, module), partial(undisturbed, module)
            host = Host(self._run(module, original), self._bind(original), settle, grad, self.identity.turn, kept)
            return call(self.memo, site, host, args, kwargs, given, output)
        except Bypass as found:
            reason = found.with_traceback(None)  # it is told of below, where no error of the module's has it as context
        except Exception as error:
            if is_meant(error):
                raise
            reason = _own_failure(error)
        return bypass(self.memo, self._run(module, original), args, kwargs, reason)

    def moved(self) -> None:
        """The module is being moved, cast or compiled anew: nothing that depends on what it was may be kept."""
        self._binder = None
        self.identity.drop()
        self._sites.clear()
        self.memo.recipes.clear()

    def refuse(self, module: nn.Module, grad: bool) -> Standing:
        """How the module stands now, in this grad mode.

        Raises:
            Bypass: a call of it would be run as if uncached.
        """
        if self.closed:
            raise Bypass("closed")
        if (reason := unusual(module)) is not None:
            raise Bypass(reason)
        standing = self.identity.check(module, grad)
        if standing is not self._fine[grad]:
            if self.at_first is not None:
                standing = self._begin(module, self.at_first, grad)
            requested = self.requested
            refuse_standing(standing, grad, versioned=requested.version is not None, frozen=requested.freeze)
            self._fine[grad] = standing
        return standing

    def _begin(self, module: nn.Module, at_first: Callable[[nn.Module], None], grad: bool) -> Standing:
        """How the module stands once it is as it is to be from its first call on."""
        self.at_first = None
        at_first(module)
        return self.identity.check(module, grad)

    def _bind(self, original: type[nn.Module]) -> Binder:
        """Names the arguments of a call: they are those of ``prepare``, or of the forward."""
        if self._binder is None:
            # None stands for self.
            self._binder = Binder(self.requested.prepare or self.inside or partial(forward_of(original), None))
        return self._binder

    def _run(self, module: nn.Module, original: type[nn.Module]) -> Callable[..., Any]:
        return noting(partial(forward_of(original), module) if self.inside is None else self.inside)

    def _given(self, keys: object) -> Given | None:
        if keys is not None:
            return Given(keys)
        around = keys_around()
        return None if around is None else Given(around.keys, around.number(self._naming.token), "keys_for(...)")

    def _drop_spoiled(self) -> None:
        """Something was changed unnoticed a few calls ago: rows stored since then may be of either state."""
        self._late_moves = self.identity.late_moves
        dropped = self.memo.drop_since(self.identity.spoiled_since)
        self.memo.say(
            "changed unnoticed",
            "it was changed in a way that is noticed late (its weights behind autograd's back, or code, a class or a "
            f"large container that it reads); {dropped} rows stored since were dropped, but rows served since may be "
            "stale. Write weights through autograd-visible operations (under torch.no_grad()), or call "
            "cache_of(module).recheck() after such a change.",
        )

    def _look(self, module: nn.Module, now: State) -> Site:
        """What a call needs to know of this state of the module, in this context."""
        tensors = [*module.parameters(), *module.buffers()]
        device = tensors[0].device if tensors else torch.device("cpu")
        kind = f"({'cpu' if device.type == 'cpu' else 'cuda'})"
        around = [value for name, value in context_facts(now[1]).items() if name.endswith(kind)]
        dtypes = {*(tensor.dtype for tensor in tensors), *(value for value in around if isinstance(value, torch.dtype))}
        floor = max([0.0, *map(tolerance_of, dtypes), *(_FAST_PRODUCTS.get(value, 0.0) for value in around)])
        if len(self._sites) >= _STATES:
            self._forget_states()
        site = self._sites[now] = Site(self._naming.name(module, now), device, floor)
        known = self._naming.fingerprint(now[0])
        if self.memo.word.lasts and known is not None:
            self.memo.introduce(self._facts(module, site.namespace, known, now[1]))
        return site

    def _forget_states(self) -> None:
        """Not all states of a module that keeps changing are remembered."""
        self._sites.clear()
        self._naming.forget(self.memo.held())

    def _enter(self, module: nn.Module, state: int) -> None:
        """The module is in another state than at the call before."""
        for gone in self._succession.enter(self.memo, module, state):
            self._sites = {now: site for now, site in self._sites.items() if now[0] != gone}

    # --- what the handle asks

    def namespace(self, module: nn.Module) -> str:
        """The namespace of the module as it is now; weights that were not digested yet are digested for it."""
        now = self.identity.check(module, False).state, context()

        def rename(before: str, name: str) -> None:
            self._sites.pop(now, None)
            self.memo.rename(before, name)

        return self._naming.name_by_content(module, now, rename)

    def name(self, module: nn.Module) -> str:
        """The namespace of the module as it is now, which may be a number of this process: nothing large is digested.

        It must be in a state in which a call could be served.
        """
        return self._naming.name(module, (self.identity.check(module, False).state, context()))

    def asked(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Arguments, Given | None]:
        """Arguments and given keys of a call that is asked about, not made.

        Raises:
            UsageTypeError: the module does not take such arguments (a ``TypeError``).
        """
        keys = kwargs.pop("cache_keys", None)
        around = keys_around()
        given = Given(keys) if keys is not None else None
        if given is None and around is not None:
            given = Given(around.keys, 0, "keys_for(...)")
        try:
            return self._bind(type(module))(args, kwargs), given
        except TypeError as error:
            raise UsageTypeError(f"{self.memo.name}: these arguments do not fit its signature: {error}") from None

    def parts(self, module: nn.Module) -> Mapping[str, Mapping[str, bytes]]:
        """For each namespace so far, its named parts: those of the module's state, and the context's."""
        self.namespace(module)
        return self._naming.parts()

    def nearest(self, module: nn.Module) -> tuple[str, ...] | None:
        """In what the most similar namespace that the store describes differs, if there is one of this class."""
        if not self.memo.word.lasts:
            return None
        known = self.identity.fingerprint(module)
        facts = self._facts(module, self.namespace(module), known, context())
        self.memo.introduce(facts)  # who asks before the first call is told what earlier runs found out
        return self.memo.word.nearest(facts)

    def manifest(self, module: nn.Module) -> dict[str, Any]:
        """The readable description of the namespace."""
        name = self.namespace(module)
        known = self.identity.fingerprint(module)
        held = getattr(self.memo.store, "namespace_bytes", None)
        facts = self._facts(module, name, known, context())
        del facts["made"]  # of the one beside the rows
        return {
            **facts,
            "wrapped": self._wrapped.isoformat(timespec="seconds"),
            "rows": len(self.memo.store.row_keys(name)),
            "bytes": None if held is None else held(name),
        }

    def _facts(self, module: nn.Module, name: str, known: Fingerprint, around: Context) -> dict[str, Any]:
        """What a manifest tells of a namespace, whether or not it has rows."""
        return facts_of(
            name,
            type(module),
            known,
            context_facts(around),
            key=self.memo.options.extractor.name,
            prepare=self.requested.prepare,
            version=self.requested.version,
            dtypes=frozenset(tensor.dtype for tensor in (*module.parameters(), *module.buffers())),
        )

    def recheck(self, module: nn.Module) -> bool:
        """Digest all weights; whether something had changed unnoticed, in which case the rows of the state go."""
        names, late = self._naming.names(), self.identity.late_moves
        changed = self.identity.recheck(module) or self.identity.late_moves != late
        self._late_moves = self.identity.late_moves
        if changed:
            for name in names:
                self.memo.delete(name)
            self._late_moves = self.identity.late_moves  # whoever asked has been answered; no warning follows
        return changed

    def clear(self, module: nn.Module) -> int:
        """Drop the rows of the namespace that the module has, and of all that it had."""
        usable = self.identity.check(module, False).state != UNDETERMINED
        names = dict.fromkeys([self.name(module) if usable else self.namespace(module), *self._naming.names()])
        return sum(self.memo.store.delete(name) for name in names)

    def close(self) -> None:
        """Run uncached from now on."""
        self.closed = True
        self.memo.flush()
        if self.requested.store is None or isinstance(self.requested.store, str):
            self.memo.leave_store()  # its own, unless a copy of the module shares it


def _own_failure(error: Exception) -> Bypass:
    """Something of this package failed, which must not end somebody's loop: the call is run as if uncached."""
    log.exception("modcache failed in a call, which runs uncached")
    if isinstance(error, OSError | MemoryError | torch.OutOfMemoryError):
        return Bypass(
            "the system refused something",
            f"the system refused something that a cached call needs ({type(error).__name__}: {error}). Such calls run "
            "uncached.",
        )
    return Bypass(
        "modcache failed",
        f"it failed in a call with {type(error).__name__}: {error}. Such calls run uncached. That is a defect of "
        "modcache: please report it with the traceback that is logged under 'modcache'.",
    )


def _restored(
    name: str,
    requested: Requested,
    inside: Callable[..., Any] | None,
    before: Before | None,
    closed: bool,
    known: Bookkeeping | None = None,
) -> Attached:
    attached = Attached(name, requested, inside, known=known)
    attached.before, attached.closed = before, closed
    return attached
