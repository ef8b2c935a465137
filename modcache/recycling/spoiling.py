"""Put other values where skipped modules keep theirs: what comes after the cut and reads them gives itself away."""

from __future__ import annotations

import contextlib
import dis
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import CutError

__all__ = ["Kept", "kept_by", "refuse_kept", "spoiled"]

_PLAIN = (bool, int, float, str)
_INNER = frozenset(vars(nn.Module()))


class _Uses(NamedTuple):
    """What the functions that a forward may call do with names.

    Args:
        attributes: those that are set on any object.
        stored: global names that are set, with the function.
        loaded: global names that are read, with the function.
        items: whether items of anything are set.
    """

    attributes: frozenset[str]
    stored: tuple[tuple[types.FunctionType, str], ...]
    loaded: tuple[tuple[types.FunctionType, str], ...]
    items: bool


def refuse_kept(model: nn.Module, at: str, skipped: Iterable[str], differs: Callable[[], str | None]) -> None:
    """Does what comes after the cut read plain values that skipped modules set, and that may be those of others?

    In the few rows of a probe a flag, a text or a size may have come out the same each time.

    Args:
        model: the model.
        at: the name of the cut.
        skipped: the names of the modules that do not run when it is resumed.
        differs: resumes it; in what that gives something else than the whole model.

    Raises:
        CutError: it does.
    """
    inner = {
        id(module): (path, module)
        for name in sorted(skipped)
        for path, module in model.get_submodule(name).named_modules(prefix=name)
    }
    places = kept_by(inner.values(), [module for module in model.modules() if id(module) not in inner])
    for gone in (True, False) if places else ():
        with spoiled(places, gone=gone):
            found = differs()
        if found is not None:
            names = ", ".join(sorted({place.name for place in places})[:3])
            raise CutError(
                f"{at}: a module before the cut keeps a number, a flag or a text where others read it ({names}); on a "
                f"resumed call it does not run, and that would be of another batch ({found}). Cut at an earlier "
                "submodule, or return it."
            )


class Kept(NamedTuple):
    """A plain value that the forward of a module may set.

    Args:
        holder: the attributes of an object, the globals of a function, a mapping or a list.
        key: its place there.
        name: tells where that is.
    """

    holder: Any
    key: Any
    name: str


def kept_by(skipped: Iterable[tuple[str, nn.Module]], others: Iterable[nn.Module]) -> list[Kept]:
    """Where the forwards of some modules may put numbers, flags and texts.

    Args:
        skipped: these modules, by name.
        others: all that run nevertheless; of globals, only those count that their code reads.
    """
    found: dict[tuple[int, Any], Kept] = {}
    modules = list(skipped)
    reading, writing = {type(module) for module in others}, {type(module) for _, module in modules}
    by_class = {cls: _uses(cls) for cls in reading | writing}
    read = {(id(function.__globals__), name) for cls in reading for function, name in by_class[cls].loaded}
    for path, module in modules:
        uses = by_class[type(module)]
        for name, value in vars(module).items():
            if name in _INNER or isinstance(value, nn.Module | torch.Tensor | type):
                continue
            where = f"the attribute {name} of {path}"
            if name in uses.attributes:
                _note(found, vars(module), [name], where)
            if uses.items and type(value) in (dict, list):
                _note(found, value, _keys(value), where)
            elif isinstance(held := getattr(value, "__dict__", None), dict):
                _note(found, held, uses.attributes & held.keys(), where)
        for function, name in (*uses.stored, *uses.loaded):
            space = function.__globals__
            if (id(space), name) not in read or name not in space:
                continue
            if (function, name) in uses.stored:
                _note(found, space, [name], f"the global {name}, which {path} sets")
            elif uses.items and type(space[name]) in (dict, list):
                _note(found, space[name], _keys(space[name]), f"the global {name}, which {path} may change")
    return list(found.values())


@contextlib.contextmanager
def spoiled(places: Iterable[Kept], *, gone: bool) -> Iterator[None]:
    """Have other values there for a while, or none where there can be none."""
    before = [(kept, kept.holder[kept.key]) for kept in places]
    orders = [(holder, list(holder)) for holder in {id(kept.holder): kept.holder for kept, _ in before}.values()]
    try:
        for kept, value in before:
            if gone and isinstance(kept.holder, dict):
                del kept.holder[kept.key]
            else:
                kept.holder[kept.key] = _other(value)
        yield
    finally:
        for kept, value in before:
            kept.holder[kept.key] = value
        for holder, order in orders:
            if isinstance(holder, dict) and list(holder) != order:
                for key in order:
                    holder[key] = holder.pop(key)


def _keys(value: Any) -> Iterable[Any]:
    return list(value) if isinstance(value, dict) else range(len(value))


def _note(found: dict[tuple[int, Any], Kept], holder: Any, keys: Iterable[Any], name: str) -> None:
    for key in keys:
        value = holder[key]
        if _other(value) is not value:
            found[id(holder), key] = Kept(holder, key, name)


def _other(value: Any) -> Any:
    """Another value of the same type; the very same if it is not plain."""
    if type(value) is bool:
        return not value
    if type(value) is int:
        return value + 1
    if type(value) is float:
        return 2.0 * value + 1.0
    if type(value) is str:
        return f"{value}, but another one"
    if type(value) is tuple and value and all(type(item) in _PLAIN for item in value):
        return tuple(map(_other, value))
    return value


def _uses(cls: type[nn.Module]) -> _Uses:
    """Of the forward of a class, and of the methods of it that are named there, and there, and so on."""
    attributes: set[str] = set()
    stored: dict[tuple[types.FunctionType, str], None] = {}
    loaded: dict[tuple[types.FunctionType, str], None] = {}
    items, seen, names = False, set[str](), ["forward"]
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        for function in _methods(cls, name):
            for code in _nested(function.__code__):
                names += [used for used in code.co_names if used not in seen and used != "__init__"]
                for step in dis.get_instructions(code):
                    if step.opname == "STORE_ATTR":
                        attributes.add(step.argval)
                    elif step.opname == "STORE_GLOBAL":
                        stored[function, step.argval] = None
                    elif step.opname == "LOAD_GLOBAL":
                        loaded[function, step.argval] = None
                    items = items or step.opname == "STORE_SUBSCR"
    return _Uses(frozenset(attributes), tuple(stored), tuple(loaded), items)


def _methods(cls: type[nn.Module], name: str) -> Iterator[types.FunctionType]:
    for base in cls.__mro__:
        if base is nn.Module:
            return
        found: Any = vars(base).get(name)
        found = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
        while isinstance(found, types.FunctionType):
            yield found
            found = getattr(found, "__wrapped__", None)


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _nested(inner)
