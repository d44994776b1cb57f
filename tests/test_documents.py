"""What the documents name: files, tests and links that exist."""

from __future__ import annotations

import re
import runpy
import sys
from fnmatch import fnmatch
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
# A test or a module, perhaps from the folder that the page is about on, perhaps with tests in it.
NAMED = re.compile(r"`([\w/-]+\.py)(?:::([\w*]+))?`")
FOLDERS = ("benchmarks", "docs", "examples", "fdshare", "tests")
FOREIGN = {"test/_test_multiprocessing.py"}  # CPython's


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_exists(document: Path) -> None:
    text = document.read_text()
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("https://") or (document.parent / link).exists(), link
    for name, tests in NAMED.findall(text):
        found = [path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/{name}")]
        found += ROOT.glob(name)
        assert found or name in FOREIGN, name
        if tests:
            defined = re.findall(r"^def (test_\w+)", found[0].read_text(), re.MULTILINE)
            assert any(fnmatch(test, tests) for test in defined), f"{name}::{tests}"


def test_each_page_has_its_place_on_the_site() -> None:
    placed = []
    for index in ROOT.glob("docs/**/index.md"):
        for tree in re.findall(r"^```{toctree}\n(.*?)^```", index.read_text(), re.M | re.S):
            placed += [index.parent / f"{line}.md" for line in tree.splitlines() if line[:1] != ":"]
    for page in ROOT.glob("docs/**/*.md"):
        there = any(fnmatch(str(page), str(pattern)) for pattern in placed)
        assert there or page == ROOT / "docs/index.md", "no toctree of an index.md has it"


def test_a_reader_of_the_index_finds_each_page_of_a_need() -> None:
    linked = re.findall(r"\]\(([\w/-]+\.md)\)", (ROOT / "docs/index.md").read_text())
    pages = {f"howto/{page.name}" for page in ROOT.glob("docs/howto/*.md")}
    assert pages - set(linked) == set()


@pytest.mark.parametrize("script", ["docs/classic/draw.py", "docs/img/overview.py"])
def test_a_picture_is_what_its_script_draws(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # it adds the folder of what scripts share
    for name, draw in runpy.run_path(str(ROOT / script))["PICTURES"].items():
        assert (ROOT / script).with_name(name).read_text() == draw()


@pytest.mark.parametrize("picture", sorted(ROOT.glob("docs/**/*.svg")), ids=lambda path: path.name)
def test_a_picture_has_all_that_it_shows(picture: Path) -> None:
    """No font from elsewhere; and no two columns in one run of text, which other fonts move."""
    root = ElementTree.parse(picture).getroot()
    assert "url(http" not in picture.read_text().replace('"', "")
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        assert "\xa0\xa0" not in (text.text or ""), text.text


def test_each_word_is_said_once_and_its_class_is_there() -> None:
    words = (ROOT / "docs/design.md").read_text().split("## 3. Words")[1].split("## 4.")[0]
    rows = re.findall(r"^\| (\w+) \| (?:`?(\w+)`?)? ?\|", words, re.MULTILINE)[1:]
    assert len(rows) > 10
    assert len({word for word, _ in rows}) == len(rows)
    sources = "".join(path.read_text() for path in ROOT.glob("fdshare/**/*.py"))
    defined = {"int", "str", "", *re.findall(r"^class (\w+)", sources, re.MULTILINE)}
    assert {cls for _, cls in rows} <= defined
