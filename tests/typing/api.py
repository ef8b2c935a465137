"""The public interface as users write it: type-checked by mypy, never run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modcache import (
    Advice,
    Cache,
    CacheMissError,
    CacheWarning,
    CallReport,
    CutError,
    DiskStore,
    Explanation,
    FormatVersionError,
    KeyExtractionError,
    LayeredError,
    MemoryStore,
    ModcacheError,
    NotCachedError,
    StaleRecordError,
    Stats,
    Store,
    TieredStore,
    UsageError,
    UsageTypeError,
    advise,
    cache_of,
    cached_module,
    is_cached,
    keys,
    keys_for,
    mode,
    recycle,
    register_key_extractor,
    uncached,
)


class Encoder(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


# An instance stays what it was.
encoder: Encoder = cached_module(Encoder(), freeze=True)
width: int = cached_module(Encoder(), key="tokens", store=MemoryStore(1 << 20)).width
plain: Encoder = uncached(encoder)
known: bool = is_cached(encoder)
of_class: bool = is_cached(Encoder)


# A class stays the class, with and without parentheses.
@cached_module
class Bare(nn.Module):
    size: int = 3


@cached_module(key=keys.path("stat"), freeze=True, version="2", verify=0.01, per_row=True, broadcast=("mask",))
class Called(nn.Module):
    size: int = 3


bare: Bare = Bare()
called: Called = Called()
size: int = bare.size + called.size


def prepare(rows: Sequence[str]) -> tuple[torch.Tensor]:
    return (torch.zeros(len(rows)),)


prepared: Encoder = cached_module(Encoder(), prepare=prepare, key=keys.custom(lambda row: str(row)[:3]))
extracted = [keys.text(), keys.tensor(), keys.tokens(), keys.path()]

# Stores.
tiered = TieredStore(MemoryStore(max_bytes=None, device="cpu", eviction="lru"), MemoryStore())
store: Store = tiered
disk: Store = DiskStore("cache", max_bytes=1 << 30, mmap=False, keep_free=0)
own: Encoder = cached_module(Encoder(), store=store)

# See through.
cache: Cache = cache_of(encoder)
stats: Stats = cache.stats
hits: int = stats.hits
rate: float = stats.hit_rate
reasons: int = stats.reasons["no key"]
stored: list[bool] = cache.contains(torch.zeros(2), cache_keys=[1, 2])
why: list[Explanation] = cache.explain(torch.zeros(2))
first: tuple[int, bool, str] = (why[0].row, why[0].hit, why[0].reason)
namespace: str = cache.namespace
manifest: dict[str, Any] = cache.manifest
moved: bool = cache.recheck()
dropped: int = cache.forget(torch.zeros(2)) + cache.clear()
where: Store = cache.store
cache.flush()
cache.close()


def listen(report: CallReport) -> None:
    rows: int = report.rows
    seconds: float = report.seconds.computing


handle = cache.add_hook(listen)
handle.remove()

# Recycling.
advice: Advice = advise(Encoder(), torch.zeros(2), rows=10, epochs=2, candidates=["inner"], store="cache/")
where_to_cut: str = advice.best.at if advice.best is not None else advice.reason
speedups: list[float] = [cut.ratio for cut in advice.cuts]
recycled: Encoder = recycle(Encoder(), at="inner", extra=True, store=MemoryStore())
crossing: str = str(cache_of(recycled).cut)

# Keys and modes.
with mode("read-only"), keys_for(torch.arange(3)):
    encoder(torch.zeros(3))
mode("off")


@dataclass
class Clip:
    name: str


@register_key_extractor(Clip)
def clip_key(clip: Clip) -> str:
    return clip.name


text: str = clip_key(Clip("a"))

# Errors are the built-in ones, too.
value_errors: list[type[ValueError]] = [
    UsageError,
    NotCachedError,
    KeyExtractionError,
    FormatVersionError,
    CutError,
]
type_errors: list[type[TypeError]] = [UsageTypeError, KeyExtractionError]
others: tuple[type[RuntimeError], type[RuntimeError], type[KeyError]] = (LayeredError, StaleRecordError, CacheMissError)
warning: type[UserWarning] = CacheWarning
root: type[Exception] = ModcacheError
