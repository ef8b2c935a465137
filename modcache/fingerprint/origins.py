"""What settings say of where a model came from and how it was saved, which is not what it is."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .code import of_library

__all__ = ["ORIGIN_NAMES", "as_loaded", "origins_in"]

# Moving a folder must not empty a cache. The last is how diffusers lists, in the order of a set, which settings its
# file did not have.
ORIGIN_NAMES = frozenset(
    """_name_or_path name_or_path transformers_version _diffusers_version _commit_hash _use_default_values""".split()
)
_IN_TIMM = frozenset({"url", "file", "source", "hf_hub_id", "hf_hub_filename"})

_CONFIGURATIONS = frozenset({"PreTrainedConfig", "PretrainedConfig"})  # of transformers 5, and before


def origins_in(value: Mapping[object, object], path: str) -> frozenset[str]:
    """The names of items of a mapping that say where a model came from."""
    if path.endswith((".pretrained_cfg", ".default_cfg")) or path in ("pretrained_cfg", "default_cfg"):
        return _IN_TIMM
    # A class made for settings may hold them, as diffusers has one.
    return frozenset() if of_library(type(value).__module__) else ORIGIN_NAMES


def as_loaded(value: object, fields: Mapping[str, object]) -> Mapping[str, object]:
    """The attributes of an object as they were before it was saved.

    ``save_pretrained`` of transformers notes in the configuration of the model in memory which class saved it, and
    says the type of its weights in words: a checkpoint in the middle of training would empty the cache.
    """
    if _CONFIGURATIONS.isdisjoint(base.__name__ for base in type(value).__mro__ if _is_theirs(base)):
        return fields
    kept = {name: item for name, item in fields.items() if name != "architectures"}
    if isinstance(said := kept.get("dtype"), torch.dtype):
        kept["dtype"] = str(said).removeprefix("torch.")
    return kept


def _is_theirs(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "transformers"
