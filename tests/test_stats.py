"""What calls did adds up, and prints as a small table."""

import copy
import dataclasses
import pickle
import threading

import pytest
import torch
from torch import nn

from modcache import CallReport, Stats, cache_of, cached_module, mode
from modcache.stats import Counters, Seconds

from .models import encoder


def test_counters_add_up():
    """Rows of all calls are hits, computed or bypassed, bypassed ones by reason."""
    counters = Counters()
    counters.add(4, computed=4, seconds=(1.0, 2.0, 8.0, 3.0))
    counters.add(6, hits=5, computed=1, seconds=(1.0, 0.0, 2.0, 0.0))
    counters.add(3, bypassed=3, reason="mode off")
    counters.add(2, bypassed=2, reason="no key")
    counters.add(1, bypassed=1, reason="no key")
    assert counters.snapshot(99) == Stats(
        calls=5, rows=16, hits=5, computed=5, bypassed=6, reasons={"mode off": 3, "no key": 3}, bytes=99,
        seconds=Seconds(2.0, 2.0, 10.0, 3.0), seconds_saved=5 * 2.0 - 7.0,
    )  # fmt: skip


def test_what_was_saved_is_not_known_where_nothing_was_computed():
    """A second run that is served from a directory has no time of its own to compare with, and does not say 0."""
    assert str(Stats(calls=1, rows=4, hits=4)).splitlines()[-1] == "saved      not known: no row was computed"
    assert str(Stats()).splitlines()[-1] == "saved      0.000 s"


def test_nothing_saved():
    """Time saved is never negative, and nothing before the first row was computed."""
    counters = Counters()
    assert counters.snapshot(0) == Stats()
    counters.add(4, hits=4, seconds=(1.0, 1.0, 0.0, 0.0))
    assert counters.snapshot(0).seconds_saved == 0.0
    counters.add(1, computed=1, seconds=(9.0, 0.0, 0.5, 0.0))
    assert counters.snapshot(0).seconds_saved == 0.0


def test_hit_rate():
    """Hits as a share of all rows; 0.0 before the first."""
    assert Stats().hit_rate == 0.0
    assert Stats(rows=8, hits=6).hit_rate == 0.75


TABLE = """\
rows       12345  in 7 calls
hits        6172  50.0 %
computed    6170
bypassed       3
               2  no key
               1  mode off
held       1.5 MiB
seconds    keys 0.100, lookup 0.200, computing 3.000, storing 0.400
saved      2.300 s"""


def test_table():
    """Stats print as a table, one line per count and per reason."""
    stats = Stats(
        calls=7, rows=12345, hits=6172, computed=6170, bypassed=3, reasons={"no key": 2, "mode off": 1},
        bytes=3 << 19, seconds=Seconds(0.1, 0.2, 3.0, 0.4), seconds_saved=2.3,
    )  # fmt: skip
    assert str(stats) == TABLE


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 30, "5.0 GiB"), (3 << 40, "3.0 TiB")]
)
def test_bytes(count, text):
    """Bytes are told in the unit that fits."""
    assert f"held       {text}\n" in str(Stats(bytes=count))


def test_facts_are_frozen():
    """Nobody can change what was counted, and what was handed out counts no further."""
    module = cached_module(encoder(), freeze=True)
    stats = cache_of(module).stats
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.rows = 3
    stats.reasons["invented"] = 1
    with mode("off"):
        module(torch.eye(3))
    assert cache_of(module).stats.reasons == {"mode off": 3}
    assert stats == Stats(reasons={"invented": 1})


def test_statistics_travel():
    """A worker can send them to the process that waits for it, and a log can write them down."""
    stats = Stats(calls=1, rows=2, bypassed=2, reasons={"mode off": 2})
    assert pickle.loads(pickle.dumps(stats)) == copy.deepcopy(stats) == stats
    assert dataclasses.asdict(stats)["reasons"] == {"mode off": 2}


def test_a_hook_hears_of_every_call():
    """A hook gets one frozen report per call until it is removed."""
    module = cached_module(encoder(), freeze=True)
    reports = []
    handle = cache_of(module).add_hook(reports.append)
    for batch in (torch.eye(3), torch.eye(3), torch.zeros(0, 3)):
        module(batch)
    handle.remove()
    handle.remove()
    module(torch.eye(3))
    assert [(report.rows, report.hits, report.computed, report.bypassed, report.reason) for report in reports] == [
        (3, 0, 3, 0, None),
        (3, 3, 0, 0, None),
        (0, 0, 0, 0, "empty batch"),
    ]
    assert all(type(report) is CallReport and report.module == "CountingEncoder" for report in reports)
    assert reports[0].namespace == cache_of(module).namespace
    assert reports[0].seconds.computing > 0


@pytest.mark.parametrize("hook", [None, 3])
def test_a_hook_is_a_function(hook):
    """What cannot be called is refused when it is given, not told of in each call."""
    module = cached_module(encoder(), freeze=True)
    with pytest.raises(TypeError, match=rf"add_hook\(...\) takes a function of a CallReport; found {hook}"):
        cache_of(module).add_hook(hook)


def test_a_failing_hook_does_not_break_the_loop():
    """What a hook raises is told once."""
    module = cached_module(encoder(), freeze=True)

    def broken(report):
        raise ZeroDivisionError("oh")

    cache_of(module).add_hook(broken)
    with pytest.warns(UserWarning, match="its hook .* raised ZeroDivisionError: oh; the run goes on"):
        first = module(torch.eye(3))
    assert torch.equal(module(torch.eye(3)), first)


def test_twins_are_hits():
    """A row that occurs twice in one call is computed once."""
    module = cached_module(encoder(), freeze=True)
    module(torch.eye(3)[[0, 1, 0, 0]])
    assert (cache_of(module).stats.computed, cache_of(module).stats.hits) == (2, 2)


def test_counting_from_many_threads():
    """No call is lost."""
    counters = Counters()

    def work():
        for _ in range(200):
            counters.add(2, hits=1, bypassed=1, reason="x")

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = counters.snapshot(0)
    assert (found.calls, found.rows, found.hits, found.bypassed) == (1600, 3200, 1600, 1600)


def test_no_call_at_all_says_what_counts_as_one():
    """Whoever wraps a model and calls its `encode` reads in the report why there are no rows."""

    class Coder(nn.Linear):
        def encode(self, x):
            return super().forward(x)

    coder = cached_module(Coder(3, 2), freeze=True)
    coder.encode(torch.eye(3))
    assert "not cached" in str(cache_of(coder).stats).splitlines()[0]
    coder(torch.eye(3))
    assert str(cache_of(coder).stats).splitlines()[0].endswith("in 1 calls")


def test_a_hit_is_counted_as_any_call():
    """What is counted of a call all of whose rows were served is what it would be by the way of all calls."""
    short, full = Counters(), Counters()
    for rows in (3, 256):
        short.add_hits(rows, 0.25, 0.5)
        full.add(rows, rows, seconds=(0.25, 0.5, 0.0, 0.0))
    assert short.snapshot(8) == full.snapshot(8)
    assert short.snapshot(8).hits == 259
