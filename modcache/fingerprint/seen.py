"""What a reading of a module came across: the facts to digest, and the places to look at again."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import contextvars
    import threading
    import types

    import numpy as np
    import torch
    from torch import nn


@dataclasses.dataclass(slots=True)
class Seen:
    """Everything that values and code referred to, each thing once and by identity.

    The objects are held, so that an ``id`` used as a key stays unique for as long as the record is used.
    """

    opaque: dict[str, object] = dataclasses.field(default_factory=dict)
    """What counted by its class only, by readable names."""
    sealed: dict[str, None] = dataclasses.field(default_factory=dict)
    """Readable names of what holds weights that cannot be read."""
    reached: dict[str, set[bytes]] = dataclasses.field(default_factory=dict)
    """Functions, classes and constants that code refers to by global names, with the digest of each."""
    fields: dict[str, bytes] = dataclasses.field(default_factory=dict)
    """Named places (attributes, fields of objects, closure variables, globals) with the bytes read there."""
    shared: dict[str, bytes] = dataclasses.field(default_factory=dict)
    """The bytes at places of which ``fields`` only says that they share an object that another place names."""
    mappings: dict[int, dict[Any, object]] = dataclasses.field(default_factory=dict)
    """Dicts of which every item counts: dict attributes and the ``__dict__`` of config-like objects."""
    partial: dict[int, tuple[dict[Any, object], tuple[str, ...]]] = dataclasses.field(default_factory=dict)
    """Dicts of which only these names count, because a forward changes the others."""
    sequences: dict[int, Any] = dataclasses.field(default_factory=dict)
    """Lists, sets and deques of which every item counts."""
    slotted: dict[int, tuple[object, tuple[str, ...], tuple[str, ...]]] = dataclasses.field(default_factory=dict)
    """Objects with slots, the names of those that count, and of those that are empty."""
    memories: dict[int, Any] = dataclasses.field(default_factory=dict)
    """Arrays of the standard library and memoryviews, of which the bytes count."""
    variables: dict[int, contextvars.ContextVar[Any]] = dataclasses.field(default_factory=dict)
    locals: dict[int, threading.local] = dataclasses.field(default_factory=dict)
    globals: dict[int, tuple[dict[str, object], dict[str, object]]] = dataclasses.field(default_factory=dict)
    """Namespaces of Python modules, and the names in them that code reads with what they were bound to."""
    of_libraries: dict[int, tuple[dict[str, object], dict[str, object]]] = dataclasses.field(default_factory=dict)
    """The same for Python modules of libraries, in which hardly anybody ever puts something else."""
    absent: dict[str, None] = dataclasses.field(default_factory=dict)
    """Python modules that code imports when it runs, and that nobody imported yet."""
    cells: dict[int, tuple[types.CellType, object]] = dataclasses.field(default_factory=dict)
    functions: dict[int, types.FunctionType] = dataclasses.field(default_factory=dict)
    classes: dict[int, type] = dataclasses.field(default_factory=dict)
    busy: dict[type, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Classes of which a forward changes some attribute, with the names of the others."""
    tensors: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """Tensors that are not registered: in attributes, lists, closures and globals."""
    arrays: dict[str, np.ndarray[Any, Any]] = dataclasses.field(default_factory=dict)
    modules: dict[str, nn.Module] = dataclasses.field(default_factory=dict)
    """Modules that are not registered: in attributes, lists and closures."""

    def refer(self, namespace: dict[str, object], name: str, value: object) -> None:
        """Remember that code reads ``name`` from a namespace."""
        self.globals.setdefault(id(namespace), (namespace, {}))[1][name] = value

    def refer_to_library(self, namespace: dict[str, object], name: str, value: object) -> None:
        """Remember that code reads ``name`` from the namespace of a library."""
        self.of_libraries.setdefault(id(namespace), (namespace, {}))[1][name] = value

    def reach(self, name: str, content: bytes) -> None:
        """Remember what a global name leads to (two things of one name are both kept)."""
        self.reached.setdefault(name, set()).add(content)
