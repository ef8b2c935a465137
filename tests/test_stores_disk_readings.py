"""What a store knows of a directory, after an interrupt in the middle of finding that out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from modcache import DiskStore
from modcache.stores.disk import reading
from tests.directories import have, put, quiet

STORES = str(Path(reading.__file__).parents[1])
FILES = tuple(
    f"{STORES}/{name}.py" for name in ("index", "disk/reading", "disk/group", "disk/window", "disk/statements")
)
NAMESPACE = "cd" * 16


class Interrupting:
    """Raises KeyboardInterrupt at a line of what changes a reading, counted from the first one on."""

    def __init__(self, line: int) -> None:
        self.left = line

    def __enter__(self):
        sys.settrace(self._called)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _called(self, frame, event, _):
        return self._at_line if frame.f_code.co_filename in FILES else None

    def _at_line(self, frame, event, _):
        if event == "line":
            self.left -= 1
            if not self.left:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._at_line


OPERATIONS = {
    "get": lambda store: have(store, NAMESPACE, range(30)),
    "put": lambda store: put(store, NAMESPACE, range(40, 50)),
    "put again": lambda store: put(store, NAMESPACE, range(20, 30)),
    "row_keys": lambda store: store.row_keys(NAMESPACE),
    "contains": lambda store: store.contains(NAMESPACE, [bytes(16)]),
    "stats": lambda store: store.stats(),
}


@pytest.mark.skipif(sys.gettrace() is not None, reason="somebody else traces")
@pytest.mark.parametrize("what", OPERATIONS)
def test_interrupts(what, swift_path):
    """An interrupt anywhere leaves the store with all rows, ready for more, and what was put before is written."""
    line = 1
    while True:
        directory = swift_path / f"cache-{line}"
        with quiet(0), DiskStore(directory) as other, DiskStore(directory) as store:
            put(other, NAMESPACE, range(10))
            other.flush()
            assert have(store, NAMESPACE, range(10)) == set(range(10))
            put(store, NAMESPACE, range(10, 20))
            put(other, NAMESPACE, range(20, 30))
            other.flush()
            try:
                with Interrupting(line) as interrupt:
                    OPERATIONS[what](store)
            except KeyboardInterrupt:
                pass
            store.flush()
            assert have(store, NAMESPACE, range(30)) == set(range(30)), line
            put(store, NAMESPACE, range(30, 35))
            assert have(store, NAMESPACE, range(35)) == set(range(35)), line
            assert store.delete(NAMESPACE, store.row_keys(NAMESPACE)[:0]) == 0
        with quiet(0), DiskStore(directory) as again:
            assert have(again, NAMESPACE, range(35)) == set(range(35)), line
        if interrupt.left > 0:
            break
        line += 1 + line // 12
    assert line > 10, "nothing was interrupted"


def test_what_waits_goes_with_its_namespace(swift_path):
    """Rows that waited to be written when a reading was left are not written after their namespace was deleted."""
    with DiskStore(swift_path / "cache") as store:
        put(store, NAMESPACE, range(5))
        store.flush()
        with store._lock:  # so that nothing is committed meanwhile
            put(store, NAMESPACE, range(5, 10))
            store._readings.leave(store._readings.of(NAMESPACE))
            assert store.delete(NAMESPACE) == 5
        store.flush()
        assert have(store, NAMESPACE, range(10)) == set()
    with DiskStore(swift_path / "cache") as again:
        assert have(again, NAMESPACE, range(10)) == set()
