"""What the documents name: files, tests and links that exist."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

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


def test_each_word_is_said_once_and_its_class_is_there() -> None:
    words = (ROOT / "docs/design.md").read_text().split("## 3. Words")[1].split("## 4.")[0]
    rows = re.findall(r"^\| (\w+) \| (?:`?(\w+)`?)? ?\|", words, re.MULTILINE)[1:]
    assert len(rows) > 10
    assert len({word for word, _ in rows}) == len(rows)
    sources = "".join(path.read_text() for path in ROOT.glob("fdshare/**/*.py"))
    defined = {"int", "str", "", *re.findall(r"^class (\w+)", sources, re.MULTILINE)}
    assert {cls for _, cls in rows} <= defined
