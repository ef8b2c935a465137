"""How much memory a bounded store holds, and what importing modcache costs; each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from benchmarks.conftest import Report

FILLING = """
import json, sys
import torch
from modcache import MemoryStore, cache_of, cached_module

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmRSS"))

max_bytes, width, dtype = int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])
count = 500 if width < 1000 else 50

class Repeated(torch.nn.Module):
    def forward(self, numbers):
        return numbers.to(dtype).expand(len(numbers), width)

def batch(number):
    return (torch.arange(count) + count * number)[:, None]

torch.set_num_threads(1)
encoder = cached_module(Repeated(), store=MemoryStore(4 * count * width * dtype.itemsize), freeze=True)
encoder(batch(0)), encoder(batch(0))
encoder = cached_module(Repeated(), store=MemoryStore(max_bytes), freeze=True)
before = resident()
number = 0
while number * count * width * dtype.itemsize <= max_bytes:  # a batch more than fits
    encoder(batch(number))
    number += 1
assert cache_of(encoder).store.stats().refused > 0
hits = cache_of(encoder).stats.hits
again = encoder(batch(0))
assert torch.equal(again, batch(0).to(dtype).expand(count, width))
assert cache_of(encoder).stats.hits - hits == count
stats = cache_of(encoder).store.stats()
print(json.dumps({"resident": resident() - before, "counted": stats.bytes, "rows": stats.rows}))
"""

IMPORTING = """
import gc, json, sys, time
import torch
gc.collect()  # what torch left behind would be collected in the midst of the next import, whichever that is
before = set(sys.modules)
began = time.perf_counter()
import modcache
seconds = time.perf_counter() - began
print(json.dumps({"seconds": seconds, "modules": sorted(set(sys.modules) - before)}))
"""


def run(code: str, *arguments: object, **environment: str) -> dict[str, Any]:
    """What a script prints, run by an interpreter of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    around = {**os.environ, **environment}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=around)  # noqa: S603 - our own script
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("width", "dtype"), [(768, "float32"), (50 * 768, "float16"), (16, "float32")])
def test_memory_held(width: int, dtype: str, measured: bool, report: Report) -> None:
    """The resident memory that a full store takes, against its bound: rows of 3 KB, of 75 KB, and of 64 bytes."""
    max_bytes = (400 << 20 if width > 16 else 64 << 20) if measured else 32 << 20 if width > 16 else 4 << 20
    found = run(FILLING, max_bytes, width, dtype)
    assert found["counted"] <= max_bytes
    assert found["rows"] * width * (4 if dtype == "float32" else 2) <= max_bytes
    size = width * (4 if dtype == "float32" else 2)
    report.number(f"resident memory, rows of {size} B, bound {max_bytes >> 20} MiB", found["resident"] / 2**20, "MiB")
    name = f"max_bytes, full store, rows of {size} B"
    report.goal(f"resident memory ÷ {name}", found["resident"] / max_bytes, at_most=1.05)
    report.goal(f"bytes counted ÷ {name}", found["counted"] / max_bytes, at_least=0.95)


def test_import(measured: bool, report: Report) -> None:
    """`import modcache` after `import torch`: quick, and without what only a directory needs."""
    # An environment that keeps no bytecode would have modcache compiled each time, and torch not.
    found = [run(IMPORTING, PYTHONDONTWRITEBYTECODE="") for _ in range(12 if measured else 1)]
    loaded = {name.partition(".")[0] for name in found[0]["modules"]}
    assert "modcache" in loaded
    assert not loaded & {"diskcache", "sqlite3", "_sqlite3", "transformers", "PIL"}
    seconds = float(np.median([one["seconds"] for one in found[1:] or found]))
    report.goal("import modcache on top of torch, ms", seconds * 1e3, at_most=50)
