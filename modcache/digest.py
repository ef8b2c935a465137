"""Turn values and rows into 16 bytes that name them: injective, framed, the same on every machine.

Every value is written as ``tag, length, payload`` before it is hashed with xxh3-128, so no two different
values share an encoding: ``1``, ``1.0``, ``True`` and ``"1"`` are four values, ``-0.0`` and ``0.0`` are two,
and a NaN equals a NaN of the same bits. Nothing is subsampled, truncated, normalised or compared by ``==``.
The encoding is described for other readers in ``docs/reference/key-scheme.md``.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import pathlib
import struct
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
import xxhash

from .tensors import NoContentError, memory_of, settled

__all__ = ["KEY_SCHEME", "PLAIN_TYPES", "checksum", "digest", "encode", "frame", "hasher", "seed_of", "tensor_digest"]

KEY_SCHEME = 1
"""Number of the encoding; it is part of every namespace, so that a new scheme never reads old keys."""

digest = xxhash.xxh3_128_digest
"""xxh3-128 of a bytes-like object, as 16 bytes."""

hasher = xxhash.xxh3_128
"""The same for bytes that come piece by piece: ``update(...)``, then ``digest()``."""

checksum = xxhash.xxh3_64_intdigest
"""xxh3-64 of a bytes-like object, as a whole number; a second argument seeds it."""


def seed_of(frame_bytes: bytes) -> int:
    """The 64-bit seed that stands for what is common to all rows of a call."""
    return xxhash.xxh3_64_intdigest(frame_bytes)


def frame(tag: bytes, payload: bytes) -> bytes:
    """One framed item: a tag that no other kind uses, the length, the payload."""
    return b"%c%b%b%b" % (len(tag), tag, len(payload).to_bytes(8, "little"), payload)


# --- values ---------------------------------------------------------------------------------------------

Encoder = Callable[[object], "bytes | None"]


def encode(value: object, more: Encoder | None = None) -> bytes:
    """The framed bytes of a plain value: numbers, text, bytes, containers, arrays, tensors, enums, dtypes.

    >>> encode(1) == encode(1.0), encode(["ab"]) == encode(["a", "b"])
    (False, False)

    Args:
        value: what to encode. Containers are encoded in their own order, sets in the order of their items' bytes.
        more: asked first for every object that is not a plain value; answers its framed bytes or ``None``.

    Raises:
        NoContentError: the value, or something in it, has no content.
    """
    plain = _PLAIN.get(type(value))
    if plain is not None:
        return plain(value)
    if more is not None and (known := more(value)) is not None:
        return known
    try:
        return _encode_other(value, more)
    except RecursionError:
        raise NoContentError(f"a {type(value).__qualname__} is nested too deep, or contains itself") from None


def _encode_int(value: int) -> bytes:
    return frame(b"i", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))


def _encode_text(value: str) -> bytes:
    return frame(b"s", value.encode("utf-8", "surrogatepass"))


_PLAIN: dict[type, Callable[..., bytes]] = {
    type(None): lambda _: frame(b"n", b""),
    bool: lambda value: frame(b"b", b"\1" if value else b"\0"),
    int: _encode_int,
    float: lambda value: frame(b"f", struct.pack("<d", value)),
    complex: lambda value: frame(b"c", struct.pack("<dd", value.real, value.imag)),
    str: _encode_text,
    bytes: lambda value: frame(b"y", value),
    bytearray: lambda value: frame(b"Y", bytes(value)),
    type(...): lambda _: frame(b"...", b""),
    torch.dtype: lambda value: frame(b"dtype", str(value).encode()),
    torch.device: lambda value: frame(b"device", str(value).encode()),
    torch.memory_format: lambda value: frame(b"format", str(value).encode()),
    torch.layout: lambda value: frame(b"layout", str(value).encode()),
}

PLAIN_TYPES = frozenset(_PLAIN)
"""Types whose objects are always encoded by value; `encode` asks ``more`` for none of them."""

_FIELDS: dict[type, Callable[..., tuple[object, ...]]] = {
    decimal.Decimal: lambda value: tuple(value.as_tuple()),
    fractions.Fraction: lambda value: (value.numerator, value.denominator),
    dt.date: lambda value: (value.year, value.month, value.day),
    dt.datetime: lambda value: (*value.timetuple()[:6], value.microsecond, value.fold, *_zone(value)),
    dt.time: lambda value: (value.hour, value.minute, value.second, value.microsecond, value.fold, *_zone(value)),
    dt.timedelta: lambda value: (value.days, value.seconds, value.microseconds),
    uuid.UUID: lambda value: (value.bytes,),
}
"""What the values of the standard library hold that are no containers; none of a subclass."""


def _zone(value: dt.datetime | dt.time) -> tuple[object, ...]:
    return value.utcoffset(), value.tzname()


_EXACT: dict[type, Callable[..., object]] = {
    int: int.__index__,
    float: float.__float__,
    str: str.__str__,
    bytes: lambda value: bytes(memoryview(value)),
}
"""What an object of a subclass holds; its own ``__str__`` is not asked, it may say anything."""


def _encode_other(value: object, more: Encoder | None) -> bytes:
    """Containers and the rest, by what they are; a subclass keeps its name and what was set on it."""
    cls = type(value)
    name = f"{cls.__module__}.{cls.__qualname__}".encode()
    if isinstance(value, torch.Tensor):
        return _encode_tensor(value)
    if isinstance(value, np.ndarray | np.generic):
        return _encode_array(value, more)
    if isinstance(value, enum.Enum):  # a combination of flags may have no name
        return frame(b"enum", _join([frame(b"t", name), encode(value.name), encode(value.value, more)]))
    if dataclasses.is_dataclass(value) and not isinstance(value, Mapping):
        names = [field.name for field in dataclasses.fields(value)]
        pairs = ((field, getattr(value, field)) for field in names)
        return frame(b"data", frame(b"t", name) + _encode_pairs(pairs, more) + _encode_set_on(value, more, names))
    if isinstance(value, tuple | list):
        tag = b"(" if cls is tuple else b"[" if cls is list else None
        items = _join(encode(item, more) for item in value)
        return frame(tag, items) if tag else frame(b"sequence", frame(b"t", name) + items + _encode_set_on(value, more))
    if isinstance(value, Mapping):
        pairs_bytes = _encode_pairs(value.items(), more)
        return frame(b"{", pairs_bytes) if cls is dict else frame(b"map", frame(b"t", name) + pairs_bytes)
    if isinstance(value, set | frozenset):
        items = _join(sorted(encode(item, more) for item in value))
        return frame(b"set", frame(b"t", name) + items + _encode_set_on(value, more))
    if isinstance(value, pathlib.PurePath):
        return frame(b"path", frame(b"t", name) + _encode_text(str(value)))
    if isinstance(value, range | slice):
        parts = (value.start, value.stop, value.step)
        return frame(b"span", frame(b"t", name) + _join(encode(part, more) for part in parts))
    if (fields := _FIELDS.get(cls)) is not None:
        return frame(b"value", frame(b"t", name) + encode(fields(value)))
    for base in (int, float, str, bytes):
        if isinstance(value, base):
            held = _PLAIN[base](_EXACT[base](value))
            return frame(b"sub", frame(b"t", name) + held + _encode_set_on(value, more))
    raise NoContentError(f"an object of type {cls.__module__}.{cls.__qualname__} has no content to make a key of")


def _encode_pairs(pairs: Iterable[tuple[object, object]], more: Encoder | None) -> bytes:
    return _join(encode(key, more) + encode(item, more) for key, item in pairs)


def _encode_set_on(value: object, more: Encoder | None, known: Sequence[str] = ()) -> bytes:
    """What was set on an object beside its items or fields; mostly nothing."""
    extra = {name: item for name, item in getattr(value, "__dict__", {}).items() if name not in known}
    return frame(b"set on", _encode_pairs(extra.items(), more)) if extra else b""


def _join(parts: Iterable[bytes]) -> bytes:
    return b"".join(parts)


def _encode_array(value: np.ndarray | np.generic, more: Encoder | None) -> bytes:
    if isinstance(value, np.ndarray) and type(value) not in (np.ndarray, np.memmap):  # a mask, units, ...
        cls = type(value)
        raise NoContentError(f"an array of type {cls.__module__}.{cls.__qualname__} may hold more than its values show")
    array = np.asarray(value)
    if array.dtype.hasobject:
        items = array.ravel().tolist()
        return frame(b"objects", encode(array.shape) + encode(items, more))
    head = encode(array.dtype.str if array.dtype.names is None else str(array.dtype.descr)) + encode(array.shape)
    kind = b"ndarray" if isinstance(value, np.ndarray) else b"scalar"
    return frame(kind, head + digest(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data))


def _encode_tensor(value: torch.Tensor) -> bytes:
    content = tensor_digest(value)  # first: what has no content may have no shape either
    return frame(b"tensor", encode(value.dtype) + encode(tuple(value.shape)) + content)


def tensor_digest(tensor: torch.Tensor) -> bytes:
    """The digest of all values of a tensor, in C order, whatever its strides."""
    values = settled(tensor).contiguous()
    return digest(memory_of(values))
