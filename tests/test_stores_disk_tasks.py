"""The queue of what is to be written: in order, joined where that helps, bounded in bytes."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from modcache.stores.disk import tasks
from modcache.stores.disk.catalogue import Entry
from modcache.stores.disk.tasks import Put, Queue, Settle, Sync, Use, closed_lock


def put(segment, number, rows=2):
    matrix = np.zeros((rows, 100), np.uint8)
    return Put(None, segment, number, bytes(16 * rows), matrix, b"", number, matrix)


def drained(queue):
    """Batches of the numbers of puts, or "sync", until the queue is empty."""
    queue.stop()
    batches = []
    while tasks := queue.take(lambda: None, 0.01):
        batches.append([task.first if isinstance(task, Put) else "sync" for task in tasks])
        queue.done(tasks)
    return batches


A, B = SimpleNamespace(), SimpleNamespace()


def test_puts_to_one_segment_are_taken_together():
    """Neighbouring puts to one segment are one batch; anything in between parts them, and the order stays."""
    queue = Queue(1 << 20)
    for task in (put(A, 0), put(A, 1), put(B, 2), put(A, 3), Sync(closed_lock()), put(A, 4)):
        assert queue.push(task)
    assert queue.bytes == 5 * (200 + 32)
    assert drained(queue) == [[0, 1], [2], [3], ["sync"], [4]]
    assert queue.bytes == 0
    assert not queue.push(put(A, 5)), "a stopped queue takes nothing in"


def test_withdrawn_and_put_back():
    """Rows of a segment are taken out, and come back in front of all others, one by one if so asked."""
    queue = Queue(1 << 20)
    for task in (put(A, 0), put(B, 1), put(A, 2)):
        queue.push(task)
    withdrawn = queue.withdraw(A)
    assert [task.first for task in withdrawn] == [0, 2]
    assert queue.bytes == 232
    queue.put_back(withdrawn, alone=True)
    assert drained(queue) == [[0], [2], [1]]
    assert queue.bytes == 0


def test_withdrawing_all_leaves_other_tasks():
    """When all rows are taken out, the rest is still done."""
    queue = Queue(1 << 20)
    for task in (put(A, 0), Sync(closed_lock()), put(B, 1)):
        queue.push(task)
    assert len(queue.withdraw()) == 2
    assert drained(queue) == [["sync"]]


def use(namespace, ago=0.0):
    return Use(namespace, namespace, Entry(time.time() - ago, 1, 1))


def test_what_nobody_waits_for_comes_last():
    """Notes of uses, and the index, wait until nothing else is to be done, whatever is pushed after them."""
    queue, sync, first, second = Queue(1 << 20), Sync(closed_lock()), Settle(object()), Settle(object())
    tasks = [use("one"), first, put(A, 0), second, first, use("two"), sync, put(B, 1)]
    for task in tasks:
        queue.push(task)
    taken = [queue.take(lambda: pytest.fail("there is something to do"), 10.0)[0] for _ in range(7)]
    assert taken == [tasks[2], sync, tasks[7], tasks[0], tasks[5], first, second], "one of each is enough"


def test_a_use_is_noted_at_last_where_there_is_always_something_to_do():
    """A note that has waited for half a minute waits no more, else others would take the rows for unused."""
    queue = Queue(1 << 20)
    for task in (use("one", ago=60.0), use("two"), put(A, 0)):
        queue.push(task)
    assert queue.take(lambda: None, 10.0)[0].namespace == "one"
    assert queue.take(lambda: None, 10.0)[0].first == 0


def test_at_the_end_uses_are_noted_and_nothing_is_sorted_in():
    """A queue that was stopped hands on what outlives the process, and no work that is only of use to it."""
    queue = Queue(1 << 20)
    for task in (use("one"), Settle(A), use("two")):
        queue.push(task)
    queue.stop()
    assert [queue.take(lambda: None, 10.0)[0].namespace for _ in range(2)] == ["one", "two"]
    assert queue.take(lambda: None, 10.0) == []


def test_who_puts_waits_for_room():
    """A put waits while the queue is full, until some of it is done, or nobody takes any more."""
    queue, through = Queue(500), threading.Event()
    queue.push(put(A, 0))
    queue.push(put(A, 1))

    def wait():
        queue.wait_for_room(100, lambda: True)
        through.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not through.wait(0.1)
    queue.done(queue.take(lambda: None, 0.01))
    assert through.wait(60)
    thread.join()
    queue.push(put(A, 2, rows=50))  # larger than the bound: alone it may wait
    queue.wait_for_room(100, lambda: False)


def test_idle():
    """Who takes is told that nothing came for a while."""
    queue, told = Queue(500), []

    def idle():
        told.append(1)
        queue.stop()

    assert queue.take(idle, 0.01) == []
    assert told == [1]


def test_many_bytes_do_not_wait_for_more(monkeypatch):
    """A large put is taken at once, alone or with what waits already, a few megabytes at a time."""
    monkeypatch.setattr(tasks, "_A_WHILE", 60.0)
    queue = Queue(64 << 20)
    queue.push(put(A, 0, rows=20_000))
    assert [task.first for task in queue.take(lambda: None, 0.01)] == [0]
    for number in range(1, 8):
        queue.push(put(A, number, rows=20_000))
    assert drained(queue) == [[1, 2, 3, 4], [5, 6, 7]]


@pytest.mark.parametrize("end", ["sync", "enough", "stop"])
def test_few_rows_wait_for_more(end, monkeypatch):
    """A few rows wait a while to be taken with what comes next; who waits for them, or enough of them, ends that."""
    monkeypatch.setattr(tasks, "_A_WHILE", 60.0)
    queue, taken, through = Queue(2000), [], threading.Event()

    def take():
        taken.append([task.first for task in queue.take(lambda: None, 0.01)])
        through.set()

    queue.push(put(A, 0))
    thread = threading.Thread(target=take)
    thread.start()
    assert not through.wait(0.1)
    assert queue.push(put(A, 1, rows=1)), "still less than a fourth of the bound"
    assert not through.wait(0.1)
    ends = {
        "sync": lambda: queue.push(Sync(closed_lock())),
        "enough": lambda: queue.push(put(A, 2)),
        "stop": queue.stop,
    }
    ends[end]()
    assert through.wait(60)
    thread.join()
    assert taken == [[0, 1, 2] if end == "enough" else [0, 1]]


def test_few_rows_wait_not_for_long():
    """When nothing more comes, rows are taken all the same."""
    queue = Queue(1 << 20)
    queue.push(put(A, 0))
    assert [task.first for task in queue.take(lambda: None, 60.0)] == [0]
