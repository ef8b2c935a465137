"""What a call asks of the store: its rows, their keys, and whether they are there; or why it asks nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .arguments import Arguments
from .batch import Batch, NoRowsError, split, tensors_in
from .explain import Explanation
from .hit import Site
from .keys.extractors import whole_keyed
from .keys.keyed import Given, Keyed, given_keyed
from .keys.parts import shared_digests
from .keys.registry import is_row
from .memo import Bypass, Memo, Options
from .recipe import Form, form_of
from .tensors import NoContentError

__all__ = [
    "batch_of",
    "contained",
    "explained",
    "home_of",
    "keyed_of",
    "keys_of",
    "refuse_blocked",
    "refuse_grad",
    "row_count",
]


def batch_of(options: Options, arguments: Arguments) -> Batch:
    """The call as rows; with ``per_row=False`` the whole call is one."""
    if not options.per_row:
        return Batch(1, (), tuple(arguments.bound()), ())
    try:
        batch = split(arguments.bound(), options.broadcast, is_row)
    except NoRowsError as error:
        if any(isinstance(value, torch.fx.Proxy) for _, value in arguments.bound()):
            raise Bypass("torch.fx.symbolic_trace") from None
        raise Bypass(
            "no rows", f"{error}; it runs uncached. Give per_row=False if it has no batch dimension."
        ) from None
    if batch.size == 0:
        raise Bypass("empty batch")
    return batch


def refuse_grad(arguments: Arguments) -> None:
    """Bypass a call of which an input needs grad: a stored row could not pass it on."""
    for name, value in arguments.bound():
        if any(tensor.requires_grad for tensor in tensors_in(value)):
            _refuse(name)


def _refuse(argument: str) -> None:
    raise Bypass(
        "an input needs grad",
        f"its argument {argument} needs grad, which a stored row could not pass on; it runs uncached. Detach the "
        "input, or cache a module that comes before everything trained.",
    )


def refuse_blocked(memo: Memo, namespace: str, form: Form) -> None:
    """Bypass calls of a form that was found not to be rows."""
    if (reason := memo.findings.refused(namespace, form)) is not None:
        raise Bypass(reason)


def keyed_of(memo: Memo, batch: Batch, arguments: Arguments, given: Given | None) -> Keyed:
    """The keys of a call's rows.

    Raises:
        Bypass: something in the call has no content.
    """
    extractor = memo.options.extractor
    try:
        if given is not None:
            return given_keyed(given, batch)
        if not memo.options.per_row:
            return whole_keyed(extractor, arguments.bound())
        if not extractor.reads(batch):
            memo.say(
                "nothing to read",
                f"its key extractor ({extractor.name}) finds nothing that it reads in the per-row arguments "
                f"({', '.join(column.path for column in batch.columns)}); rows are keyed by the arguments' types.",
            )
        return extractor(arguments.bound(), batch)
    except NoContentError as error:
        given_helps = given is None and memo.options.per_row and not error.shared
        ways = f"{error.remedy}, or pass cache_keys=" if given_helps else error.remedy
        raise Bypass("no key", f"{error}; it runs uncached. What to do: {ways}.") from None


def home_of(site: Site, batch: Batch) -> torch.device:
    """The device on which outputs are expected: the first input tensor's, else the module's."""
    for column in batch.columns:
        if isinstance(column.value, torch.Tensor):
            return column.value.device
    for _, value in batch.shared:
        if isinstance(value, torch.Tensor) and value.ndim:
            return value.device
    return site.device


def row_count(options: Options, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The number of rows of a call that was not split, as far as its first argument shows it."""
    if options.per_row and torch._C._get_tracing_state() is None:  # a tracer would warn of who asks for a length
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.is_nested:
                return value.size(0)
            if isinstance(value, list) or (isinstance(value, torch.Tensor | np.ndarray) and value.ndim):
                return len(value)
    return 1


# --- asking without running -----------------------------------------------------------------------------


def keys_of(memo: Memo, arguments: Arguments, given: Given | None) -> tuple[Batch, Keyed]:
    """The rows of a call and their keys.

    Raises:
        Bypass: the call has no rows or no keys.
    """
    batch = batch_of(memo.options, arguments)
    return batch, keyed_of(memo, batch, arguments, given)


def contained(memo: Memo, namespace: str, arguments: Arguments, given: Given | None) -> list[bool]:
    """Whether each row of a call is stored and would be served.

    Raises:
        Bypass: the call would be bypassed.
    """
    batch, keyed = keys_of(memo, arguments, given)
    refuse_blocked(memo, namespace, form_of(batch, keyed))
    if torch.is_grad_enabled():
        refuse_grad(arguments)
    return memo.contains(namespace, keyed.keys)


def explained(
    memo: Memo,
    namespace: str,
    arguments: Arguments,
    given: Given | None,
    namespaces: Mapping[str, Mapping[str, bytes]],
    nearest: Sequence[str] | None,
) -> list[Explanation]:
    """Why each row of a call would hit or miss.

    Args:
        memo: what the calls of the module share.
        namespace: of the module as it is now.
        arguments: of the call.
        given: keys that the caller gave.
        namespaces: the named parts of those that the module had.
        nearest: in what the most similar namespace of another module of its class differs, if the store has one.
    """
    batch, keyed = keys_of(memo, arguments, given)
    form = form_of(batch, keyed)
    refuse_blocked(memo, namespace, form)
    if torch.is_grad_enabled():
        refuse_grad(arguments)
    found = memo.contains(namespace, keyed.keys)
    bypassed = memo.stats().reasons
    answers = memo.recent.explain(namespace, keyed, shared_digests(batch), found, namespaces, nearest, bypassed)
    if memo.findings.passed(namespace, form) is not None or len(set(keyed.keys)) < 2:
        return answers
    why = "stored, but batches of this form are not checked yet: the first one is run as a whole"
    return [Explanation(answer.row, keyed.tokens is None, why) if answer.hit else answer for answer in answers]
