"""Read functions and classes into bytes, and follow the global names that they read."""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
from typing import TYPE_CHECKING, Any

from torch import nn

from ..digest import digest, encode, frame
from .code import code_bytes, installed, installed_class, module_name, names_in, of_library, place_of
from .memoized import memoized
from .patched import FUNCTIONAL, patched_functions
from .values import IMMUTABLE, ValueReader

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .seen import Seen

_NO_CONTENT_IN_CLASS = frozenset(
    """__dict__ __weakref__ __doc__ __module__ __qualname__ __annotations__ __annotate__ __annotate_func__
    __annotations_cache__ __firstlineno__ __static_attributes__ __abstractmethods__ _abc_impl __parameters__
    __orig_bases__ __slotnames__ __dataclass_fields__ __dataclass_params__ __match_args__
    _modcache_original""".split()
)
_CALLED_BY_TORCH = ("forward", "__call__", "__getattr__", "__getattribute__", "__torch_function__")
_MOST_REPLACED = "scaled_dot_product_attention"
# What is wrapped is in the closure.
_BESIDE_CODE = frozenset({"__wrapped__", "_torchdynamo_wrapper_id", "_torchdynamo_orig_callable"})
_DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType, types.WrapperDescriptorType)


class Reader(ValueReader):
    """Reads values like its base, and code: functions by what they do, classes by what they define.

    What code reads by a global name becomes a part of its own, read from a queue: each thing once, in no
    particular order, however deep the way to it was.
    """

    def __init__(self, *known: Any) -> None:
        super().__init__(*known)
        self._reached: set[int] = set()
        self._queue: list[tuple[str, object]] = []
        self._following = True  # else a class is read, whose functions are only gathered
        self._aside = False
        self._met: list[types.FunctionType] = []
        self._called: set[str] = set(_CALLED_BY_TORCH)
        self._waiting: dict[str, list[types.FunctionType]] = {}

    def callable(self, value: object, path: str) -> bytes | None:
        """The bytes of anything that is code; None for other values."""
        if isinstance(value, types.FunctionType):
            return self.function(value, path)
        if isinstance(value, types.MethodType):
            return frame(b"method", self.value(value.__func__, path) + self.value(value.__self__, f"{path}.__self__"))
        if isinstance(value, functools.partial):
            inside = (value.func, value.args, dict(value.keywords))
            return frame(b"partial", b"".join(self.value(item, path) for item in inside))
        if isinstance(value, functools.partialmethod):
            inside = (value.func, value.args, dict(value.keywords))
            return frame(b"partialmethod", b"".join(self.value(item, path) for item in inside))
        if isinstance(value, staticmethod | classmethod):
            return frame(type(value).__name__.encode(), self.value(value.__func__, path))
        if isinstance(value, property):
            return frame(b"property", b"".join(self.value(part, path) for part in (value.fget, value.fset)))
        if isinstance(value, functools.cached_property):
            return frame(b"cached_property", self.value(value.func, path))
        if isinstance(value, types.BuiltinFunctionType | types.MethodDescriptorType):
            bound = getattr(value, "__self__", None)  # the module builtins, or what a method is of
            said = encode(f"{getattr(value, '__module__', None)}.{value.__qualname__}")
            return frame(b"builtin", said + self.value(bound, f"{path}.__self__"))
        if isinstance(value, _DESCRIPTORS):
            return frame(b"descriptor", encode(value.__name__))
        wrapped = getattr(value, "__wrapped__", None)  # functools.lru_cache and its like
        if isinstance(wrapped, types.FunctionType) and of_library(type(value).__module__):
            return frame(b"wrapped", encode(place_of(type(value))) + self.value(wrapped, path))
        return None

    def function(self, fn: types.FunctionType, path: str) -> bytes:
        """A function by its code, defaults and closure; the global names it reads are followed."""
        checked = _checked_by_beartype(fn)
        if checked is not None:
            return frame(b"checked", self.function(checked, path))
        closure = zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
        used = names_in(fn.__code__).used
        inside = b"".join(
            self._cell(cell, f"{path} variable {name}", used) for name, cell in closure if name != "__class__"
        )
        if of_library(fn.__module__) and _goes_by_name(fn):
            return frame(b"named", encode(f"{fn.__module__}.{fn.__qualname__}") + inside)
        self.seen.functions[id(fn)] = fn
        extra = {name: item for name, item in vars(fn).items() if name not in _BESIDE_CODE}
        if extra:
            self.seen.mappings[id(vars(fn))] = vars(fn)
        given = b"".join(self.value(item, f"{path} default") for item in (fn.__defaults__, fn.__kwdefaults__))
        content = code_bytes(fn.__code__) + given + inside + self.fields(extra, path)
        return frame(b"function", content + self._globals(fn))

    def _cell(self, cell: types.CellType, path: str, used: tuple[str, ...]) -> bytes:
        try:
            content = cell.cell_contents
        except ValueError:  # not filled yet
            return frame(b"empty", b"")
        if path not in self._bookkeeping:
            self.seen.cells[id(cell)] = cell, content
        if isinstance(content, types.ModuleType):
            return self.field(content, "", path) + self._inside(content, used, set())
        return self.field(content, "", path)

    def python_module(self, module: types.ModuleType) -> bytes:
        """A Python module that something refers to: all of it that is the user's own."""
        inner = vars(module)
        if of_library(module.__name__) or installed(inner):
            return super().python_module(module)
        names = sorted(name for name, value in inner.items() if not isinstance(value, types.ModuleType))
        own = [self._global(inner, name, ()) for name in names if not name.startswith("__")]
        return super().python_module(module) + b"".join(own)

    def _globals(self, fn: types.FunctionType) -> bytes:
        """Follow the global names of a function; its own bytes only say what they are bound to by name."""
        namespace = fn.__globals__
        if of_library(namespace.get("__name__")):
            return b""
        if not self._following:
            self._met.append(fn)
            return b""
        names = names_in(fn.__code__)
        if not self._aside:
            self._call(names.used)
        elif installed(namespace):
            return b""
        found = [self._global(namespace, name, names.used) for name in names.read if name in namespace]
        if names.imported and not installed(namespace):
            found += self._imported(namespace.get("__package__"), names.imported, names.used)
        return b"".join(found)

    def _imported(self, package: object, written: Iterable[str], known: tuple[str, ...]) -> Iterable[bytes]:
        """What a function imports when it runs; how many dots stand before a name is not looked at."""
        for name in written:
            for full in _places_of_module(name, package):
                module = sys.modules.get(full)
                if module is not None:
                    inside = self._inside(module, known, set())
                    yield encode(full) + inside if inside else b""
                elif not of_library(full):
                    self.seen.absent[full] = None

    def _global(self, namespace: dict[str, Any], name: str, known: tuple[str, ...]) -> bytes:
        value = namespace[name]
        if isinstance(value, types.ModuleType):
            return self._python_module(namespace, name, known)
        # From installed code only functions and plain constants are followed: its registries and caches are
        # legion, and differ from process to process without a meaning.
        ours = not installed(namespace)
        if isinstance(value, types.FunctionType | type | functools._lru_cache_wrapper):
            target = place_of(value)  # type: ignore[arg-type]  # of the three, lru_cache copies what a function has
            self.seen.refer(namespace, name, value)
            if not of_library(value.__module__) and (not isinstance(value, type) or ours):
                self._reach(f"code of {target}", value)
            return encode((name, target))
        place = f"global {module_name(namespace.get('__name__'))}.{name}"
        if (ours or _plain(value)) and place not in self._bookkeeping:
            self.seen.refer(namespace, name, value)
            self._reach(place, value)
        elif self._bookkeeping.get(place) is not None:
            self.seen.reach(place, digest(self.field(None, "", place)))
        return encode(name)

    def _python_module(self, namespace: dict[str, Any], name: str, known: tuple[str, ...]) -> bytes:
        """A Python module by name; what the code may read of it is followed."""
        module: types.ModuleType = namespace[name]
        self.seen.refer(namespace, name, module)
        return encode((name, module_name(module.__name__))) + self._inside(module, known, set())

    def _inside(self, module: types.ModuleType, known: tuple[str, ...], done: set[int]) -> bytes:
        """The names in a Python module that code may read as attributes of it, modules within it included."""
        inner, found = vars(module), []
        if id(inner) in done:
            return b""
        done.add(id(inner))
        for name in known:
            value = inner.get(name)
            if isinstance(value, types.ModuleType):
                refer = self.seen.refer_to_library if of_library(module.__name__) else self.seen.refer
                refer(inner, name, value)
                found.append(self._inside(value, known, done))
            elif name in inner and of_library(module.__name__):
                found.append(self._library_name(inner, name))
            elif name in inner:
                found.append(self._global(inner, name, ()))
        return b"".join(found)

    def _library_name(self, inner: dict[str, Any], name: str) -> bytes:
        """A function of a library counts by its name alone, unless somebody put something else in its place."""
        value = inner[name]
        if not callable(value):
            return b""
        self.seen.refer_to_library(inner, name, value)
        if of_library(getattr(value, "__module__", None)) and not isinstance(value, functools.partial):
            return b""
        return self._replaced(f"{inner.get('__name__')}.{name}", value)

    def _replaced(self, place: str, value: object) -> bytes:
        self._reach(f"in the place of {place}", value)
        return encode((place, str(getattr(value, "__module__", "")), str(getattr(value, "__qualname__", ""))))

    def functional(self) -> bytes:
        """What somebody put into `torch.nn.functional`; mostly nothing."""
        return b"".join(self._replaced(name, value) for name, value in sorted(patched_functions().items()))

    def _reach(self, name: str, value: object) -> None:
        # Read later, from a queue: how deep the way to it was must not count, and recursion has a limit.
        if id(value) not in self._reached or isinstance(value, IMMUTABLE):
            self._reached.add(id(value))
            self._queue.append((name, value))

    def class_reference(self, cls: type) -> bytes:
        """A class by name; what it defines, where it is not a library's, is a part of its own."""
        if not installed_class(cls):
            metaclass: type = type(cls)
            for base in (*cls.__mro__, *metaclass.__mro__):
                self._reach_class(base)
        return frame(b"class", encode(place_of(cls)))

    def class_chain(self, cls: type) -> bytes:
        """The names of a class and its bases; the code of each that is not a library's is followed."""
        for base in cls.__mro__:
            self._reach_class(base)
        names = frame(b"classes", encode([place_of(base) for base in cls.__mro__]))
        patched = [base for base in cls.__mro__ if of_library(base.__module__) and _forward_is_foreign(base)]
        if installed_class(cls) and not of_library(cls.__module__):  # it may be called by way of a registry
            self.seen.refer_to_library(FUNCTIONAL, _MOST_REPLACED, FUNCTIONAL[_MOST_REPLACED])
        for base in cls.__mro__:
            for name in _functions_of_layer(base) if base.__module__.startswith("torch.nn.") else ():
                self.seen.refer_to_library(FUNCTIONAL, name, FUNCTIONAL.get(name))
        return names + b"".join(self.value(vars(base)["forward"], f"{place_of(base)}.forward") for base in patched)

    def _reach_class(self, cls: type) -> None:
        if not of_library(cls.__module__) and id(cls) not in self.seen.classes:
            self.seen.classes[id(cls)] = cls
            self._queue.append((f"code of {place_of(cls)}", _Members(cls)))

    def _members(self, cls: type) -> bytes:
        """Everything that a class body defines, in the order of its names."""
        names = sorted(vars(cls).keys() - _NO_CONTENT_IN_CLASS - memoized(cls))
        kept = tuple(name for name in names if f"{place_of(cls)}.{name}" not in self._bookkeeping)
        if len(kept) < len(names):
            self.seen.busy[cls] = kept
        self._following = False
        try:
            return b"".join(self._member(cls, name) for name in names)
        finally:
            self._following = True

    def _member(self, cls: type, name: str) -> bytes:
        """One member of a class.

        Methods are many (building, downloading, saving), and what installed code reads of its environment for them
        differs from process to process. So the global names of a method are followed only once something calls it.
        """
        self._met = []
        content = self.field(vars(cls)[name], name, f"{place_of(cls)}.{name}")
        self._waiting.setdefault(name, []).extend(self._met)
        if name in self._called:
            self._call_now(name)
        return content

    def _call(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._called:
                self._called.add(name)
                self._call_now(name)

    def _call_now(self, name: str) -> None:
        for fn in self._waiting.pop(name, ()):
            self._queue.append((f"names in {place_of(fn)}", _NamesIn(fn)))

    def look_aside(self) -> bool:
        """Go on with methods of the user's own that nothing calls by its name; whether there are any.

        A forward may reach them in another way, so all of the user's own code that they lead to counts, but no
        installed code: mostly they build the module, and what came of it is there to be read.
        """
        rest = [fn for waiting in self._waiting.values() for fn in waiting if not installed(fn.__globals__)]
        self._waiting.clear()
        self._aside = True
        self._queue += [(f"names in {place_of(fn)}", _NamesIn(fn)) for fn in rest]
        return bool(rest)

    def finish(self) -> Seen:
        """Read what was reached by name, until nothing new is reached."""
        while self._queue:
            name, value = self._queue.pop()
            self._objects = 0
            if isinstance(value, _Members):
                read = self._members(value.cls)
            elif isinstance(value, _NamesIn):
                read = self._globals(value.fn)
            else:
                read = self.field(value, "", name)
            self.seen.reach(name, digest(read))
        return self.seen


@dataclasses.dataclass(frozen=True, slots=True)
class _Members:
    """In the queue: a class of which the members are to be read, not only the name."""

    cls: type


@dataclasses.dataclass(frozen=True, slots=True)
class _NamesIn:
    """In the queue: a method of an installed class of which the global names are to be followed."""

    fn: types.FunctionType


def _checked_by_beartype(fn: types.FunctionType) -> types.FunctionType | None:
    """The function around which beartype put a check of types, if it did.

    The check refuses arguments and does nothing else. Its code is made anew in each process, with addresses in it.
    """
    inner = vars(fn).get("__wrapped__")
    made = fn.__code__.co_filename.startswith("<@beartype(")
    return inner if made and isinstance(inner, types.FunctionType) else None


def _goes_by_name(fn: types.FunctionType) -> bool:
    """Whether the name of a library's function leads to it: not that of a lambda, nor of one made by ``exec``."""
    found: object = sys.modules.get(fn.__module__)
    for name in fn.__qualname__.split("."):
        found = getattr(found, name, None)
    return getattr(found, "__code__", None) is fn.__code__


def _places_of_module(name: str, package: object) -> tuple[str, ...]:
    """The full names that a module may have that is written so in a package, from the nearest on."""
    parts = package.split(".") if isinstance(package, str) and package else []
    heads = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    relative = [f"{head}.{name}" if name else head for head in heads]
    return (*relative, name) if name else tuple(relative)


@functools.lru_cache(maxsize=512)
def _functions_of_layer(cls: type) -> tuple[str, ...]:
    """The names in `torch.nn.functional` that the methods of a class of torch use; of no other: it is held for good."""
    if cls is nn.Module:
        return ()
    methods = [value for value in vars(cls).values() if isinstance(value, types.FunctionType)]
    used = {name for method in methods for name in names_in(method.__code__).used}
    return tuple(sorted(name for name in used if callable(FUNCTIONAL.get(name))))


def _forward_is_foreign(cls: type) -> bool:
    """Whether somebody put another forward into a class of torch."""
    forward = vars(cls).get("forward")
    if forward is None or (isinstance(forward, types.FunctionType) and forward.__module__ == cls.__module__):
        return False
    return not of_library(getattr(forward, "__module__", None))


def _plain(value: object) -> bool:
    if isinstance(value, tuple | frozenset):
        return all(map(_plain, value))
    return isinstance(value, IMMUTABLE)
