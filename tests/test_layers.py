"""Imports go down only, and each dependency is known in one place."""

import ast
import sys
from pathlib import Path

import pytest

import modcache

PACKAGE = Path(modcache.__file__).parent
LAYERS = [
    {"errors"},
    {"notices", "tensors", "theirs", "contents", "locks", "forwards", "own_names"},
    {"digest", "rows", "undisturbed", "chance"},
    {"row_digests", "outputs", "stats", "modes", "batch", "cut", "precision"},
    {"arguments", "sameness"},
    {"fingerprint"},
    {"keys", "stores"},
    {"explain", "plan", "recipe", "opening"},
    {"looking", "manifests", "misses"},
    {"findings"},
    {"memo"},
    {"hit", "requested"},
    {"ask", "refusals", "running"},
    {"selfcheck"},
    {"compute"},
    {"confirm"},
    {"call", "freezing", "naming"},
    {"succession"},
    {"attached"},
    {"classes"},
    {"handle"},
    {"wrap"},
    {"recycling"},
    {"advising"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    """A module of the package, as the layers name it: a folder is one."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def inner_imports(path):
    """The layers' names of what a module imports from the package."""
    package = ("modcache", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*package[: len(package) - node.level + 1], *(node.module or "").split("."))
            targets = [base] if node.module else [(*base[:-1], alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            targets = [tuple(node.module.split("."))]
        elif isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        else:
            continue
        yield from (target[1] for target in targets if target[0] == "modcache" and len(target) > 1)


def outer_imports(path):
    """The full names of what a module imports from elsewhere."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def ids(path):
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_imports_go_down(path):
    """A module imports lower layers only, or its neighbours in the same folder."""
    own = name_of(path)
    assert own in LAYER, f"{own} has no layer yet: give it one in this file"
    up = {target for target in inner_imports(path) if target != own and LAYER[target] >= LAYER[own]}
    assert up == set()


def test_the_layers_are_those_of_the_package():
    """A layer that is gone, or empty, is taken out of the list."""
    assert {name_of(path) for path in MODULES} == set(LAYER)


def importers(package):
    """The modules that import anything of a package."""
    return {
        ids(path)
        for path in MODULES
        if any(target == package or target.startswith(f"{package}.") for target in outer_imports(path))
    }


def test_one_place_knows_each_dependency():
    """xxhash is known to digests, trees of torch to nobody, diskcache to the disk store."""
    assert importers("xxhash") == {"digest.py"}
    assert all(path.startswith("stores/disk/") for path in importers("diskcache"))
    assert all(path.startswith("stores/disk/") for path in importers("sqlite3"))
    assert importers("PIL") == set()
    assert importers("transformers") == set()


@pytest.mark.parametrize("name", ["call", "compute", "plan", "hit", "recipe", "rows", "batch", "explain", "selfcheck"])
def test_a_call_knows_no_module_class(name):
    """What makes a call never imports torch.nn: it is handed what it needs to know of a module."""
    imported = set(outer_imports(PACKAGE / f"{name}.py"))
    assert not {target for target in imported if target.startswith("torch.nn")}


FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_nothing_that_is_stored_can_run(path):
    """No pickle, no eval, no torch.load, no import by name, anywhere in the package."""
    imported = {target.split(".")[0] for target in outer_imports(path)}
    assert not imported & FORBIDDEN
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("torch", "load"), ("np", "load"), ("importlib", "import_module")}


def test_importing_the_package_imports_no_storage():
    """diskcache and sqlite wait until a directory is used."""
    assert "modcache" in sys.modules
    assert importers("importlib") <= {"__init__.py", "cli/run.py", "manifests.py"}
