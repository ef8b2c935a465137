"""Cache directories under test: what is told in rows, children that may be killed, faults, and what must not change."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import select
import signal
import stat
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from modcache import CacheWarning
from modcache.rows import Layout, Rows
from tests.contracts import PAIR, VECTOR, answers, key, rows_of

__all__ = [
    "ERRORS",
    "IN_MEMORY",
    "LARGE",
    "LAYOUTS_ON_DISK",
    "SOAK",
    "WIDE",
    "Child",
    "Faults",
    "command",
    "files_in",
    "fork",
    "have",
    "key_of",
    "later",
    "namespaces_of",
    "needs_fork",
    "put",
    "quiet",
    "rows_told",
    "sizes_in",
    "snapshot",
    "told",
]

SOAK = os.environ.get("MODCACHE_SOAK") == "1"

IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""A folder where syncing costs nothing, for `dir=` of tempfile."""

WIDE = Layout("*", ((torch.int16, (20_000,)),))
"""Rows of 40 KB, still small enough to be gathered through a map."""
LARGE = Layout("*", ((torch.float32, (20_000,)),))
"""Rows of 80 KB, which are read one by one."""
LAYOUTS_ON_DISK = {"vector": VECTOR, "pair": PAIR, "wide": WIDE, "large": LARGE}

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
"""For tests whose children are forked; a forked child is milliseconds old where a spawned one imports torch."""

key_of = lru_cache(None)(key)


# --- rows that tell what they are -----------------------------------------------------------------------


@lru_cache(4096)
def told(number: int, layout: Layout = VECTOR) -> tuple[Layout, list[bytes]]:
    """The layout and the bytes that the row of this number has, however often it is written."""
    return layout, [
        tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in rows_told([number], layout).tensors
    ]


def rows_told(numbers: Sequence[int], layout: Layout = VECTOR) -> Rows:
    """The rows of these numbers, to be put under `key_of` each."""
    return rows_of([number % 120 for number in numbers], layout)  # every dtype of ours holds these exactly


def put(store, namespace: str, numbers: Sequence[int], layout: Layout = VECTOR) -> int:
    """Puts the rows of these numbers."""
    return store.put(namespace, [key_of(n) for n in numbers], rows_told(numbers, layout))


def have(store, namespace: str, numbers: Sequence[int], layout: Layout = VECTOR) -> set[int]:
    """Which of these rows the store has; each is compared with what it must be."""
    found = answers(store.get(namespace, [key_of(n) for n in numbers]))
    for place, row in found.items():
        want = told(numbers[place], layout)
        assert row == want, f"row {numbers[place]} of {namespace!r} is wrong: {_short(row)}, not {_short(want)}"
    return {numbers[place] for place in found}


def _short(row: tuple[Layout, list[bytes]]) -> str:
    return f"{row[0].tree} {[part[:16].hex() for part in row[1]]}"


@contextlib.contextmanager
def quiet(most: int | None = None) -> Iterator[list[str]]:
    """Collects the warnings of modcache: each text once, and at most so many; others are errors."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        texts: list[str] = []
        yield texts
    texts += [str(warning.message) for warning in caught]
    strange = [str(warning) for warning in caught if not issubclass(warning.category, CacheWarning)]
    assert strange == []
    assert len(texts) == len(set(texts)), f"a warning came twice: {texts}"
    assert most is None or len(texts) <= most, f"{len(texts)} warnings, not {most}: {texts}"


def later(monkeypatch: pytest.MonkeyPatch, hours: float) -> None:
    """Lets time pass."""
    real, real_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: real() + hours * 3600)
    monkeypatch.setattr(time, "time_ns", lambda: real_ns() + int(hours * 3600e9))


# --- what lies in a directory ---------------------------------------------------------------------------


def files_in(directory: Path) -> list[Path]:
    """All that is no folder, sorted."""
    return sorted(path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())


def sizes_in(directory: Path) -> int:
    """The bytes of all segment files."""
    return sum(path.stat().st_size for path in files_in(directory) if path.suffix in {".rows", ".log"})


def namespaces_of(directory: Path) -> list[Path]:
    """The folders of namespaces."""
    return sorted(path for path in (directory / "rows").iterdir() if path.is_dir())


def snapshot(*paths: Path) -> dict[str, object]:
    """Everything about these files that a change would show in."""
    seen: dict[str, object] = {}
    for top in paths:
        for path in [top, *top.rglob("*")] if top.is_dir() and not top.is_symlink() else [top]:
            facts = os.lstat(path)
            content: object = None
            if stat.S_ISREG(facts.st_mode):
                content = path.read_bytes()
            elif stat.S_ISLNK(facts.st_mode):
                content = os.readlink(path)
            folder = stat.S_ISDIR(facts.st_mode)
            seen[str(path)] = (facts.st_mode, facts.st_ino, None if folder else facts.st_mtime_ns, content)
    return seen


def command(name: str, directory: Path, *words: str) -> dict[str, Any]:
    """What a command of `modcache` reports, with its status; it raises nothing, whatever lies there."""
    from modcache.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([name, str(directory), *words, "--json"])
    assert "Traceback" not in err.getvalue()
    return {"status": status, "said": err.getvalue(), **(json.loads(out.getvalue()) if out.getvalue() else {})}


# --- children -------------------------------------------------------------------------------------------


class Child:
    """A forked child that runs a function of its own `say`, by which it tells its parent JSON values."""

    def __init__(self, function: Callable[[Callable[[Any], None]], Any]) -> None:
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
            self.pid = os.fork()
        if not self.pid:
            _run(function, reading, writing)
        os.close(writing)
        self._reading = reading
        self._rest = b""
        self.said: list[Any] = []
        self.status: int | None = None

    def hear(self, seconds: float = 60.0) -> Any:
        """The next thing that the child says; raises what it raised, `EOFError` when it is gone."""
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._reading], [], [], seconds)
            if not ready:
                self.kill()
                raise TimeoutError(f"the child was silent for {seconds} s; it had said {self.said[-3:]}")
            data = os.read(self._reading, 1 << 16)
            if not data:
                raise EOFError
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        kind, value = json.loads(line)
        if kind == "raised":
            self.wait()
            raise AssertionError(f"in the child:\n{value}")
        self.said.append(value)
        return value

    def kill(self) -> None:
        """Ends it as a power cut would."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> list[Any]:
        """All that it said until it ended; a message that was cut short is left out."""
        if self.status is None:
            with contextlib.suppress(EOFError):
                while self.status is None:
                    self.hear()
            if self.status is None:
                self.status = os.waitpid(self.pid, 0)[1]
                os.close(self._reading)
        return self.said

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        if self.status is None:
            self.kill()
            with contextlib.suppress(AssertionError):
                self.wait()


def _run(function: Callable[[Callable[[Any], None]], Any], reading: int, writing: int) -> None:
    """The life of a child; nothing of the parent's is run when it ends."""
    status = 1
    try:
        os.close(reading)
        torch.set_num_threads(1)  # as a worker of a DataLoader does: the threads of the parent are not here

        def say(value: Any, kind: str = "said") -> None:
            os.write(writing, json.dumps([kind, value]).encode() + b"\n")

        try:
            result = function(say)
            if result is not None:
                say(result)
            status = 0
        except BaseException:
            say(traceback.format_exc(), "raised")
    finally:
        os._exit(status)


def fork(function: Callable[[Callable[[Any], None]], Any]) -> list[Any]:
    """Runs a function in a forked child; all that it said, and what it returned as the last."""
    with Child(function) as child:
        said = child.wait()
        assert child.status == 0, f"the child ended with {child.status} after {said[-3:]}"
        return said


# --- faults ---------------------------------------------------------------------------------------------


class Faults:
    """Counts the calls of the system that the disk store makes, and lets some of them fail.

    Args:
        decide: the number and the name of a call → an errno with which it fails, ``"kill"`` to die before it,
            ``"half"`` to die after half of what it writes, ``"short"`` to write half, or None.
        names: the calls that count; None for all, also those that only look.
    """

    WRITES = ("write", "pwrite", "pwritev", "writev")
    CHANGES = (*WRITES, *"open fsync fdatasync ftruncate truncate rename replace unlink mkdir rmdir link utime".split())
    NAMES = (*CHANGES, *"listdir scandir stat lstat fstat read pread preadv".split())

    def __init__(self, decide: Callable[[int, str], int | str | None], names: Sequence[str] | None = None) -> None:
        self.decide = decide
        self.names = [name for name in names or self.NAMES if hasattr(os, name)]
        self.also_looks = names is None
        self.calls: list[str] = []
        self._lock = threading.Lock()

    def __enter__(self):
        self._real = {name: getattr(os, name) for name in self.names}
        self._ours = {name: self._wrapped(name, real) for name, real in self._real.items()}
        for name, real in self._real.items():
            setattr(os, name, self._ours[name])
            for group in self._groups(real):
                group.add(self._ours[name])
        return self

    def __exit__(self, *_: object) -> None:
        for name, real in self._real.items():
            setattr(os, name, real)
            for group in self._groups(real):
                group.discard(self._ours[name])

    @staticmethod
    def _groups(real: object) -> list[set[Any]]:
        """The sets of the module os that tell what a function can do."""
        return [group for group in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks) if real in group]

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            looks = name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not _from_the_store() or (looks and not self.also_looks):
                return real(*args, **kwargs)
            with self._lock:
                number = len(self.calls)
                self.calls.append(name)
            what = self.decide(number, name)
            if isinstance(what, int):
                raise OSError(what, os.strerror(what), f"call {number}: {name}")
            if what in ("half", "short") and name in self.WRITES:
                count = _half(real, name, *args)
                if what == "short":
                    return count
            if what in ("kill", "half"):
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)
            return real(*args, **kwargs)

        return call


ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)


def _from_the_store() -> bool:
    frame = sys._getframe(2)
    for _ in range(5):
        if "/stores/disk/" in frame.f_code.co_filename:
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def _half(real: Callable[..., Any], name: str, file: int, data: Any, *rest: Any) -> int:
    if name in ("write", "pwrite"):
        view = memoryview(data).cast("B")
        return real(file, view[: (len(view) + 1) // 2], *rest)
    views = [memoryview(part).cast("B") for part in data]
    left = (sum(map(len, views)) + 1) // 2
    parts = []
    for view in views:
        parts.append(view[:left])
        left -= len(parts[-1])
    return real(file, parts, *rest)
