"""Turn Python code objects into bytes: what they do, not where they stand."""

from __future__ import annotations

import dis
import functools
import sys
import types
from typing import TYPE_CHECKING, NamedTuple

from ..digest import encode, frame

if TYPE_CHECKING:
    from collections.abc import Mapping

_LOADS_GLOBAL = frozenset(dis.opmap[name] for name in ("LOAD_GLOBAL", "LOAD_NAME") if name in dis.opmap)
_LOAD_GLOBAL = dis.opmap["LOAD_GLOBAL"]
_LOADS_CONSTANT = frozenset(dis.hasconst)
_IMPORT_NAME, _STORE_ATTR = dis.opmap["IMPORT_NAME"], dis.opmap["STORE_ATTR"]
# Since 3.11 the lowest bit of LOAD_GLOBAL's argument says whether a NULL is pushed before the value.
_GLOBAL_SHIFT = 1 if sys.version_info >= (3, 11) else 0


@functools.lru_cache(maxsize=4096)
def _bytes_of(identity: _Exactly) -> bytes:
    return _read(identity.code)


class _Exactly:
    """A code object compared by identity: by ``==``, those of ``x + 1`` and ``x + True`` could agree."""

    __slots__ = ("code",)

    def __init__(self, code: types.CodeType) -> None:
        self.code = code

    def __hash__(self) -> int:
        return id(self.code)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Exactly) and self.code is other.code


def code_bytes(code: types.CodeType) -> bytes:
    """The framed bytes of what a code object does: bytecode, constants, the names it uses, its calling form.

    File names, line numbers, docstrings and the names of local variables do not count; the names of arguments do,
    because they are how it is called.
    """
    return _bytes_of(_Exactly(code))


def _read(code: types.CodeType) -> bytes:
    arguments = code.co_argcount + code.co_kwonlyargcount
    arguments += bool(code.co_flags & 4) + bool(code.co_flags & 8)  # *args, **kwargs
    form = (
        code.co_argcount,
        code.co_posonlyargcount,
        code.co_kwonlyargcount,
        code.co_flags & _FLAGS_OF_CALLS,
        code.co_varnames[:arguments],
        len(code.co_freevars),
        len(code.co_cellvars),
        code.co_names,
        getattr(code, "co_exceptiontable", b""),
    )
    return frame(b"code", frame(b"B", code.co_code) + encode(form) + encode(_constants(code), _nested))


_FLAGS_OF_CALLS = 0x3FF  # the others say what was imported from __future__, or that there is a docstring
_HAS_DOCSTRING = next((flag for flag, name in dis.COMPILER_FLAG_NAMES.items() if name == "HAS_DOCSTRING"), 0)


def _constants(code: types.CodeType) -> tuple[object, ...]:
    """The constants of a code object, without a docstring that it does not load like any other."""
    found = code.co_consts
    documented = code.co_flags & _HAS_DOCSTRING if _HAS_DOCSTRING else not code.co_name.startswith("<")
    if not (documented and found and isinstance(found[0], str)):
        return found
    raw = code.co_code
    loaded = any(raw[at] in _LOADS_CONSTANT and raw[at + 1] == 0 for at in range(0, len(raw), 2))
    return found if loaded else (None, *found[1:])


def _nested(value: object) -> bytes | None:
    return code_bytes(value) if isinstance(value, types.CodeType) else None


class Names(NamedTuple):
    """The names in a code object and in those nested in it.

    Args:
        read: the global names that it reads.
        used: all names that it uses, those of attributes too.
        imported: the modules that it imports when it runs, as they are written there.
        stored: the attributes that it sets.
    """

    read: tuple[str, ...]
    used: tuple[str, ...]
    imported: tuple[str, ...]
    stored: tuple[str, ...]


@functools.lru_cache(maxsize=4096)
def _names_of(identity: _Exactly) -> Names:
    code = identity.code
    read: dict[str, None] = {}
    imported: dict[str, None] = {}
    stored: dict[str, None] = {}
    known: dict[str, None] = dict.fromkeys(code.co_names)
    extended = 0
    raw = code.co_code
    for at in range(0, len(raw), 2):
        op, argument = raw[at], raw[at + 1] | extended
        extended = argument << 8 if op == dis.EXTENDED_ARG else 0
        if op in _LOADS_GLOBAL:
            read[code.co_names[argument >> (_GLOBAL_SHIFT if op == _LOAD_GLOBAL else 0)]] = None
        elif op == _IMPORT_NAME:
            imported[code.co_names[argument]] = None
        elif op == _STORE_ATTR:
            stored[code.co_names[argument]] = None
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            within = _names_of(_Exactly(inner))
            read.update(dict.fromkeys(within.read))
            known.update(dict.fromkeys(within.used))
            imported.update(dict.fromkeys(within.imported))
            stored.update(dict.fromkeys(within.stored))
    return Names(tuple(read), tuple(known), tuple(imported), tuple(stored))


def names_in(code: types.CodeType) -> Names:
    """The names that a code object uses to reach what lies outside of it."""
    return _names_of(_Exactly(code))


# The standard library's, torch's, numpy's; and beartype's, which refuses arguments and changes none.
_LIBRARIES = frozenset(
    {"torch", "torchgen", "functorch", "triton", "numpy", "beartype", "modcache", *sys.stdlib_module_names}
)


def of_library(module_name: object) -> bool:
    """Whether a Python module is one of those that are known by name, and not followed."""
    top = module_name.partition(".")[0] if isinstance(module_name, str) else "builtins"
    return top in _LIBRARIES and module_name != "__main__"


def installed(namespace: Mapping[str, object]) -> bool:
    """Whether the namespace of a Python module is that of an installed package, not the user's own code."""
    path = namespace.get("__file__")
    return isinstance(path, str) and ("site-packages" in path or "dist-packages" in path)


def installed_class(cls: type) -> bool:
    """Whether a class comes from installed code."""
    module = sys.modules.get(cls.__module__)
    return of_library(cls.__module__) or (module is not None and installed(vars(module)))


def module_name(name: object) -> str:
    """The name of a Python module, without the folder of a model that transformers puts into that of its own code.

    >>> module_name("transformers_modules.some_folder.a1b2c3.modeling_own")
    'transformers_modules.modeling_own'
    """
    head, _, rest = str(name).partition(".")
    return f"{head}.{rest.rpartition('.')[2]}" if head == "transformers_modules" else str(name)


def place_of(code: type | types.FunctionType) -> str:
    """The full name of a class or function."""
    return f"{module_name(code.__module__)}.{code.__qualname__}"
