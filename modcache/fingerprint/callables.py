"""Name a function or callable by what it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..digest import digest, encode
from ..tensors import NoContentError
from .code import place_of
from .follow import Reader

if TYPE_CHECKING:
    import torch

    from .seen import Seen


def callable_digest(fn: object) -> tuple[bytes, tuple[str, ...]]:
    """The digest of a function or callable by what it does, and the names of what in it had no content.

    >>> callable_digest(lambda x: x + 1)[0] == callable_digest(lambda x: x + 2)[0]
    False
    """
    reader = Reader()
    content = reader.value(fn, "callable")
    seen = reader.finish()
    while reader.look_aside():
        seen = reader.finish()
    for name, module in seen.modules.items():
        content += encode(place_of(type(module)))
        seen.opaque[f"{name} ({place_of(type(module))})"] = module
    for name, tensor in seen.tensors.items():
        content += encode(name) + _content_or_opaque(tensor, name, seen)
    for name, array in seen.arrays.items():
        content += encode(name) + encode(array)
    reached = [(name, sorted(contents)) for name, contents in sorted(seen.reached.items())]
    return digest(content + encode(reached)), tuple(seen.opaque)


def _content_or_opaque(tensor: torch.Tensor, name: str, seen: Seen) -> bytes:
    try:
        return encode(tensor)
    except NoContentError:
        seen.opaque[f"{name} ({place_of(type(tensor))})"] = tensor
        return b""
