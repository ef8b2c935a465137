"""Which types of objects have a key of their own, and how it is made."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ..digest import PLAIN_TYPES, digest, encode, frame
from ..errors import KeyExtractionError, UsageTypeError
from ..fingerprint import callable_digest
from ..locks import lock_of
from ..tensors import NoContentError
from .files import path_key

__all__ = ["encode_registered", "has_extractor", "is_row", "key_from", "register_key_extractor"]

Function = TypeVar("Function", bound=Callable[[Any], object])

_by_type: dict[type, tuple[Callable[[Any], object], bytes]] = {}
_by_name: dict[str, tuple[Callable[[Any], object], bytes]] = {}
_resolved: dict[type, tuple[Callable[[Any], object], bytes] | None] = {}
_lock = lock_of(sys.modules[__name__])  # what was looked up before a registration is not written down after it

_BY_VALUE = PLAIN_TYPES | {torch.Tensor, torch.nn.Parameter}
"""Types whose keys are made without asking the registry; their subclasses may be registered."""


def register_key_extractor(cls: type) -> Callable[[Function], Function]:
    """Give objects of a type a key: a decorator for a function of one object (one row).

    >>> import dataclasses
    >>> from modcache import register_key_extractor
    >>> class Clip:
    ...     def __init__(self, samples, rate):
    ...         self.samples, self.rate = samples, rate
    >>> @register_key_extractor(Clip)
    ... def clip_key(clip):
    ...     return clip.samples.tobytes(), clip.rate

    The most specific class of an object that has a function wins. The function's code is part of the key, so an
    edited function never meets the keys of the old one.

    Args:
        cls: the class; objects of its subclasses are meant too.

    Returns:
        The decorator. The function must return a bool, int, float, str, bytes, None or a tuple of these.

    Raises:
        UsageTypeError: ``cls`` is no class, or one whose objects are always keyed by value, or what is decorated
            cannot be called (a ``TypeError``).
    """
    if not isinstance(cls, type):
        raise UsageTypeError(f"register_key_extractor(...) takes a class; found {cls!r}")
    if cls in _BY_VALUE:
        raise UsageTypeError(
            f"register_key_extractor(...) takes a class of your own; {cls.__qualname__} is always keyed by value. "
            "For rows of it, give a function of a row as key= to cached_module."
        )

    def register(function: Function) -> Function:
        if not callable(function):
            raise UsageTypeError(
                f"@register_key_extractor({cls.__qualname__}) decorates a function of one object; found {function!r}"
            )
        code = callable_digest(function)[0]
        with _lock:
            _by_type[cls] = function, code
            _resolved.clear()
        return function

    return register


def _find(cls: type) -> tuple[Callable[[Any], object], bytes] | None:
    try:
        return _resolved[cls]
    except KeyError:
        pass
    with _lock:
        found = None
        for base in cls.__mro__:
            found = _by_type.get(base) or _by_name.get(f"{base.__module__}.{base.__qualname__}")
            if found is not None:
                break
        _resolved[cls] = found
        return found


def has_extractor(cls: type) -> bool:
    """Whether objects of this class have a registered key function."""
    return _find(cls) is not None


def is_row(value: object) -> bool:
    """Whether an object is a row by itself: a text, bytes, a path, or of a registered type."""
    cls = type(value)
    return cls is str or isinstance(value, str | bytes | os.PathLike) or _find(cls) is not None


def encode_registered(value: object) -> bytes | None:
    """The framed key of an object of a registered type or of a path, or ``None`` for anything else.

    Raises:
        KeyExtractionError: its function raised, or gave something that cannot be a key.
        NoContentError: it is the path of a directory or a pipe, or an image that cannot be read.
        OSError: what opening the file would raise (`FileNotFoundError`, ...).
    """
    found = _find(type(value))
    if found is None:
        return _path_key(value) if isinstance(value, os.PathLike) else None
    function, code = found
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    return frame(b"registered", encode(name) + code + key_from(function, value, f"the key function for {name}"))


def _path_key(path: os.PathLike[str]) -> bytes:
    try:
        return path_key(path, "content")
    except IsADirectoryError:
        raise NoContentError(f"{os.fspath(path)!r} is a directory, which has no content to make a key of") from None


_ATOMS = (bool, int, float, str, bytes, type(None))


def key_from(function: Callable[[Any], object], value: object, source: str) -> bytes:
    """The framed bytes of what a key function says of an object.

    Raises:
        KeyExtractionError: it raised, or gave something that cannot be a key.
        NoContentError: it is a function of ours, and the object cannot be read.
    """
    try:
        found = function(value)
    except NoContentError:
        raise
    except Exception as error:
        raise KeyExtractionError(f"{source} raised {type(error).__name__}: {error}") from error
    return _checked(found, source)


def _checked(value: object, source: str) -> bytes:
    """The framed bytes of what a key function returned.

    Raises:
        KeyExtractionError: it is not a bool, int, float, str, bytes, None or a tuple of these, or it is NaN.
    """
    cls = type(value)
    if cls is float and math.isnan(value):  # type: ignore[arg-type]
        raise KeyExtractionError(f"{source} returned nan, which names no row; return a value that identifies it")
    if cls in _ATOMS:
        return encode(value)
    if cls is tuple:
        return frame(b"(", b"".join(_checked(item, source) for item in value))  # type: ignore[attr-defined]
    raise KeyExtractionError(
        f"{source} returned a {cls.__module__}.{cls.__qualname__}; a key is a bool, int, float, str, bytes, None or a "
        "tuple of these (of a tensor, return e.g. int(x) or x.numpy().tobytes())"
    )


# --- known without being imported -----------------------------------------------------------------------


def _image_key(image: Any) -> tuple[object, ...]:
    """What names a PIL image, which may be broken or closed; whether that matters, only the module knows."""
    try:
        return _image_content(image)
    except Exception as error:
        raise NoContentError(f"an image that cannot be read ({error}) has no content to make a key of") from None


def _image_content(image: Any) -> tuple[object, ...]:
    """All that decoding of a PIL image may depend on: pixels, mode, palette, transparency, orientation, profile."""
    palette = [image.getpalette(mode) for mode in ("RGB", "RGBA")] if image.mode in ("P", "PA") else None
    known = {name: image.info[name] for name in ("transparency", "exif", "icc_profile") if name in image.info}
    return (
        image.mode,
        *image.size,
        digest(image.tobytes()),
        encode(palette),
        bytes(image.getexif().tobytes()),
        encode(sorted(known.items())),
    )


_by_name["PIL.Image.Image"] = _image_key, encode("PIL.Image.Image, 1")
