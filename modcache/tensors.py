"""Read the values of tensors where they lie, and leave no trace on them."""

from __future__ import annotations

import ctypes

import torch

__all__ = ["NoContentError", "is_ordinary", "is_plain", "is_readable", "memory_of", "plain_memory", "settled"]


class NoContentError(Exception):
    """A value has no content that could name it (an arbitrary object, a generator, a fake tensor).

    Args:
        what: has none, in words.
        remedy: what the user can do about it, in words.
        shared: whether all rows share the value, so that keys given for the rows do not stand for it.
    """

    def __init__(
        self, what: str, remedy: str = "give that type a key with register_key_extractor", *, shared: bool = False
    ) -> None:
        super().__init__(what)
        self.remedy = remedy
        self.shared = shared


_ORDINARY = frozenset(
    {
        torch.Tensor,
        torch.nn.Parameter,
        getattr(torch.nn, "Buffer", torch.Tensor),
    }  # Buffer came with torch 2.5
)


_REMEDY = "pass a plain, dense tensor"


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
        raise NoContentError(f"a {_kind(tensor)} has no readable values to make a key of", _REMEDY)
    tensor = tensor.detach()
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return tensor if tensor.device.type == "cpu" else tensor.cpu()


def _kind(tensor: torch.Tensor) -> str:
    if type(tensor) not in _ORDINARY:
        return f"tensor of type {type(tensor).__module__}.{type(tensor).__qualname__}"
    return f"{tensor.layout} tensor on {tensor.device}"


def is_plain(value: object) -> bool:
    """Whether a value is a dense CPU tensor with at least one byte a row, of a type that is never conjugated."""
    return (
        type(value) is torch.Tensor
        and value.is_cpu
        and value.layout is torch.strided
        and not (value.is_quantized or value.is_nested or value.is_complex())
        and value.nbytes > 0
    )


def plain_memory(tensor: torch.Tensor) -> memoryview | None:
    """The bytes of a tensor whose dtype and layout were seen to be plain, or ``None`` unless they lie ready.

    A hit is as quick as the number of torch's functions that it touches is small: after a large gather each of them
    has to come from far memory again. So what `is_plain` said of a tensor like this one is not asked anew.
    """
    address = tensor.data_ptr()  # raises for a tensor without memory, is 0 for memory that was freed
    if not (address and tensor.is_contiguous()) or tensor.is_neg():
        return None
    size = tensor.nbytes
    if tensor.untyped_storage().nbytes() < size + tensor.storage_offset() * tensor.itemsize:
        return None  # its storage was made smaller
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")
