"""What an entry of the index costs in resident memory, and a look-up of 256 keys, up to ten million entries."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from benchmarks.conftest import Report

# In a process of its own: resident memory says little where other tests ran before.
FILLING = """
import ctypes, gc, json, os, sys, time
import numpy as np
from modcache.stores.index import KeyIndex, cut_keys

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

count, chance, batch = int(sys.argv[1]), np.random.default_rng(0), 256
warm = KeyIndex()
warm.set(cut_keys(chance.bytes(16 * 50_000)), np.arange(50_000))
del warm
index, before, seconds, longest = KeyIndex(), resident(), 0.0, 0.0
kept = [[] for _ in range(200)]
for start in range(0, count, batch):
    keys = cut_keys(chance.bytes(16 * min(batch, count - start)))
    began = time.perf_counter()
    index.set(keys, np.arange(start, start + len(keys)))
    took = time.perf_counter() - began
    seconds, longest = seconds + took, max(longest, took)
    kept[chance.integers(200)].append((start, keys[0]))
bytes_each = (resident() - before) / count
batches = [(places, keys) for places, keys in (zip(*pairs) for pairs in kept if pairs)]
places, keys = [p for part, _ in batches for p in part], [k for _, part in batches for k in part]
order = chance.permutation(len(keys))
found = []
for at in range(0, len(keys) - batch + 1, batch):
    wanted = [keys[i] for i in order[at : at + batch]]
    right = [places[i] for i in order[at : at + batch]]
    began = time.perf_counter()
    got = index.find(wanted)
    found.append(time.perf_counter() - began)
    assert got.tolist() == right
absent = cut_keys(chance.bytes(16 * batch))
assert index.find(absent).max() == -1
print(json.dumps({
    "bytes": bytes_each, "find": float(np.median(found)) if found else None,
    "p99": float(np.quantile(found, 0.99)) if found else None, "set": seconds / count, "longest": longest,
}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("count", [100_000, 1_000_000, 10_000_000])
def test_index(count: int, measured: bool, report: Report) -> None:
    """Random 16-byte keys that came in batches of 256."""
    if not measured and count > 100_000:
        pytest.skip("takes a minute: only with --benchmark-enable")
    command = [sys.executable, "-c", FILLING, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)  # noqa: S603 - our own text
    found = json.loads(done.stdout)
    millions = f"{count / 1e6:g} M entries"
    if count >= 1_000_000:
        report.goal(f"index, bytes an entry at {millions}", found["bytes"], at_most=64)
    if count == 10_000_000:
        report.goal(f"index, µs to find 256 keys at {millions}", found["find"] * 1e6, at_most=150)
    report.number(f"index, find 256 keys at {millions}, median", (found["find"] or 0) * 1e6, "µs")
    report.number(f"index, find 256 keys at {millions}, p99", (found["p99"] or 0) * 1e6, "µs")
    report.number(f"index, set a key at {millions}", found["set"] * 1e6, "µs a key")
    report.number(f"index, longest set of 256 keys up to {millions}", found["longest"] * 1e3, "ms")
