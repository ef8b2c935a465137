"""A hit, from the arguments to the output: a recipe, the keys, one gather."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch

from .keys.keyed import Given
from .keys.padding import pad_lent, pad_rows
from .memo import Memo
from .modes import current_mode
from .outputs import UnknownClassError, token_dims_of, tree_of
from .recipe import Outline, Recipe, outline_of
from .rows import Rows
from .stores import Found
from .tensors import NoContentError

__all__ = ["Missed", "Site", "hit"]


class Site(NamedTuple):
    """What a call needs to know of the state that a module is in.

    Args:
        namespace: names the module as it is now, and the context.
        device: where its parameters are; outputs are expected there unless an input tensor is elsewhere.
        floor: the tolerance of its least precise arithmetic.
    """

    namespace: str
    device: torch.device
    floor: float


class Missed(NamedTuple):
    """A call that is no plain hit, and what was worked out of it so far.

    Args:
        outline: types and shapes of the arguments, if they are of the simple kinds.
        recipe: how calls of this outline are keyed, if that is known.
        keys: the keys of its rows, if there is a recipe.
        found: what the store has of them.
        refused: why calls of this form are bypassed, if they are.
    """

    outline: Outline | None = None
    recipe: Recipe | None = None
    keys: list[bytes] | None = None
    found: tuple[Found, ...] = ()
    refused: str | None = None


def hit(
    memo: Memo, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any], given: Given | None, grad: bool
) -> Any:
    """The output of a call all of whose rows are stored and of whose outline one was seen before, or `Missed`.

    Everything else about a call (what is wrong with it, what is to be computed) is for `call` to find out.
    """
    began = perf_counter()
    outline = outline_of(args, kwargs, grad)
    if outline is None:
        return _NOTHING
    recipe = memo.recipes.get((outline, -1 if given is None else given.number))
    if recipe is None:
        return Missed(outline)
    if (refused := memo.findings.refused(site.namespace, recipe.form)) is not None:
        return Missed(outline, recipe, refused=refused)
    if current_mode() == "refresh" or memo.options.verify:
        return Missed(outline)
    try:
        keys = recipe.keys(args, kwargs, given)
    except NoContentError:
        return Missed(outline)
    if keys is None:
        return Missed(outline)
    checked = memo.findings.passed(site.namespace, recipe.form) is not None
    untested = memo.findings.untested(site.namespace, recipe.form)
    if untested and recipe.differs(untested, args, kwargs):  # asked here, its arguments are in the cache still
        checked = False
    keyed_at = perf_counter()
    try:
        rows = None if recipe.tokens is None else _lent(memo, site, recipe, keys)
        found = memo.look_up(site.namespace, keys) if rows is None else ()
    except Exception:  # `call` asks again, and says what is wrong
        return Missed(outline)
    if not checked:
        return Missed(outline, recipe, keys, found)
    try:
        if recipe.tokens is None and len(found) == 1 and len(found[0].positions) == recipe.size:
            rows = found[0].rows
        elif recipe.tokens is not None and rows is None:
            rows = _padded(found, recipe.size, recipe.tokens.like.width)
        if rows is None:
            return Missed(outline, recipe, keys, found)
        output = tree_of(rows, recipe.home)
    except UnknownClassError:
        return Missed(outline, recipe, keys)
    size = recipe.size
    memo.count_hits(site.namespace, size, keyed_at - began, perf_counter() - keyed_at)
    return output


_NOTHING = Missed()


def _lent(memo: Memo, site: Site, recipe: Recipe, keys: list[bytes]) -> Rows | None:
    """The rows of a call padded to its width, copied once, where they have tokens and the store can lend them."""
    lend, dims = getattr(memo.store, "lend", None), memo.findings.passed(site.namespace, recipe.form)
    if lend is None or recipe.tokens is None or not any(dims or ()):
        return None
    rows: Rows | None = lend(site.namespace, keys, partial(pad_lent, recipe.size, recipe.tokens.like.width))
    return rows


def _padded(found: tuple[Found, ...], size: int, width: int) -> Rows | None:
    """The rows of a call padded to its width, or ``None`` unless all of them were found and go together."""
    if sum([len(part.positions) for part in found]) != size:
        return None
    if len(found) == 1 and not any(token_dims_of(found[0].rows.layout.tree)):
        return found[0].rows
    return pad_rows(size, width, [(part.positions, part.rows) for part in found])
