"""The trunk as a module of its own, so that the machinery of cached modules can name it, run it and store its rows."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from operator import is_
from typing import Any, NamedTuple

from torch import nn

from ..arguments import Arguments
from ..attached import Attached
from ..classes import original_class
from ..errors import CutError
from ..findings import Findings
from ..fingerprint import UNDETERMINED, Fingerprint, Standing
from ..manifests import TokenDims
from ..memo import Bypass, Memo, Options
from ..naming import Context
from ..recipe import Form
from ..requested import Requested
from ..stores import Store
from .plan import Plan
from .shadow import Shadow

__all__ = ["Parted", "Trunk", "TrunkAttached", "probed_memo", "trainable"]


class _Local(threading.local):
    run: Callable[[dict[str, Any]], Any] | None = None


_local = _Local()


class Trunk(nn.Module):
    """The modules, parameters and buffers that feed a cut, and what of their ancestors counts.

    Its forward takes the inputs that feed the cut and returns the tensors that cross it, rows first.
    """

    def __init__(self, pruned: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.at, self.call, self.stored = plan.at, plan.call, tuple(map(str, plan.per_row))
        self.model = pruned
        self.training = False  # not eval(), which would ask the modules, whose modes are noted later

    def forward(self, **inputs: Any) -> Any:
        """The tensors that cross the cut, for these rows."""
        assert _local.run is not None, "a trunk is called by the model that it belongs to"
        return _local.run(inputs)


class _Fields(NamedTuple):
    """The attributes of an ancestor, and those of them that its copy was given."""

    names: list[str]
    given: list[str]


_NOTHING = _Fields([], [])


class Parted:
    """The trunk of a model, and how it is kept in step with it.

    Args:
        model: the model.
        plan: what feeds the cut.
        attached: names, runs and stores it.
    """

    def __init__(self, model: nn.Module, plan: Plan, attached: TrunkAttached) -> None:
        pruned = _Pruned(model, plan)
        self._pairs = pruned.pairs
        self._direct = [pair for pair in pruned.pairs if any(vars(pair[1])[kind] for kind in _DIRECT)]
        self._seen: object = None
        self._known = [_NOTHING] * len(pruned.pairs)
        children: dict[int, tuple[nn.Module, dict[str, nn.Module]]] = {}
        for original, name, child in pruned.children:
            children.setdefault(id(original), (original, {}))[1][name] = child
        self._children = [(original, list(named), list(named.values())) for original, named in children.values()]
        self._originals = {id(original) for original, *_ in (*pruned.pairs, *pruned.children)}
        self.trunk = Trunk(pruned.root, plan)
        self.attached = attached

    def rows(self, run: Callable[[dict[str, Any]], Any], given: dict[str, Any]) -> Any:
        """What is stored for such inputs; ``run`` computes it for those that it is not stored for."""
        before, _local.run = _local.run, run
        try:
            return self.attached.forward(self.trunk, Trunk, (), given)
        finally:
            _local.run = before

    def is_in_step(self, stamp: object) -> bool:
        """Whether nothing was changed about the model since this was its shadow's stamp: all is as it is to be."""
        if self._seen is not stamp:
            return False
        if self._direct:
            self._take_over_direct()
        return True

    def is_current(self) -> bool:
        """Whether the modules of the trunk are the same as when it was parted."""
        for original, names, children in self._children:
            if not all(map(is_, map(vars(original)["_modules"].get, names), children)):
                return False
        return True

    def follow(self, shadow: Shadow, written: AbstractSet[tuple[int, str]]) -> None:
        """As `take_over`, for a shadow that has just followed the model, and whose modules these are."""
        self.take_over(written)
        if not written and self._originals <= shadow.originals:
            self._seen = shadow.stamp

    def take_over(self, written: AbstractSet[tuple[int, str]]) -> None:
        """Give the copies of the ancestors the attributes that these have now, but for those that a forward sets."""
        self._seen = None
        self._take_over_direct()
        for place, (original, copied) in enumerate(self._pairs):
            if not _same_fields(vars(original), vars(copied), self._known[place]):
                self._known[place] = _take_over(original, copied, written)

    def _take_over_direct(self) -> None:
        for original, copied in self._direct:
            for kind in _DIRECT:
                mine = vars(copied)[kind]
                for name in mine:  # those of an ancestor that feed the cut may have been exchanged
                    mine[name] = vars(original)[kind].get(name)


def _same_fields(theirs: dict[str, Any], mine: dict[str, Any], known: _Fields) -> bool:
    """Whether these are the names still, and what was given is the very same."""
    return list(theirs) == known.names and all(
        map(is_, map(theirs.__getitem__, known.given), map(mine.__getitem__, known.given))
    )


def _take_over(original: nn.Module, copied: nn.Module, written: AbstractSet[tuple[int, str]]) -> _Fields:
    """Give a copy the attributes of its original."""
    number, mine, theirs = id(original), vars(copied), vars(original).copy()
    names = list(theirs)
    for name in _INNER & theirs.keys():
        del theirs[name]
    for name in [name for name in theirs if (number, name) in written] if written else ():
        if name in mine:
            theirs[name] = mine[name]  # as it was before a forward set it, so that the rows keep their name
        else:
            del theirs[name]
    mine.update(theirs)
    if len(mine) > len(theirs) + len(_BARE):
        for name in mine.keys() - theirs.keys() - _INNER:
            del mine[name]
    return _NOTHING if written else _Fields(names, list(theirs))


_DIRECT = ("_parameters", "_buffers")
_BARE = frozenset(vars(nn.Module()))
_INNER = _BARE | {"_modcache", "forward"}


class _Pruned:
    """Copies of the ancestors of a trunk that have the trunk's modules, parameters and buffers only."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self._trunk = set(plan.trunk)
        self._direct = set(plan.direct)
        self._twins = plan.twins
        self._names: dict[int, str] = {}
        for name, module in model.named_modules():
            self._names.setdefault(id(module), name)
        self._wanted: set[str] = {""}
        for name in (*plan.trunk, *plan.direct):
            steps = name.split(".")
            self._wanted |= {".".join(steps[:count]) for count in range(len(steps) + 1)}
        self.pairs: list[tuple[nn.Module, nn.Module]] = []
        self.children: list[tuple[nn.Module, str, nn.Module]] = []
        self.root = self._copy(model, "")

    def _copy(self, module: nn.Module, path: str) -> nn.Module:
        cls: Any = original_class(type(module)) or type(module)
        other: nn.Module = object.__new__(cls)
        object.__setattr__(other, "__dict__", dict(vars(nn.Module())))
        mine = vars(other)
        mine["training"] = False
        for kind in ("_parameters", "_buffers"):
            mine[kind] = {
                name: value
                for name, value in vars(module)[kind].items()
                if (f"{path}.{name}" if path else name) in self._direct
            }
        if path:  # those of the model itself ran already, on the arguments that it was called with
            for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
                mine[name] = vars(module)[name]
        for name, child in vars(module)["_modules"].items():
            inner = f"{path}.{name}" if path else name
            if child is None:
                continue
            known = self._names[id(child)]
            if known in self._trunk or inner in self._wanted:
                self.children.append((module, name, child))
            if known in self._trunk:
                mine["_modules"][name] = self._twin(child) if known in self._twins else child
            elif inner == known and inner in self._wanted:
                mine["_modules"][name] = self._copy(child, inner)
        self.pairs.append((module, other))
        return other

    def _twin(self, module: nn.Module) -> nn.Module:
        """The same module in eval mode: elsewhere in the model it follows the model's own."""
        other: nn.Module = object.__new__(type(module))
        object.__setattr__(other, "__dict__", dict(vars(module)))
        mine = vars(other)
        mine["training"] = False
        mine["_modules"] = {}
        for name, child in vars(module)["_modules"].items():
            mine["_modules"][name] = None if child is None else self._twin(child)
            if child is not None:
                self.children.append((module, name, child))
        self.pairs.append((module, other))
        return other


class ProbedFindings(Findings):
    """A probe looked closer at the rows than a self-check does."""

    def passed(self, namespace: str, form: Form) -> TokenDims | None:
        """Whether rows of this form may be served."""
        known = super().passed(namespace, form)
        return () if known is None and self.blocked(form) is None else known


def probed_memo(name: str, options: Options, store: Store) -> Memo:
    """What the calls of the trunks of one model share."""
    memo = Memo(name, options, store, Findings if options.extractor.name == "tokens" else ProbedFindings)
    memo.shared.end()  # a number that is another one in each call makes too many kinds of calls, which is an error
    return memo


class _Seen(threading.local):
    state = UNDETERMINED


_unknown = itertools.count(UNDETERMINED - 1, -1)  # what is known of a trunk that cannot be named is known once


class TrunkAttached(Attached):
    """What hangs on a trunk.

    Args:
        requested: the options.
        memo: shared by all trunks of one model.
    """

    def __init__(self, requested: Requested, memo: Memo) -> None:
        super().__init__(memo.name, requested, store=memo.store)
        self.memo = memo
        self._seen = _Seen()

    @property
    def state(self) -> int:
        """The number of what the trunk was in the latest call of this thread."""
        return self._seen.state

    def refuse(self, module: nn.Module, grad: bool) -> Standing:
        """How the trunk stands.

        Raises:
            Bypass: a call of it would be run as if uncached.
            CutError: something in it is trained, which it would not be.
        """
        try:
            standing = super().refuse(module, grad)
        except BaseException as reason:
            self._seen.state = next(_unknown)
            if not isinstance(reason, Bypass) or reason.reason not in ("trainable parameters", "training mode"):
                raise
            if reason.reason == "trainable parameters":
                raise trainable(module, self.memo.name) from None
            for child in module.modules():  # somebody called train() on a part of the trunk
                child.training = False
            standing = super().refuse(module, grad)
        self._seen.state = standing.state
        return standing

    def _bind(self, original: type[nn.Module]) -> Any:
        return _by_keyword

    def _facts(self, module: nn.Module, name: str, known: Fingerprint, around: Context) -> dict[str, Any]:
        """What a manifest tells of a namespace: whose trunk it is, for all trunks are of one class."""
        assert isinstance(module, Trunk), f"{type(module).__name__} is no trunk"
        cls = type(module.model)
        where = {"class": f"{cls.__module__}.{cls.__qualname__}", "cut": module.at}
        return super()._facts(module, name, known, around) | where | ({"call": module.call} if module.call else {})


def _by_keyword(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    """The inputs of a trunk have the names and the order that they were given."""
    return Arguments(args, kwargs, tuple((name, name) for name in kwargs))


def trainable(module: nn.Module, name: str) -> CutError:
    """Something that feeds the cut requires grad; to be raised."""
    found = [path.removeprefix("model.") for path, value in module.named_parameters() if value.requires_grad]
    shown = ", ".join(found[:3]) or "a tensor that is no parameter"
    return CutError(
        f"{name}: {shown} feeds the cut and requires grad, but what feeds the cut is frozen and would not be trained. "
        "Call requires_grad_(False) on it, cut at an earlier submodule, or call uncached(model)."
    )
