"""A child of a fork is held up by no lock that another thread of its parent held."""

import contextlib
import os
import threading
import weakref

import pytest
import torch
from torch import nn

from modcache import cache_of, cached_module, register_key_extractor
from modcache.keys import files, registry
from modcache.locks import lock_of
from tests.hazards import frozen

X = torch.randn(4, 3)

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Thing:
    pass


def in_child(act):
    """Whether a forked child gets through, within some seconds."""
    child = os.fork()
    if not child:
        thread = threading.Thread(target=act, daemon=True)
        thread.start()
        thread.join(20)
        os._exit(1 if thread.is_alive() else 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def locks_of(module):
    attached = module._modcache
    memo = attached.memo
    return [
        attached.identity._lock, attached._naming._lock, memo._lock, memo._counters._lock, memo.recent._lock,
        files._lock, registry._lock,
    ]  # fmt: skip


def test_every_lock_is_open_in_a_child():
    """Calls that hit, compute and explain, and a registration, go through although all locks were held."""
    module = cached_module(frozen(nn.Linear(3, 2)))
    module(X)
    taken, done = threading.Event(), threading.Event()

    def hold():
        held = locks_of(module)
        with contextlib.ExitStack() as all_of_them:
            for lock in held:
                all_of_them.enter_context(lock)
            taken.set()
            done.wait()

    def act():
        module(torch.cat([X, -X]))
        cache_of(module).explain(X)
        register_key_extractor(Thing)(lambda thing: 1)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    try:
        assert in_child(act)
    finally:
        done.set()
        thread.join()


def test_a_thread_that_forks_within_a_block_leaves_it_in_both():
    """The child leaves a block that its parent entered, and the lock works in either."""
    owner = Thing()
    owner._lock = lock_of(owner)
    with owner._lock:
        child = os.fork()
    if not child:
        with owner._lock:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with owner._lock, owner._lock:
        pass


def test_a_lock_is_one_of_the_interpreter():
    """An interrupt finds no place in Python code between taking it and the block that gives it back."""
    assert type(lock_of(Thing())) is type(threading.RLock())


def test_owners_are_not_kept_alive():
    """What had a lock can go."""
    owner = Thing()
    owner._lock, gone = lock_of(owner), weakref.ref(owner)
    del owner
    assert gone() is None
