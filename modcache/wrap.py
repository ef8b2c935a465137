"""Wrap a module or a class so that its forward is cached; ask, undo, see through."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import nn

from .attached import Attached
from .classes import (
    ATTACHED,
    attached_to,
    cached_class,
    class_before,
    decorated_class,
    hangs_on,
    is_decorated,
    original_class,
    undone_class,
)
from .errors import LayeredError, NotCachedError, UsageError, UsageTypeError
from .fingerprint import first_in_training
from .forwards import forward_of
from .freezing import (
    Before,
    freeze_module,
    freeze_replaced,
    frozen_around,
    frozen_within,
    handed_in,
    handed_over,
    parameters_of,
    thaw,
)
from .handle import Cache
from .requested import CacheOptions, Requested, check_names, requested_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["cache_of", "cached_module", "is_cached", "uncached"]

M = TypeVar("M", bound=nn.Module)


@overload
def cached_module(module: M, /, **options: Unpack[CacheOptions]) -> M: ...
@overload
def cached_module(module: type[M], /, **options: Unpack[CacheOptions]) -> type[M]: ...
@overload
def cached_module(module: None = None, /, **options: Unpack[CacheOptions]) -> Callable[[type[M]], type[M]]: ...
def cached_module(module: Any = None, /, **options: Any) -> Any:
    """Run a frozen module once per distinct row: the same module, whose forward serves rows that it computed before.

    >>> import torch
    >>> from modcache import cached_module, cache_of
    >>> encoder = cached_module(torch.nn.Linear(3, 2), freeze=True)
    >>> batch = torch.eye(3)
    >>> first, second = encoder(batch), encoder(batch)
    >>> torch.equal(first, second), cache_of(encoder).stats.hits
    (True, 3)

    An instance is converted in place and returned; it stays an instance of its class, with the same parameters,
    ``state_dict``, hooks and signature, and `uncached` undoes it. A class, decorated with or without parentheses, gives
    a subclass of the same name whose instances are cached.

    A hit is what the module as it is now would give for this row: weights, code, configuration and autocast are part
    of what is looked up, and a call that cannot be cached rightly is run as if uncached, with one `CacheWarning`. The
    one exception: a sparse write behind autograd's back (``p.data[5] = v``, through numpy) may be noticed late;
    ``cache_of(module).recheck()`` looks at all weights, ``verify=`` samples.

    Args:
        module: an ``nn.Module``, or a class of them.
        key: what names a row: ``None`` (by type), ``"text"``, ``"path"``, ``"tensor"``, ``"tokens"``, an extractor
            from `modcache.keys`, or a function of a row that returns a bool, int, float, str, bytes, None or a tuple
            of these. Arguments that an extractor does not read stay in the key.
        store: ``None`` for a `MemoryStore` of its own; the path of a cache directory, made absolute at once, for memory
            in front of a `DiskStore`; or a store, which may serve many modules.
        prepare: turns rows into inputs of the module, for the missing rows only: gets the arguments of the call with
            these rows; returns a tuple (positional), a mapping (keywords) or one argument.
        broadcast: names of arguments that are the same for all rows although their first size may be the batch's.
        per_row: ``False`` stores one record per call, for modules without a batch dimension.
        version: a text that is added to the namespace; it also stands for weights that cannot be read.
        freeze: switch off gradients of all parameters and keep the module in eval mode, also when a parent trains.
        verify: the share of hits that is recomputed and compared, from 0.0 to 1.0.

    A wrapped module takes one more keyword, ``cache_keys=``: one key per row, instead of a digest of the row.

    Returns:
        The module, the class, or with options alone a decorator.

    Raises:
        UsageTypeError: not a module, a ``ScriptModule``, or an option of a wrong type (a ``TypeError``).
        UsageError: an option that cannot be right, or a wrapped module wrapped again with other options (a
            ``ValueError``).
    """
    requested = requested_of(**options)
    if module is None:
        return lambda cls: _wrapped(cls, requested, options)
    return _wrapped(module, requested, options)


_module = inspect.Parameter("module", inspect.Parameter.POSITIONAL_ONLY, default=None)
_options = [one for one in inspect.signature(requested_of).parameters.values() if one.kind is one.KEYWORD_ONLY]
# Which options were given counts when a module is wrapped again, so it takes them as they come; help() shows them all.
cached_module.__signature__ = inspect.Signature([_module, *_options])  # type: ignore[attr-defined]


def _wrapped(module: Any, requested: Requested, asked: dict[str, Any]) -> Any:
    if isinstance(module, type):
        if not issubclass(module, nn.Module):
            raise UsageTypeError(
                f"cached_module(...) takes an nn.Module or a class of them; found the class {module!r}"
            )
        return _wrap_class(module, requested, asked)
    if not isinstance(module, nn.Module):
        raise UsageTypeError(f"cached_module(...) takes an nn.Module or a class of them; found {module!r}")
    if isinstance(module, torch.jit.ScriptModule):
        raise UsageTypeError(
            f"cached_module(...) cannot wrap a ScriptModule ({type(module).__name__}): its forward is compiled code. "
            "Wrap the module before it is scripted, or put it into a plain nn.Module."
        )
    if is_cached(module):
        return _wrapped_again(module, requested, asked)
    return _wrap_instance(module, requested)


def _wrap_instance(module: nn.Module, requested: Requested) -> nn.Module:
    cls = type(module)
    check_names(module.forward, requested)
    inside = module.__dict__.get("forward")  # compiled or hooked by accelerate: it goes inside
    attached = Attached(cls.__name__, requested, inside)
    try:
        made = class_before(cls) or cached_class(cls)
    except TypeError as error:  # an __init_subclass__ with arguments, a final class
        raise UsageTypeError(f"cached_module(...) cannot derive from {cls.__name__}: {error}") from None
    module.__dict__.pop("forward", None)
    object.__setattr__(module, "__class__", made)  # its own might refuse
    module.__dict__[ATTACHED] = attached
    _ready(module, attached)
    return module


def _wrap_class(cls: type[nn.Module], requested: Requested, asked: dict[str, Any]) -> type[nn.Module]:
    if is_cached(cls):
        if not asked:
            return cls
        raise UsageError(
            f"the class {cls.__name__} is cached already; give these options ({', '.join(asked)}) to its first "
            "cached_module(...), or call uncached(cls) first"
        )

    check_names(partial(forward_of(cls), None), requested)

    def attach(module: nn.Module) -> Attached:
        attached = Attached(cls.__name__, requested)
        module.__dict__[ATTACHED] = attached
        _ready(module, attached)
        if requested.freeze:
            attached.at_first = partial(freeze_replaced, before=parameters_of(module))
        return attached

    return decorated_class(cls, attach)


def _wrapped_again(module: nn.Module, requested: Requested, asked: dict[str, Any]) -> nn.Module:
    hung = attached_to(module)
    if not isinstance(hung, Attached):
        name = type(module).__name__
        raise UsageError(f"this {name} is recycled; call uncached(module) first to cache it as a whole")
    before = hung.requested
    differing = [name for name in asked if getattr(requested, name) != getattr(before, name)]
    if differing:
        found = ", ".join(f"{name}={getattr(before, name)!r}" for name in differing)
        wanted = ", ".join(f"{name}={getattr(requested, name)!r}" for name in differing)
        raise UsageError(
            f"this {type(module).__name__} is cached already, with {found}; asked for: {wanted}. "
            "Call uncached(module) first to wrap it anew."
        )
    return module


# --- freezing -------------------------------------------------------------------------------------------


def _ready(module: nn.Module, attached: Attached) -> None:
    """Freeze the module if that is asked for, else say what will keep it from being cached."""
    if attached.requested.freeze:
        attached.before = freeze_module(module)
        return
    trainable = next((name for name, value in module.named_parameters() if value.requires_grad), None)
    training = first_in_training(dict(module.named_modules()))
    if trainable is not None or training is not None:
        what = f"{trainable} is trainable" if trainable is not None else f"{training} is in training mode"
        attached.memo.say(
            "not frozen",
            f"{what}, so it would not be cached in training. Wrap it with freeze=True, or call "
            "requires_grad_(False) and eval() on it.",
        )


# --- ask, undo, see through -----------------------------------------------------------------------------


def is_cached(module: nn.Module | type[nn.Module]) -> bool:
    """Whether a module, or the instances of a class, are cached.

    >>> import torch
    >>> from modcache import cached_module, is_cached
    >>> layer = torch.nn.Linear(3, 2)
    >>> is_cached(layer), is_cached(cached_module(layer, freeze=True))
    (False, True)
    """
    cls = module if isinstance(module, type) else type(module)
    found = next((base for base in cls.__mro__ if original_class(base) is not None), None)
    return found is not None and class_before(found) is None and (isinstance(module, type) or hangs_on(module))


def uncached(module: M) -> M:
    """Undo `cached_module` or `recycle`, in place: the class, a forward that was patched, and what freezing changed.

    >>> import torch
    >>> from modcache import cached_module, uncached
    >>> layer = torch.nn.Linear(3, 2)
    >>> uncached(cached_module(layer, freeze=True)) is layer, type(layer) is torch.nn.Linear
    (True, True)
    >>> layer.weight.requires_grad
    True

    Args:
        module: a cached module, or a decorated class (then its plain class is returned).

    Raises:
        NotCachedError: it is not cached (a ``ValueError``).
        LayeredError: something was put on top of it since, which has to go first (a ``RuntimeError``).
    """
    _need_cached(module, "uncached")
    cls = module if isinstance(module, type) else type(module)
    original = original_class(cls)
    if original is None:
        raise LayeredError(
            f"uncached(...) cannot undo: {cls.__name__} was derived from the cached class since (a parametrization, a "
            "subclass); take that away first."
        )
    if isinstance(module, type):
        return original
    if "forward" in module.__dict__:
        raise LayeredError(
            f"uncached(...) cannot undo: a forward ({module.__dict__['forward']!r}) was patched onto this "
            f"{cls.__name__} since; take that away first."
        )
    hung = attached_to(module)
    object.__setattr__(module, "__class__", undone_class(cls) if is_decorated(cls) else original)
    del module.__dict__[ATTACHED]
    if not isinstance(hung, Attached):
        hung.undo(module)
        return module
    hung.memo.flush()  # whoever wraps it again, with the same directory, finds its rows
    if hung.inside is not None:
        module.__dict__["forward"] = hung.inside
    if hung.before is not None:
        _restore(module, hung.before)
    return module


def _restore(module: nn.Module, before: Before) -> None:
    """Put back what freezing changed; what is in two frozen cached modules is left to the other one."""
    for name, outer in frozen_around(module):
        around = outer.__dict__.get(ATTACHED)
        if isinstance(around, Attached) and around.before is not None:
            around.before = handed_over(around.before, before, name)
            return
    still = []
    for name, inner in frozen_within(module):
        within = inner.__dict__.get(ATTACHED)
        if isinstance(within, Attached) and within.before is not None:
            within.before = handed_in(within.before, before, name)
            still.append(name)
    thaw(module, before, but=still)


def cache_of(module: nn.Module) -> Cache:
    """See through a cached module: its statistics, its namespace, its store, and how to drop rows.

    >>> import torch
    >>> from modcache import cached_module, cache_of
    >>> encoder = cached_module(torch.nn.Linear(3, 2), freeze=True)
    >>> _ = encoder(torch.eye(3))
    >>> cache_of(encoder).stats.computed
    3

    Raises:
        NotCachedError: the module is not cached (a ``ValueError``).
    """
    _need_cached(module, "cache_of")
    if isinstance(module, type):
        raise UsageTypeError(f"cache_of(...) takes an instance; found the class {module.__name__}")
    hung = attached_to(module)
    return Cache(module, hung) if isinstance(hung, Attached) else hung.seen_through(module)


def _need_cached(module: object, verb: str) -> None:
    if not (issubclass(module, nn.Module) if isinstance(module, type) else isinstance(module, nn.Module)):
        raise UsageTypeError(f"{verb}(...) takes a cached module; found {module!r}")
    if not is_cached(module):  # type: ignore[arg-type]
        name = module.__name__ if isinstance(module, type) else type(module).__name__
        parts = () if isinstance(module, type) else module.named_modules()  # type: ignore[attr-defined]
        inside = [path for path, part in parts if is_cached(part)]
        instead = f"inside of it these are: {', '.join(inside[:3])}" if inside else "see cached_module(...)"
        raise NotCachedError(f"{verb}(...) takes a cached module, but this {name} is not cached; {instead}")
