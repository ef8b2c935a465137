"""What a lasting store is told of a namespace, and what earlier runs left word of there."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .digest import KEY_SCHEME, digest, encode
from .fingerprint import Fingerprint
from .notices import log
from .recipe import Form
from .stores import Describes, Store
from .stores.differing import differences
from .tensors import NoContentError

__all__ = ["TokenDims", "Word", "facts_of"]

TokenDims = tuple[tuple[int, ...], ...]

_LIBRARIES = ("transformers", "timm", "torchvision", "diffusers")
"""Libraries whose version is worth reading where a module's class or defaults may come from them."""


def facts_of(
    namespace: str,
    cls: type,
    known: Fingerprint,
    context: Mapping[str, object],
    *,
    key: str,
    prepare: Callable[..., Any] | None,
    version: str | None,
    dtypes: frozenset[torch.dtype],
) -> dict[str, Any]:
    """The readable description of a namespace: everything that is in its name, and what was around."""
    return {
        "namespace": namespace,
        "key_scheme": KEY_SCHEME,
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "fingerprint": known.digest.hex(),
        "weights": known.weights.hex(),
        "dtypes": sorted(map(str, dtypes)),
        "context": {name: str(value) for name, value in context.items()},
        "key": key,
        "prepare": getattr(prepare, "__qualname__", None if prepare is None else type(prepare).__qualname__),
        "version": version,
        "not_fingerprinted": sorted(known.opaque),
        "bookkeeping": sorted(known.bookkeeping),
        "made_with": _made_with(),
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "parts": {name: part.hex() for name, part in known.parts.items()},
    }


def _made_with() -> dict[str, str]:
    found = {"modcache": _own_version(), "torch": torch.__version__, "python": "{}.{}".format(*sys.version_info[:2])}
    loaded = {name: getattr(sys.modules.get(name), "__version__", None) for name in _LIBRARIES}
    return found | {name: said for name, said in loaded.items() if isinstance(said, str)}


@functools.cache  # it is read from a file
def _own_version() -> str:
    try:
        return version("modcache")
    except PackageNotFoundError:
        return "not installed"


class Word:
    """The manifests of one module's namespaces, where its store keeps such; does nothing where it does not.

    Args:
        store: which may be able to describe namespaces.
        name: the class name of the module, for messages.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store = store if isinstance(store, Describes) else None
        self._name = name
        self._untold: dict[str, dict[str, Any]] = {}
        self._marks: dict[str, Mapping[str, object]] = {}

    @property
    def lasts(self) -> bool:
        """Whether the store keeps manifests."""
        return self._store is not None

    def introduce(self, facts: dict[str, Any]) -> None:
        """A namespace is about to be used: read what is known of it, and have ready what to tell of it."""
        namespace = facts["namespace"]
        if self._store is None or namespace in self._marks:
            return
        there = self._store.manifest(namespace)
        self._marks[namespace] = {}
        if there is None:
            self._untold[namespace] = facts
            self._explain_itself(facts)
        elif isinstance(marks := there.get("checked"), dict):
            self._marks[namespace] = marks

    def told(self, namespace: str) -> None:
        """Rows of a namespace were put: its description goes beside them, if it is not there."""
        facts = self._untold.pop(namespace, None)
        if facts is not None and self._store is not None:
            self._store.describe(namespace, facts)

    def passed(self, namespace: str, form: Form) -> tuple[TokenDims, frozenset[str]] | None:
        """What an earlier run found out about calls of this form, if it did, and in what their rows were the same."""
        marks = self._marks.get(namespace)
        mark = _mark_of(form) if marks else None
        return _said_by(marks[mark]) if marks and mark is not None and mark in marks else None

    def note(self, namespace: str, form: Form, dims: TokenDims | None, same: frozenset[str] = frozenset()) -> None:
        """Leave word that calls of this form passed a self-check, or with ``None`` that they failed one.

        Args:
            namespace: of the rows.
            form: of the calls.
            dims: the token dimensions of the outputs.
            same: in what the rows were the same that were checked; then the mark is one that versions before this
                distinction take for none.
        """
        mark = _mark_of(form)
        if self._store is None or mark is None or namespace not in self._marks:
            return
        own = {mark: {"dims": dims, "same": sorted(same)} if same and dims is not None else dims}
        self._marks[namespace] = {**self._marks[namespace], **own}
        if namespace in self._untold:  # it goes beside the first rows
            self._untold[namespace].setdefault("checked", {}).update(own)
        else:
            self._store.describe(namespace, {"checked": own})

    def nearest(self, facts: Mapping[str, Any]) -> tuple[str, ...] | None:
        """In what the most similar description of the same class of module differs; ``None`` if there is none."""
        manifests = {} if self._store is None else self._store.manifests()
        others = [
            differences(facts, other)
            for namespace, other in manifests.items()
            if other.get("class") == facts["class"] and namespace != facts["namespace"]
        ]
        return min(others, key=len) if others else None

    def _explain_itself(self, facts: Mapping[str, Any]) -> None:
        """Say in the log why rows are computed although the same class of module has rows here."""
        nearest = self.nearest(facts)
        if nearest is not None:
            log.info(
                "%s: the store has rows of this class under another fingerprint; what differs: %s",
                self._name,
                ", ".join(nearest) or "nothing that is told in the manifests",
            )


def _mark_of(form: Form) -> str | None:
    """The name of a form in every process; ``None`` if it has something without content in it."""
    try:
        return digest(encode(_named(form))).hex()
    except NoContentError:
        return None


def _named(value: object) -> object:
    if isinstance(value, tuple):
        return tuple(map(_named, value))
    return f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else value


def _said_by(mark: object) -> tuple[TokenDims, frozenset[str]] | None:
    mark, same = (mark.get("dims"), mark.get("same")) if isinstance(mark, Mapping) else (mark, ())
    dims = _dims_of(mark)
    if dims is None or not isinstance(same, list | tuple) or not all(isinstance(name, str) for name in same):
        return None
    return dims, frozenset(same)


def _dims_of(mark: object) -> TokenDims | None:
    """A mark as it was left; ``None`` for anything else that somebody wrote there."""
    if not isinstance(mark, list | tuple) or not all(isinstance(dims, list | tuple) for dims in mark):
        return None
    if not all(type(dim) is int and 0 <= dim < 64 for dims in mark for dim in dims):
        return None
    return tuple(tuple(dims) for dims in mark)
