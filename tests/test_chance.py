"""Random numbers go on as if nothing had been drawn in between."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from modcache.chance import preserved_randomness


def test_randomness_is_left_as_it_was():
    """torch, numpy and Python draw the same numbers as if nothing had been drawn in between, also after an error."""

    def draw():
        return random.random(), float(np.random.random()), float(torch.rand(()))

    def seed():
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)

    seed()
    expected = draw()
    seed()
    with pytest.raises(ZeroDivisionError), preserved_randomness():
        draw()
        raise ZeroDivisionError
    assert draw() == expected


def test_randomness_of_accelerators(monkeypatch):
    """The generators of accelerators in use are put back, too."""
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: ["state"])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", seen.append)
    with preserved_randomness():
        assert seen == []
    assert seen == [["state"]]


def test_a_check_does_not_import_numpys_random_numbers():
    """Its import takes a lock, which the child of a fork would find held if another thread is in its first check."""
    code = (
        "import sys, numpy; before = 'numpy.random' in sys.modules  # numpy 1 imports it itself\n"
        "import torch; from modcache import cached_module, cache_of\n"
        "module = cached_module(torch.nn.Linear(3, 2), freeze=True); module(torch.eye(3)); module(torch.eye(3))\n"
        "assert cache_of(module).stats.hits == 3; assert ('numpy.random' in sys.modules) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
