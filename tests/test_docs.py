"""Every Python block of the documentation runs, or says why not."""

import logging
import re
from pathlib import Path

import pytest

import modcache
from modcache.stats import Seconds

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKING = [*PAGES, ROOT / "benchmarks" / "README.md", ROOT / "benchmarks" / "data" / "README.md"]
BLOCK = re.compile(
    r"(?P<excuse><!-- not run: [^\n]+ -->\s*)?^(?P<indent> *)```python\n(?P<code>.*?)^ *```", re.MULTILINE | re.DOTALL
)


def blocks(page):
    """The line, the code and the excuse of each Python block of a page."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        yield text.count("\n", 0, found.start("code")), found["code"], found["excuse"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks_run(page, tmp_path, monkeypatch):
    """The blocks of one page run one after the other, in one namespace."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger(), "handlers", [*logging.getLogger().handlers])
    namespace = {"__name__": f"docs_{page.stem}"}
    try:
        for line, code, excuse in blocks(page):
            if excuse is None:
                exec(compile("\n" * line + code, str(page), "exec"), namespace)
    finally:
        logging.getLogger("modcache").setLevel(logging.NOTSET)  # a page may show how to hear more


def prose(page):
    """The text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def links(page):
    """The links of a page to other files of the repository: place and heading."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target.partition("#")[::2] for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    """Each link of a page to another file, and to a heading in one, finds it."""
    for place, heading in links(page):
        found = page.parent / place if place else page
        if "results" in found.parts and not (ROOT / "benchmarks" / "results").exists():
            continue  # a source archive has no recorded results
        assert found.exists(), place
        assert not heading or heading in anchors(found), f"{place}#{heading}"


def test_each_page_is_linked():
    """The index and the README lead to every other page, so none is found by chance alone."""
    for start in (ROOT / "docs" / "index.md", ROOT / "README.md"):
        linked = {(start.parent / place).resolve() for place, _ in links(start)}
        assert {page.name for page in (ROOT / "docs").rglob("*.md") if page.resolve() not in linked} == {"index.md"}


def test_blocks_are_found():
    """The runner sees the blocks that are there, and the excuses before them."""
    assert len(list(blocks(ROOT / "README.md"))) == (ROOT / "README.md").read_text(encoding="utf-8").count("```python")
    text = "x\n\n<!-- not run: needs the moon -->\n```python\n1 / 0\n```\n\n```python\nx = 1\n```\n"
    found = [(block["code"], block["excuse"] is None) for block in BLOCK.finditer(text)]
    assert found == [("1 / 0\n", False), ("x = 1\n", True)]


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "index.md"], ids=lambda page: page.name)
def test_reports_are_shown_as_they_print(page):
    """The report of a page has the words of the report that is printed."""
    (shown,) = re.findall(r"^seconds +(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert re.findall("[a-z]+", shown) == re.findall("[a-z]+", str(Seconds()))


def test_the_page_of_layers_names_every_module():
    """No module or folder of the package is missing on the page that tells its shape."""
    text = (ROOT / "docs" / "explanation" / "layers.md").read_text(encoding="utf-8")
    names = {path.stem for path in Path(modcache.__file__).parent.iterdir() if not path.name.startswith(("_", "py."))}
    assert {name for name in names if not re.search(rf"\b{name}\b", text)} == set()
