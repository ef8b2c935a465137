"""Make the classes of cached modules: the user's own class, with a forward that asks the store first."""

from __future__ import annotations

import copyreg
import functools
import weakref
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import nn

from .attached import Attached
from .forwards import forward_of
from .freezing import freeze_copy
from .own_names import Behind, own_functions, says_its_name

__all__ = [
    "ATTACHED",
    "Made",
    "cached_class",
    "class_before",
    "decorated_class",
    "hangs_on",
    "is_decorated",
    "made_once",
    "noticed_apply",
    "original_class",
    "reduced_by",
    "undone_class",
]

ATTACHED = "_modcache"
"""Where a cached module keeps what hangs on it, in its ``__dict__``."""

Attach = Callable[[nn.Module], Attached]

Made = weakref.WeakKeyDictionary[type, weakref.ref[type]]
"""The classes that were made of others, as long as something is of them."""

_cached: Made = weakref.WeakKeyDictionary()
_undone: Made = weakref.WeakKeyDictionary()


def original_class(cls: type) -> type | None:
    """The user's class below a class made here, or ``None`` if it is not one of them."""
    found = cls.__dict__.get("_modcache_original")
    return found if isinstance(found, type) else None


def cached_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that an instance of ``cls`` takes on when it is wrapped in place."""
    return made_once(_cached, cls, lambda: {"__reduce_ex__": reduced_by(cls, cached_class, _new_cached)})


def made_once(known: Made, cls: type[nn.Module], body: Callable[[], dict[str, Any]]) -> type[nn.Module]:
    """The class that was made of ``cls`` before, or a new one with this body.

    Instances take it on; whoever calls it gets a ``cls``: ``type(module)(...)`` asks for a module that nobody has
    wrapped.
    """
    found = known.get(cls)
    made = None if found is None else found()
    if made is None:

        @functools.wraps(cls.__init__)
        def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - it is the class's own
            if type(self) is made:
                self.__class__ = cls
            cls.__init__(self, *args, **kwargs)

        made = subclass(cls, {"__init__": __init__, **body()})
        known[cls] = weakref.ref(made)
    return made


def decorated_class(cls: type[nn.Module], attach: Attach) -> type[nn.Module]:
    """The class that replaces a decorated one; ``attach`` readies each of its instances."""

    def attaching(init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - it is the class's own
            init(self, *args, **kwargs)
            # The outermost one only: within it, the instance is not yet complete.
            if type(self).__init__ is __init__ and ATTACHED not in self.__dict__:
                attach(self)

        return __init__

    def __init_subclass__(sub: Any, /, **kwargs: Any) -> None:  # noqa: N807 - it is the class's own
        super(made, sub).__init_subclass__(**kwargs)
        if "__init__" in sub.__dict__:
            sub.__init__ = attaching(sub.__init__)

    body = {"__init__": attaching(cls.__init__), "_modcache_attach": staticmethod(attach)}
    made = subclass(cls, body, *(_passed_over(cls) if says_its_name(cls) else ()))
    made.__init_subclass__ = classmethod(__init_subclass__)  # type: ignore[assignment]  # for the classes to come
    return made


def _passed_over(cls: type[nn.Module]) -> tuple[type[nn.Module], dict[str, object]]:
    """What a decorated class is to be derived from, and to have, so that its name in ``super(Name, self)`` is right.

    The methods of the user's class mean their own class by it. So the made class has them itself, and whoever asks
    for what is behind it comes to a class that passes over those of the user's.
    """
    own = own_functions(cls)
    return _derived(cls, {name: Behind(cls, name) for name in own}), own


def is_decorated(cls: type) -> bool:
    """Whether this is a class that was made in the place of a decorated one."""
    return "_modcache_attach" in vars(cls)


def undone_class(decorated: type[nn.Module]) -> type[nn.Module]:
    """The class of an instance of a decorated class that is cached no more.

    It is an instance of what goes by the name of its class still, and can be pickled by that name.
    """

    def body() -> dict[str, Any]:
        cls: Any = original_class(decorated)
        return {
            "forward": forward_of(cls),
            "train": cls.train,
            "_apply": cls._apply,
            "__reduce_ex__": reduced_by(decorated, undone_class, _new_undone),
            "_modcache_original": cls,
            "_modcache_before": decorated,
        }

    return made_once(_undone, decorated, body)


def class_before(cls: type) -> type[nn.Module] | None:
    """The decorated class of which a class is the undone one, if it is one."""
    found: type[nn.Module] | None = vars(cls).get("_modcache_before")
    return found


def subclass(
    cls: type[nn.Module],
    more: dict[str, Any],
    above: type[nn.Module] | None = None,
    own: Mapping[str, object] = MappingProxyType({}),
) -> type[nn.Module]:
    """A subclass that cannot be told from ``cls`` by name, module, documentation or signature.

    Args:
        cls: the user's class.
        more: what it has beside what the class of every cached module has, or in the place of that.
        above: what it is derived from, if not from ``cls`` directly.
        own: what it has of ``cls`` itself, where nothing else is in that place.
    """
    body = {
        **own,
        "__doc__": cls.__doc__,
        "_modcache_original": cls,
        "forward": _forward(cls),
        "train": _train(cls),
        "_apply": noticed_apply(cls),
        "__setstate__": _setstate(cls),
        **more,
    }
    if issubclass(cls, torch.fx.GraphModule):
        body["recompile"] = _recompile(cls)
    if (become := getattr(cls, "cls_to_become", None)) is not None:
        body["cls_to_become"] = cached_class(become)  # a lazy module stays wrapped when it materialises
    return _derived(above or cls, body)


def _derived(cls: type[nn.Module], body: Mapping[str, object]) -> type[nn.Module]:
    """A class of the same name, module and metaclass, of which no class of the user's hears."""
    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, **body}
    made: type[nn.Module] = type(cls)(cls.__name__, (_quiet(cls), cls), named)  # type: ignore[misc]
    made.__bases__ = (cls,)
    return made


class _Quiet:
    """Stands first while a class is made, so that no ``__init_subclass__`` of the user's hears of it."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register nothing."""


def _quiet(cls: type) -> type:
    """`_Quiet` in the layout of a class, which grows from another base where one without attributes comes first."""
    while cls.__base__ is not None and cls.__base__.__dictoffset__:
        cls = cls.__base__
    if cls.__base__ in (object, None):
        return _Quiet
    body = {**vars(_Quiet), "__orig_bases__": ()}  # Generic asks what it was given
    del body["__dict__"], body["__weakref__"]
    made: type = type(cls.__base__)("_Quiet", (cls.__base__,), body)
    return made


def _forward(cls: type[nn.Module]) -> Callable[..., Any]:
    @functools.wraps(forward_of(cls))
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            if _is_exporting():
                kwargs.pop("cache_keys", None)
                return forward_of(cls)(self, *args, **kwargs)
            return _outside_the_graph(self, cls, args, kwargs)
        attached: Any = self.__dict__.get(ATTACHED)
        return _eagerly(self, cls, args, kwargs) if attached is None else attached.forward(self, cls, args, kwargs)

    return forward


def _is_exporting() -> bool:
    """What `torch.compiler.is_exporting` says, which dynamo of torch 2.8 takes for true in any graph."""
    return torch.compiler._is_exporting_flag


def _outside_the_graph(module: nn.Module, cls: type[nn.Module], args: Any, kwargs: Any) -> Any:
    """A clean graph break: what is looked up in a store is no part of a compiled graph."""
    return torch.compiler.disable(_eagerly)(module, cls, args, kwargs)  # type: ignore[no-untyped-call]


# Dynamo ends the graph before a function with this mark. (`torch.compiler.disable` sets it as well, but it imports
# dynamo, which takes a second; here that happens only once dynamo is at work.)
_outside_the_graph._torchdynamo_disable = True  # type: ignore[attr-defined]


def _eagerly(module: nn.Module, cls: type[nn.Module], args: Any, kwargs: Any) -> Any:
    if not hangs_on(module):
        return forward_of(cls)(module, *args, **kwargs)
    attached: Any = attached_to(module)
    return attached.forward(module, cls, args, kwargs)


class Hung(Protocol):
    """What hangs on a module that is cached in another way than as a whole."""

    def undo(self, module: nn.Module) -> None:
        """Put back what it changed about the module."""

    def seen_through(self, module: nn.Module) -> Any:
        """What `cache_of` gives."""


def hangs_on(module: nn.Module) -> bool:
    """Whether something hangs on a module of a class made here, or will: not if it is derived of ``type(cached)``."""
    return ATTACHED in module.__dict__ or hasattr(type(module), "_modcache_attach")


def attached_to(module: nn.Module) -> Attached | Hung:
    """What hangs on a cached module; an instance of a decorated class that bypassed ``__init__`` gets it now."""
    found = module.__dict__.get(ATTACHED)
    if found is None:
        found = type(module)._modcache_attach(module)  # type: ignore[attr-defined]
    hung: Attached | Hung = found
    return hung


def _train(cls: type[nn.Module]) -> Callable[..., Any]:
    @functools.wraps(cls.train)
    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        found = self.__dict__.get(ATTACHED)
        frozen = found is not None and found.requested.freeze
        return cls.train(self, mode and not frozen)

    return train


def _setstate(cls: type[nn.Module]) -> Callable[..., None]:
    @functools.wraps(cls.__setstate__)
    def __setstate__(self: nn.Module, state: Any) -> None:  # noqa: N807 - it is the class's own
        cls.__setstate__(self, state)  # type: ignore[no-untyped-call]
        found = self.__dict__.get(ATTACHED)
        if isinstance(found, Attached) and found.requested.freeze and not self.training:
            freeze_copy(self)

    return __setstate__


def noticed_apply(cls: type[nn.Module]) -> Callable[..., Any]:
    """The class's ``_apply``, which moves or casts a module, noticed by what hangs on the module."""

    @functools.wraps(cls._apply)
    def apply(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if (found := self.__dict__.get(ATTACHED)) is not None:
            found.moved()  # or the old weights would stay in memory until the next call
        return cls._apply(self, *args, **kwargs)  # type: ignore[no-any-return, no-untyped-call]

    return apply


def _recompile(cls: type[torch.fx.GraphModule]) -> Callable[..., Any]:
    @functools.wraps(cls.recompile)
    def recompile(self: torch.fx.GraphModule) -> Any:
        made = type(self)
        self.__class__ = cls  # it writes the new forward onto the class of the module
        try:
            return cls.recompile(self)
        finally:
            self.__class__ = made
            if (found := self.__dict__.get(ATTACHED)) is not None:
                found.moved()

    return recompile


# --- pickling -------------------------------------------------------------------------------------------


def reduced_by(
    cls: type[nn.Module], again: Callable[[type[nn.Module]], type[nn.Module]], new: Callable[..., nn.Module]
) -> Callable[..., Any]:
    """A ``__reduce_ex__`` for a class made of ``cls``, which cannot be found by its name.

    Args:
        cls: the user's class.
        again: makes the class of the user's.
        new: makes an instance of it from the user's class and the arguments of its ``__new__``.
    """

    def __reduce_ex__(self: nn.Module, protocol: int) -> Any:  # noqa: N807 - it is the class's own
        reduced = cls.__reduce_ex__(self, protocol)
        if type(self) is not again(cls) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced  # the class has its own way
        return new, (cls, *reduced[1][1:]), *reduced[2:]

    return __reduce_ex__


def _new_cached(cls: type[nn.Module], *args: Any) -> nn.Module:
    made = cached_class(cls)
    return made.__new__(made, *args)


def _new_undone(decorated: type[nn.Module], *args: Any) -> nn.Module:
    made = undone_class(decorated)
    return made.__new__(made, *args)
