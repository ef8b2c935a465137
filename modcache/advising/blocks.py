"""Choose the submodules at which a cut is worth a look: the blocks of a model, and what stands beside their stacks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from ..errors import CutError, UsageTypeError
from ..recycling.submodules import is_never_called, nearest_names

__all__ = ["blocks_of", "named_candidates"]

_STACKS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_LISTS = (nn.ModuleList, nn.ModuleDict)
_PLAIN_STACKS = frozenset(_STACKS)


def blocks_of(model: nn.Module) -> tuple[str, ...]:
    """The names of the blocks of a model: elements of its stacks, and modules beside them that have parameters.

    >>> import torch
    >>> layer = torch.nn.TransformerEncoderLayer(4, 2)
    >>> encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    >>> blocks_of(torch.nn.Sequential(torch.nn.Linear(2, 4), encoder))
    ('0', '1.layers.0', '1.layers.1')

    What lies inside of a block is no block, unless it is a stack of equal blocks itself, as a stage is.
    """
    return tuple(_walked(model, "", any(map(_is_stack_of_blocks, model.modules()))))


def _walked(module: nn.Module, path: str, coarse: bool) -> Iterator[str]:
    """Go down to the blocks; ``coarse`` if there are stacks of real blocks, so that a few layers in a row are none."""
    children = [(name, child) for name, child in module.named_children() if _has_parameters(child)]
    repeated = isinstance(module, _STACKS) and len({type(child) for _, child in children}) < len(children)
    for name, child in children:
        inner = f"{path}.{name}" if path else name
        if type(child) is nn.Sequential:
            shallow = not coarse and not isinstance(module, _STACKS)
            walk = shallow or any(map(_is_block, child.children()))
        elif isinstance(child, _LISTS):
            walk = (not isinstance(module, _STACKS) and "." not in path) or any(map(_is_block, child.children()))
        elif repeated:
            walk = any(map(_is_even_stack, child.children()))
        else:
            walk = any(map(_is_stack_of_blocks, child.modules()))
        if walk:
            yield from _walked(child, inner, coarse)
        else:
            yield inner


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_block(module: nn.Module) -> bool:
    """Whether it is more than a layer with its norm."""
    return sum(next(part.parameters(recurse=False), None) is not None for part in module.modules()) > 2


def _is_stack_of_blocks(module: nn.Module) -> bool:
    count = sum(map(_is_block, module.children())) if type(module) in _PLAIN_STACKS else 0
    return count > 1 or (count == 1 and isinstance(module, _LISTS))  # one block in a list is called again and again


def _is_even_stack(module: nn.Module) -> bool:
    """Whether it is a stack of equal blocks, as the inside of a stage is, and not the parts of one block."""
    return _is_stack_of_blocks(module) and len({type(child) for child in module.children()}) == 1


def named_candidates(model: nn.Module, candidates: Iterable[str]) -> tuple[str, ...]:
    """The names that the user gave, checked.

    Raises:
        CutError: the model has no such submodule, or it is one that is never called.
        UsageTypeError: they are not names.
    """
    if isinstance(candidates, str) or not isinstance(candidates, Iterable):
        raise UsageTypeError(f"candidates must be names of submodules; found {candidates!r}")
    modules = dict(model.named_modules(remove_duplicate=False))
    names = tuple(candidates)
    for name in names:
        if not isinstance(name, str):
            raise UsageTypeError(f"candidates must be names of submodules; found {name!r} among them")
        if name not in modules or not name:
            raise CutError(
                f"advise(...) was asked about {name!r}, but {type(model).__name__} has no such submodule"
                f"{nearest_names(model, name)}. Give names as in named_modules()."
            )
        if is_never_called(modules[name]):
            raise CutError(
                f"advise(...) was asked about {name!r}, a {type(modules[name]).__name__}, which is never called. "
                "Ask about its children."
            )
    return names
