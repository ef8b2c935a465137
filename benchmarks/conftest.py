"""What the benchmarks have in common: sizes, threads, rounds side by side, and the report of a measured run.

Without ``--benchmark-enable`` each benchmark runs once, small, as a test of its answer, and no time is judged.
"""

from __future__ import annotations

import datetime as dt
import gc
import itertools
import json
import os
import platform
import re
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

RESULTS = Path(__file__).parent / "results"


# --- sizes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """How large a benchmark is."""

    rows: int  # of one call
    width: int = 768  # float32 values in an output row: a row of BERT, 3 KB
    stored: int = 10_000  # rows in the store: 30 MB, so that a batch is not in the cache of the processor already
    rounds: int = 400  # of each side; p99 is then the fourth worst

    def small(self) -> Case:
        """The same as a test: the answer is looked at, the time is not."""
        return replace(self, rows=min(self.rows, 32), stored=min(self.stored, 128), rounds=2)


FEW = Case(rows=8)  # what is left when rows cost next to nothing: the overhead of a call
BATCH = Case(rows=256)  # the batch that the goals of hits are about
BATCHES = (FEW, Case(rows=64), BATCH, Case(rows=1024))  # how costs grow with the batch


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config) -> bool:
    """Whether times are measured; otherwise the benchmarks are tests."""
    return _is_measured(pytestconfig)


def _is_measured(config: pytest.Config) -> bool:
    enabled = config.getoption("benchmark_enable", default=False)
    return bool(enabled or not config.getoption("benchmark_disable", default=True))


# --- threads --------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread of torch: for hits, which are too short to be shared out."""
    yield from _threads(1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads of torch: for epochs, in which models run."""
    yield from _threads(2)


def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


# --- side by side ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """Seconds of one side, round by round."""

    seconds: np.ndarray

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def p90(self) -> float:
        return float(np.percentile(self.seconds, 90))

    @property
    def p99(self) -> float:
        return float(np.percentile(self.seconds, 99))


@dataclass(frozen=True)
class Sides:
    """What `side_by_side` measured, by the names of the functions."""

    times: dict[str, Times]

    def median(self, name: str) -> float:
        return self.times[name].median

    def ratio(self, name: str, other: str) -> float:
        """How many times as long one took as the other.

        The median of the rounds' own ratios: what slows the machine down for a while slows both.
        """
        return float(np.median(self.times[name].seconds / self.times[other].seconds))


def side_by_side(
    rounds: int, inputs: Callable[[int], tuple[Any, ...]] | None = None, /, **sides: Callable[..., Any]
) -> Sides:
    """Run functions in turn, each once a round, in changing order, and time each call.

    Args:
        rounds: how often; an eighth more are run first and forgotten.
        inputs: gives the arguments of a round to all of its calls, outside the timer.
        sides: the functions by name. What they return is dropped outside the timer.
    """
    names = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    warm = rounds // 8 + 1
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds + warm):
            arguments = inputs(turn) if inputs is not None else ()
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                function = sides[name]
                began = time.perf_counter()
                answer = function(*arguments)
                seconds[name].append(time.perf_counter() - began)
                del answer
    finally:
        gc.enable()
    return Sides({name: Times(np.array(taken[warm:])) for name, taken in seconds.items()})


def cycled(batches: Iterable[Any]) -> Callable[[int], tuple[Any, ...]]:
    """Inputs for `side_by_side`: each round gets the next of these batches, from the first again after the last."""
    kept = list(batches)
    return lambda turn: (kept[turn % len(kept)],)


def in_groups(batches: Sequence[Any], size: int) -> Callable[[int], tuple[Any, ...]]:
    """As `cycled`, for sides that are `each` of so many batches: a round gets the next group."""
    return cycled([batches[at : at + size] for at in range(0, len(batches), size)])


def each(side: Callable[[Any], torch.Tensor]) -> Callable[[Sequence[Any]], None]:
    """Calls a side with one batch after the other, as a loop does that uses nothing else.

    Against a side that is many times slower this is what compares them: such a side empties the processor's caches,
    and a single call after it would be slowed down by what no loop has in it.
    """

    def run(batches: Sequence[Any]) -> None:
        for batch in batches:
            side(batch)

    return run


# --- the report -----------------------------------------------------------------------------------------


class Report(Protocol):
    """Takes down what was measured; does nothing in a run that measures nothing."""

    def goal(self, what: str, measured: float, *, at_most: float | None = None, at_least: float | None = None) -> None:
        """A number that was to be reached."""

    def sides(self, what: str, sides: Sides) -> None:
        """Times that were measured side by side."""

    def number(self, what: str, value: float, unit: str) -> None:
        """A number that is good to know."""


@dataclass
class _Results:
    goals: dict[str, dict[str, Any]] = field(default_factory=dict)
    timings: dict[str, dict[str, Any]] = field(default_factory=dict)
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def goal(self, what: str, measured: float, *, at_most: float | None = None, at_least: float | None = None) -> None:
        assert (at_most is None) != (at_least is None), "a goal is a bound on one side"
        met = measured <= at_most if at_most is not None else at_least is not None and measured >= at_least
        bound = f"≤ {at_most:g}" if at_most is not None else f"≥ {at_least:g}"
        self.goals[what] = {"goal": bound, "measured": round(measured, 4), "met": bool(met), "at": _now()}

    def sides(self, what: str, sides: Sides) -> None:
        for name, times in sides.times.items():
            micros = {key: round(value * 1e6, 2) for key, value in _quantiles(times).items()}
            self.timings[f"{what}: {name}"] = {**micros, "rounds": len(times.seconds), "at": _now()}

    def number(self, what: str, value: float, unit: str) -> None:
        self.numbers[what] = {"value": round(value, 4), "unit": unit, "at": _now()}


def _quantiles(times: Times) -> dict[str, float]:
    return {"median_us": times.median, "p90_us": times.p90, "p99_us": times.p99}


def _now() -> str:
    return dt.datetime.now(dt.timezone.utc).isoformat(timespec="minutes")


class _Silent:
    def goal(self, what: str, measured: float, *, at_most: float | None = None, at_least: float | None = None) -> None:
        pass

    def sides(self, what: str, sides: Sides) -> None:
        pass

    def number(self, what: str, value: float, unit: str) -> None:
        pass


_RESULTS = pytest.StashKey[_Results]()


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config, measured: bool) -> Report:
    """Where results go: a table at the end of the run, and ``results/<date>-<machine>.json``."""
    if not measured:
        return _Silent()
    results = _Results()
    pytestconfig.stash[_RESULTS] = results
    return results


@dataclass(frozen=True)
class Machine:
    """What the numbers were measured on."""

    name: str
    processor: str
    cores: int
    memory_gib: float
    system: str
    versions: dict[str, str]


def this_machine() -> Machine:
    """The machine that this runs on, and the versions of what matters on it."""
    processor, cores = _processor(), os.cpu_count() or 1
    words = re.findall(r"[a-z0-9]+", processor.lower().replace("(r)", "").replace("(tm)", ""))
    names = ("torch", "numpy", "xxhash", "transformers", "torchcache", "torch-module-cache", "modcache")
    return Machine(
        name=f"{'-'.join(words)}-{cores}-cores",
        processor=processor,
        cores=cores,
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        system=f"{platform.system()} {platform.release()}",
        versions={"python": platform.python_version(), **{name: version(name) for name in names}},
    )


def _processor() -> str:
    """The processor by its model's name, which `platform` does not tell on Linux."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _result_file(machine: Machine) -> Path:
    today = dt.datetime.now(dt.timezone.utc).date().isoformat()
    return RESULTS / f"{today}-{machine.name}.json"


def _written(results: _Results, command: str) -> Path:
    """Write the results into the day's file; what a run of a part of the benchmarks did not measure stays there."""
    machine = this_machine()
    file = _result_file(machine)
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    merged = {
        "machine": asdict(machine),
        "command": command,
        **{kind: {**before.get(kind, {}), **found} for kind, found in asdict(results).items()},
    }
    RESULTS.mkdir(exist_ok=True)
    file.write_text(json.dumps(merged, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def goals_table(goals: dict[str, dict[str, Any]]) -> list[str]:
    """The goals as a table in Markdown, as `README.md` shows it."""
    lines = ["| what | goal | measured | met |", "|---|---|---|---|"]
    for what, found in goals.items():
        met = "yes" if found["met"] else "**no**"
        lines.append(f"| {what} | {found['goal']} | {found['measured']:.4g} | {met} |")
    return lines


def _timings_table(timings: dict[str, dict[str, Any]]) -> list[str]:
    width = max(map(len, timings), default=0)
    lines = [f"{'µs':<{width}} {'median':>12} {'p90':>12} {'p99':>12}"]
    for what, found in timings.items():
        cells = "".join(f" {found[key]:>12.1f}" for key in ("median_us", "p90_us", "p99_us"))
        lines.append(f"{what:<{width}}{cells}")
    return lines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash.get(_RESULTS, None)
    if results is None:
        return
    terminalreporter.section("times, side by side")
    numbers = [f"{what}: {found['value']:g} {found['unit']}" for what, found in results.numbers.items()]
    for line in itertools.chain(_timings_table(results.timings), numbers):
        terminalreporter.write_line(line)
    terminalreporter.section("goals")
    for line in goals_table(results.goals):
        terminalreporter.write_line(line)
    command = " ".join(["pytest", *map(str, config.invocation_params.args)])
    terminalreporter.write_line(f"\nwritten to {_written(results, command)}")


if __name__ == "__main__":  # python benchmarks/conftest.py FILE: the table of a recorded run, for the README
    print("\n".join(goals_table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["goals"])))
