"""What is exported, what is documented and what is typed are the same names."""

import inspect
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import modcache

ROOT = Path(modcache.__file__).parents[1]
API = Path(__file__).parents[1] / "docs" / "reference" / "api.md"
TYPED = Path(__file__).parent / "typing" / "api.py"


def documented():
    """The names that begin a line of the reference."""
    return re.findall(r"^- `([A-Za-z_.]+)", API.read_text(encoding="utf-8"), re.MULTILINE)


def test_all_is_sorted_and_there():
    """Every name of `__all__` exists, once, in order."""
    assert modcache.__all__ == sorted(set(modcache.__all__))
    assert [name for name in modcache.__all__ if not hasattr(modcache, name)] == []


def test_nothing_else_is_exported():
    """A public name that is no submodule is in `__all__`."""
    submodules = {path.stem for path in Path(modcache.__file__).parent.iterdir()}
    public = (
        {name for name in vars(modcache) if not name.startswith("_")} - submodules - {"annotations", "TYPE_CHECKING"}
    )
    assert public - set(modcache.__all__) == set()


def test_every_name_has_a_line_in_the_reference():
    """The reference has one line per name, and no name that is gone."""
    names = documented()
    assert len(names) == len(set(names))
    expected = {*modcache.__all__, *(f"keys.{name}" for name in {*modcache.keys.__all__} - {*modcache.__all__})}
    expected |= {f"Cache.{name}" for name in vars(modcache.Cache) if not name.startswith("_")}
    assert set(names) - {"cache_keys"} == expected


@pytest.mark.parametrize("name", modcache.__all__)
def test_every_name_is_described(name):
    """Every public name has a docstring, and is used in the typed examples."""
    assert getattr(modcache, name).__doc__
    assert re.search(rf"\b{name}\b", TYPED.read_text(encoding="utf-8"))


def test_version():
    """The version is the distribution's, looked up when it is asked for; other names are not there."""
    assert modcache.__version__ == version("modcache")
    with pytest.raises(AttributeError, match="module 'modcache' has no attribute 'nothing'"):
        modcache.nothing  # noqa: B018 - asking is the test


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_brings_neither_storage_nor_compilers():
    """`import modcache` on top of torch loads nothing heavy, and nothing that only a directory or a cut needs."""
    heavy = {"diskcache", "sqlite3", "transformers", "PIL", "torch._dynamo", "tqdm"}
    heavy |= {"modcache.stores.disk", "modcache.recycling", "modcache.advising"}
    loaded = run("import torch, sys; before = {*sys.modules}; import modcache; print(*{*sys.modules} - before)").split()
    assert "modcache.wrap" in loaded
    assert heavy & {*loaded} == set()


def test_a_name_that_comes_late_is_there_as_any_other():
    """`dir` and a star import show what is imported by its first use only."""
    assert run("import modcache; print({*modcache.__all__} - {*dir(modcache)})") == "set()"
    assert run("from modcache import *; print(recycle.__name__, advise.__name__, DiskStore.__name__)") == (
        "recycle advise DiskStore"
    )


def test_the_options_are_seen():
    """`help` and editors show each option of `cached_module` with its default."""
    shown = inspect.signature(modcache.cached_module).parameters
    assert {name: one.default for name, one in shown.items()} == {
        "module": None, "key": None, "store": None, "prepare": None, "broadcast": (), "per_row": True, "version": None,
        "freeze": False, "verify": 0.0,
    }  # fmt: skip
    assert [one.kind for one in shown.values()] == [inspect.Parameter.POSITIONAL_ONLY] + [
        inspect.Parameter.KEYWORD_ONLY
    ] * 8
