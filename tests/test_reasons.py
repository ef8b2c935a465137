"""The page of errors and warnings names each reason that the code knows, and no other."""

import ast
import re
from pathlib import Path

from modcache.findings import NOT_ROWS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")

GIVEN_ON = {"one row of a new kind of call", "writing fails", NOT_ROWS}
"""Reasons that reach `Bypass` or a warning by way of another function, or have a name in the code."""


def named_in_code():
    """What calls of ``Bypass`` and ``say`` and the troubles of directories give as their reason."""
    found = {*GIVEN_ON, *returned_by("refusals.py", "unusual")}
    for path in (ROOT / "modcache").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Assign)
                and ast.unparse(node.targets[0]) == "reason"
                and path.parent.name == "modcache"
            ):
                found |= {node.value.value} if isinstance(node.value, ast.Constant) else set()
            if not isinstance(node, ast.Call) or not node.args:
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = node.args[0]
            if called == "append" and isinstance(first, ast.Tuple) and "troubles" in ast.unparse(node.func):
                called, first = "say", first.elts[0]
            if called in ("Bypass", "say") and isinstance(first, ast.Constant):
                found.add(first.value)
    return found


def returned_by(name, function):
    tree = ast.parse((ROOT / "modcache" / name).read_text(encoding="utf-8"))
    (body,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    returned = [node.value for node in ast.walk(body) if isinstance(node, ast.Return)]
    texts = [part for node in returned if isinstance(node, ast.IfExp) for part in (node.body, node.orelse)]
    return {node.value for node in [*returned, *texts] if isinstance(node, ast.Constant)}


def rows():
    """The first cells of the tables of reasons."""
    table = PAGE[PAGE.index("## Warnings") :]
    cells = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
    return {part for cell in cells for part in cell.split("; ")} - {"reason", "about", "---"}


def test_each_reason_is_on_the_page():
    """Whoever reads a reason in the statistics or a warning finds what to do about it."""
    assert named_in_code() - rows() - {None} == set()


def test_the_page_names_no_other():
    """A reason that is gone leaves the page; that of a store is made of parts."""
    assert {row for row in rows() if not row.startswith("the store fails")} - named_in_code() == set()
