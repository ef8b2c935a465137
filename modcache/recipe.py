"""What all calls of one outline have in common, worked out once: which arguments are rows, and their seed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from operator import countOf
from typing import Any, NamedTuple

import numpy as np
import torch

from .batch import Batch
from .digest import digest, encode
from .keys.given import given_keys
from .keys.keyed import Given, Keyed, given_keyed_as
from .keys.parts import Meta, Part, Texts, Values, row_keys, text_digests
from .keys.tokens import TokenPlaces, token_places
from .row_digests import plain_row_digests, tensor_row_digests
from .sameness import values_differ
from .tensors import NoContentError, is_plain

__all__ = ["Form", "Outline", "Recipe", "form_of", "outline_of", "recipe_of"]

Outline = tuple[object, ...]
"""Types, dtypes, shapes and flags of the arguments: all that splitting a call and framing its keys depends on."""

_FLAGS = frozenset({bool, int, str, type(None)})


def outline_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], grad: bool) -> Outline | None:
    """The outline of a call whose arguments are tensors, lists of text and flags; ``None`` for anything else.

    With ``grad``, a tensor that requires grad is something else as well.

    A float is left out, because ``0.0 == -0.0`` would make one outline of two calls.
    """
    outline: list[object] = [len(args), *kwargs]
    for value in itertools.chain(args, kwargs.values()):
        cls = type(value)
        if cls is torch.Tensor and not (grad and value.requires_grad) and not value.is_nested:
            outline += (value.dtype, value.shape, value.device, value.layout)
        elif (cls is list or cls is tuple) and countOf(map(type, value), str) == len(value) > 0:
            outline += (cls, len(value))
        elif cls in _FLAGS:
            outline += (cls, value)
        else:
            return None
    return tuple(outline)


Form = tuple[object, ...]
"""What a self-check is valid for: names, kinds, dtypes and ranks of the arguments, and the flags among the shared."""


def form_of(batch: Batch, keyed: Keyed) -> Form:
    """What a self-check of this call is valid for."""
    if not batch.shared:
        return tuple(map(_without_sizes, keyed.metas))
    shared = tuple(
        (path, type(value), value if type(value) in _FLAGS else _said(value)) for path, value in batch.shared
    )
    return (*map(_without_sizes, keyed.metas), shared)


def _said(value: object) -> bytes | None:
    """The content of a number or a mapping of options, which may switch chance on; tables do not count."""
    if isinstance(value, torch.Tensor | np.ndarray) and value.ndim:
        return None
    try:
        return digest(encode(value))
    except NoContentError:
        return None


def _without_sizes(meta: Meta) -> Meta:
    last = meta[-1]
    return (*meta[:-1], len(last)) if type(last) is tuple else meta


class Recipe(NamedTuple):
    """How to make the keys of calls of one outline.

    Args:
        size: the number of rows.
        form: what a self-check of such a call is valid for.
        home: the device on which outputs are expected.
        metas: for each per-row argument, what its rows have in common.
        seed: stands for everything that the rows have in common.
        places: for each per-row argument, its place among the values of the call; ``None`` where the caller gives
            the keys.
        plain: whether its first argument is a tensor of which bytes and values are the same thing.
        tokens: where its token rows are, if padding is not part of its rows.
    """

    size: int
    form: Form
    home: torch.device
    metas: tuple[Meta, ...]
    seed: int
    places: tuple[int, ...] | None
    plain: bool
    tokens: TokenPlaces | None = None

    def keys(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], given: Given | None) -> list[bytes] | None:
        """The keys of the rows of a call of this outline; ``None`` if this call is to be looked at in full.

        Raises:
            NoContentError: the values of a tensor cannot be read.
            UsageError: given keys cannot be right.
        """
        if given is not None:
            return given_keys(given.keys, self.size, self.seed, given.source)
        if self.tokens is not None:
            return self.tokens.keys((*args, *kwargs.values()), self.seed)
        if self.places == (0,) and args:
            value = args[0]
            if type(value) is not torch.Tensor:
                return text_digests(value, self.seed)
            return plain_row_digests(value, self.seed) if self.plain else tensor_row_digests(value, self.seed)
        return row_keys(self.parts(args, kwargs), self.seed)

    def parts(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Part, ...]:
        """The per-row arguments of a call of this outline, as what their keys are made of."""
        values = (*args, *kwargs.values())
        metas = self.metas if self.tokens is None else self.tokens.metas
        return tuple(
            [
                Values(meta, value) if type(value := values[place]) is torch.Tensor else Texts(meta, value)
                for place, meta in zip(self.places or (), metas, strict=True)
            ]
        )

    def differs(self, names: frozenset[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether the rows of a call of this outline differ in anything that is named (see `sameness`).

        Rows of which the caller gave the keys are taken at his word.
        """
        if self.places is None or self.tokens is not None:
            return False
        values = (*args, *kwargs.values())
        for place, (path, *_) in zip(self.places, self.metas, strict=True):
            value = values[place]
            if path in names and values_differ(value):
                return True
            if type(value) is not torch.Tensor and f"len({path})" in names and len(set(map(len, value))) > 1:
                return True
        return False

    def keyed(self, keys: list[bytes], args: tuple[Any, ...], kwargs: Mapping[str, Any], given: Given | None) -> Keyed:
        """The keys of a call of this outline with what they are made of."""
        if given is not None:
            return given_keyed_as(given, self.size, self.metas, self.seed)
        tokens = None if self.tokens is None else self.tokens.tokens((*args, *kwargs.values()))
        return Keyed(keys, self.seed, self.metas, self.parts(args, kwargs), tokens)


def recipe_of(batch: Batch, keyed: Keyed, form: Form, home: torch.device, values: list[object]) -> Recipe | None:
    """The recipe of a call that was worked out in full, or ``None`` if its keys take more than its columns and flags.

    Args:
        batch: the call as rows.
        keyed: its keys.
        form: what a self-check of it is valid for.
        home: the device on which outputs are expected.
        values: the arguments, positional ones first.
    """
    if not all(type(value) in _FLAGS for _, value in batch.shared):
        return None  # its content is in the seed, and an outline shows the content of flags alone
    if any(column.single for column in batch.columns):
        return None  # a bare text is one row, and a recipe takes the characters of a text for rows
    if keyed.given:
        return Recipe(batch.size, form, home, keyed.metas, keyed.seed, None, plain=False)
    if not all(isinstance(part, Values | Texts) for part in keyed.parts):
        return None
    at = {id(value): place for place, value in enumerate(values)}
    places = tuple(at.get(id(column.value), -1) for column in batch.columns)
    twice = len(set(places)) < len(places)  # one object given as two arguments
    if twice or -1 in places:
        return None
    tokens = None if keyed.tokens is None else token_places(batch, keyed.tokens, places)
    if keyed.tokens is not None and tokens is None:
        return None
    return Recipe(batch.size, form, home, keyed.metas, keyed.seed, places, is_plain(values[0]), tokens)
