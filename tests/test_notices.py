"""A warning is shown at the user's line, once, on the first rank."""

import logging
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from modcache import CacheWarning, cached_module
from modcache.notices import log, warn

from .models import Noisy


def line_of(function, *args):
    """The file and line that a warning of this call names."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args)
    (warning,) = caught
    assert warning.category is CacheWarning
    return Path(warning.filename), warning.lineno


def test_warning_at_the_line_of_the_call():
    """The line is the one that called the module, however deep inside of torch it was found out."""
    model = nn.Sequential(nn.Identity(), cached_module(Noisy(), freeze=True))

    def use():
        return model(torch.randn(4, 3))

    assert line_of(use) == (Path(__file__), use.__code__.co_firstlineno + 1)


def test_warning_at_the_line_of_the_wrapping():
    """What is wrong from the start is told where the module is wrapped."""

    def use():
        return cached_module(nn.Linear(2, 2))

    assert line_of(use) == (Path(__file__), use.__code__.co_firstlineno + 1)


def test_warning_without_a_user():
    """Where no frame is the user's, the outermost is named."""
    code = "from modcache.notices import warn; warn('hello')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "<string>:1: CacheWarning: hello" in done.stderr


@pytest.mark.parametrize("name", ["/venv/lib/python3.11/site-packages/big/model.py", threading.__file__])
def test_installed_code_is_not_the_users(name):
    """A module inside of an installed model is found out at the line that called the model."""
    scope = {"warn": warn}
    exec(compile("def use():\n    warn('hello')\n", name, "exec"), scope)
    assert line_of(scope["use"]) == (Path(__file__), line_of.__code__.co_firstlineno + 4)


def test_a_thread_of_installed_code_alone():
    """Where no line of the stack is the user's, the innermost one outside of modcache and torch is named."""
    thread = threading.Thread(target=warn, args=("hello",))
    with pytest.warns(CacheWarning, match="hello") as caught:
        thread.start()
        thread.join()
    assert caught[0].filename == threading.__file__


@pytest.mark.parametrize("rank", ["1", "7"])
def test_other_ranks_log(rank, monkeypatch, caplog):
    """Ranks above 0 write to the log instead."""
    monkeypatch.setenv("RANK", rank)
    with caplog.at_level(logging.WARNING, logger="modcache"):
        warn("hello")
    assert [record.getMessage() for record in caplog.records] == ["hello"]


def test_the_rank_of_the_process_group_counts(monkeypatch, caplog):
    """An initialised process group knows the rank better than the environment."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    warn("hello")
    assert [record.getMessage() for record in caplog.records] == ["hello"]
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with pytest.warns(CacheWarning, match="hello"):
        warn("hello")


def test_the_log_is_silent_by_default():
    """The logger has a handler that writes nowhere, so that nothing is printed unasked."""
    assert log.name == "modcache"
    assert any(isinstance(handler, logging.NullHandler) for handler in log.handlers)
    assert log.level == logging.NOTSET


def test_calls_are_logged_for_debugging(caplog):
    """With the logger at DEBUG, each call leaves a line."""
    module = cached_module(nn.Linear(3, 2), freeze=True)
    with caplog.at_level(logging.DEBUG, logger="modcache"):
        module(torch.eye(3))
    (record,) = [record for record in caplog.records if record.name == "modcache"]
    assert "CallReport(module='Linear'" in record.getMessage()
    assert "computed=3" in record.getMessage()


@pytest.mark.parametrize("name", ["<ipython-input-3-0a1b>", "<stdin>", "<string>"])
def test_code_without_a_file_is_the_users(name):
    """A line of a notebook or of a prompt is where the warning is shown."""
    scope = {"warn": warn}
    exec(compile("def use():\n    warn('hello')\n", name, "exec"), scope)
    with pytest.warns(CacheWarning, match="hello") as caught:
        scope["use"]()
    assert (caught[0].filename, caught[0].lineno) == (name, 2)


@pytest.mark.parametrize("name", ["<frozen importlib._bootstrap>", "<eval_with_key>.7"])
def test_code_that_was_generated_is_not_the_users(name):
    """The interpreter's own frames, and those of torch's graph modules, are passed over."""
    scope = {"warn": warn}
    exec(compile("def use():\n    warn('hello')\n", name, "exec"), scope)
    assert line_of(scope["use"]) == (Path(__file__), line_of.__code__.co_firstlineno + 4)
