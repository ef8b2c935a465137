"""Turn values and rows into 16 bytes that name them: injective, framed, the same on every machine.

Every value is written as ``tag, length, payload`` before it is hashed with xxh3-128, so no two different
values share an encoding: ``1``, ``1.0``, ``True`` and ``"1"`` are four values, ``-0.0`` and ``0.0`` are two,
and a NaN equals a NaN of the same bits. Nothing is subsampled, truncated, normalised or compared by ``==``.
The encoding is described for other readers in ``docs/reference/key-scheme.md``.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import functools
import itertools
import os
import pathlib
import struct
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import xxhash

__all__ = [
    "KEY_SCHEME",
    "NoContentError",
    "digest",
    "encode",
    "frame",
    "is_ordinary",
    "is_plain",
    "is_readable",
    "memory_of",
    "plain_row_digests",
    "row_digests",
    "seed_of",
    "settled",
    "tensor_digest",
    "tensor_row_digests",
]

KEY_SCHEME = 1
"""Number of the encoding; it is part of every namespace, so that a new scheme never reads old keys."""

_LARGE_ROW = 1 << 11  # from here on a slice of a memoryview is cheaper than struct.unpack (measured)
_STRIDED_ROW = 1 << 16  # from here on strided rows go through one buffer instead of a whole copy
_THREADED_BATCH = 1 << 24  # a second thread costs about 60 µs: it pays from about 16 MiB a batch

digest = xxhash.xxh3_128_digest
"""xxh3-128 of a bytes-like object, as 16 bytes."""


class NoContentError(Exception):
    """A value has no content that could name it (an arbitrary object, a generator, a fake tensor)."""


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


# --- memory of tensors ----------------------------------------------------------------------------------


_ORDINARY = frozenset(
    {
        torch.Tensor,
        torch.nn.Parameter,
        getattr(torch.nn, "Buffer", torch.Tensor),
    }  # Buffer came with torch 2.5
)


def is_ordinary(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of torch's own classes: a subclass may carry what its values do not show."""
    return type(tensor) in _ORDINARY


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether the values of a tensor lie in ordinary memory that belongs to it (not fake, meta, sparse, freed …)."""
    return (
        type(tensor) in _ORDINARY
        and tensor.layout is torch.strided
        and tensor.device.type != "meta"
        and not tensor.is_quantized
        and not tensor.is_nested
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and tensor.untyped_storage().nbytes() >= _span(tensor)
    )


def _span(tensor: torch.Tensor) -> int:
    """The bytes from the start of the storage to the end of the last element of a tensor."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + last + 1) * tensor.element_size()


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy and without a trace left on its storage.

    ``.numpy()`` would forbid the storage to be resized for good, which breaks sharded training; so the memory
    is borrowed by its address. The caller keeps the tensor alive while it looks.
    """
    size = tensor.nbytes
    if size == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")


def settled(tensor: torch.Tensor) -> torch.Tensor:
    """The logical values of a tensor on the host: detached, conjugation and negation carried out."""
    if not is_readable(tensor):
        raise NoContentError(f"a {_kind(tensor)} has no readable values to make a key of")
    tensor = tensor.detach()
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return tensor if tensor.device.type == "cpu" else tensor.cpu()


def _kind(tensor: torch.Tensor) -> str:
    if type(tensor) not in _ORDINARY:
        return f"tensor of type {type(tensor).__module__}.{type(tensor).__qualname__}"
    return f"{tensor.layout} tensor on {tensor.device}"


def tensor_digest(tensor: torch.Tensor) -> bytes:
    """The digest of all values of a tensor, in C order, whatever its strides."""
    values = settled(tensor).contiguous()
    return digest(memory_of(values))


def tensor_row_digests(tensor: torch.Tensor, seed: int) -> list[bytes]:
    """One digest per row (dim 0) of a tensor: of the row's values in C order, any dtype, any strides."""
    values = tensor if _lies_ready(tensor) else settled(tensor)
    count = values.shape[0]
    width = values.nbytes // count if count else 0
    if not values.is_contiguous():
        if width >= _STRIDED_ROW:
            return _strided_row_digests(values, seed)
        values = values.contiguous()
    return row_digests(memory_of(values), count, width, seed)


def is_plain(value: object) -> bool:
    """Whether a value is a dense CPU tensor with at least one byte a row, of a type that is never conjugated."""
    return (
        type(value) is torch.Tensor
        and value.is_cpu
        and value.layout is torch.strided
        and not (value.is_quantized or value.is_nested or value.is_complex())
        and value.nbytes > 0
    )


def plain_row_digests(tensor: torch.Tensor, seed: int) -> list[bytes]:
    """What `tensor_row_digests` gives, for a tensor of an outline that was seen to be plain.

    A hit is as quick as the number of torch's functions that it touches is small: after a large gather each of them
    has to come from far memory again. So what an outline says already is not asked anew.
    """
    address = tensor.data_ptr()  # raises for a tensor without memory, is 0 for memory that was freed
    if not (address and tensor.is_contiguous()) or tensor.is_neg():
        return tensor_row_digests(tensor, seed)
    count, size = tensor.shape[0], tensor.nbytes
    if tensor.untyped_storage().nbytes() < size + tensor.storage_offset() * tensor.itemsize:
        return tensor_row_digests(tensor, seed)  # its storage was made smaller; that says so
    memory = memoryview((ctypes.c_char * size).from_address(address)).cast("B")
    return row_digests(memory, count, size // count, seed)


def _lies_ready(tensor: torch.Tensor) -> bool:
    """Whether the bytes of a tensor are its values as they are: what `settled` would find out at some length."""
    return (
        type(tensor) is torch.Tensor
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not (tensor.is_quantized or tensor.is_nested)
        and tensor.is_contiguous()
        and not (tensor.is_conj() or tensor.is_neg())
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.itemsize >= tensor.nbytes
    )


def _strided_row_digests(values: torch.Tensor, seed: int) -> list[bytes]:
    """Row by row through one buffer that stays in cache: half the time of copying the batch first."""
    buffer = torch.empty(values.shape[1:], dtype=values.dtype, device="cpu")
    memory = memory_of(buffer)
    found = []
    for row in values.unbind(0):
        buffer.copy_(row)
        found.append(digest(memory, seed))
    return found


@functools.lru_cache(maxsize=256)
def _row_struct(width: int, count: int) -> struct.Struct:
    return struct.Struct(f"{width}s" * count)


def row_digests(memory: memoryview, count: int, width: int, seed: int) -> list[bytes]:
    """One digest for each of ``count`` rows of ``width`` bytes that lie behind each other in ``memory``."""
    if count * width >= _THREADED_BATCH and (threads := _threads()) > 1:
        return _threaded_row_digests(memory, count, width, seed, threads)
    rows: Iterable[bytes | memoryview]
    if 0 < width < _LARGE_ROW:
        rows = _row_struct(width, count).unpack(memory)
    else:
        rows = [memory[start : start + width] for start in range(0, count * width, width)] if width else [b""] * count
    return list(map(digest, rows, itertools.repeat(seed)))  # by position: a keyword costs twice the digest


# --- threads for large batches --------------------------------------------------------------------------


def _threads() -> int:
    try:
        return min(len(os.sched_getaffinity(0)), 4)
    except AttributeError:  # not on macOS and Windows
        return min(os.cpu_count() or 1, 4)


class _Pool:
    """A thread pool that is made when first needed, and made anew in a forked child."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: tuple[int, ThreadPoolExecutor] | None = None

    def get(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._made is None or self._made[0] != os.getpid():
                self._made = os.getpid(), ThreadPoolExecutor(4, thread_name_prefix="modcache-digest")
            return self._made[1]


_pool = _Pool()


def _threaded_row_digests(memory: memoryview, count: int, width: int, seed: int, threads: int) -> list[bytes]:
    """xxhash lets go of the interpreter lock, so rows out of cache are digested side by side."""

    def part(bounds: tuple[int, int]) -> list[bytes]:
        first, last = bounds
        return [digest(memory[row * width : (row + 1) * width], seed) for row in range(first, last)]

    edges = [count * part_number // threads for part_number in range(threads + 1)]
    spans = list(itertools.pairwise(edges))
    others = [_pool.get().submit(part, span) for span in spans[1:]]
    found = part(spans[0])
    for other in others:
        found += other.result()
    return found
