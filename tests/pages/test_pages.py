"""Each code block of README and docs runs as it is pasted, in the order of its page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from commandline import ROOT

from pages.blocks import agree, agree_in_any_order, blocks_of, commands_of
from pages.runs import NotRun, run_block
from pages.sandbox import Machine, machine_in
from pages.table import PAGES

# docs/classic needs no table: tests/examples/test_classic_pages.py has its blocks run, each by
# itself.
DOCUMENTS = [
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
    if path.parent.name != "classic"
]


@pytest.fixture
def machine(folder: Path) -> Iterator[Machine]:
    with machine_in(folder) as machine:
        yield machine


def test_each_block_is_known() -> None:
    blocks = {str(path.relative_to(ROOT)): len(blocks_of(path)) for path in DOCUMENTS}
    known = {page: len(rows) for page, rows in PAGES.items()}
    assert {page: count for page, count in blocks.items() if count} == known


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(not isinstance(how, NotRun) for how in PAGES[page])]
)
def test_a_page_is_true(page: str, machine: Machine) -> None:
    missing = ""  # what was needed last; what follows needs it, too, up to the next need
    skipped = []
    for block, how in zip(blocks_of(ROOT / page), PAGES[page], strict=True):
        if isinstance(how, NotRun):
            continue
        missing = how.missing() if how.needs else missing
        if missing:
            skipped.append(f"line {block.line}: {missing}")
            continue
        try:
            run_block(block, how, machine)
        except AssertionError as error:
            raise AssertionError(f"{page}:{block.line}: {error}") from None
    if skipped:
        pytest.skip("; ".join(skipped))


def test_commands_go_on_in_the_next_line() -> None:
    first, second = commands_of("one \\\n    more  # status 3\n\n# a remark\ntwo\n")
    assert (first.text, first.status, first.said) == ("one \\\n    more  # status 3", 3, None)
    assert (second.text, second.status) == ("two", 0)


def test_commands_with_their_output() -> None:
    first, second = commands_of("$ one\nsaid\n$ two\n")
    assert (first.text, first.said) == ("one", "said\n")
    assert (second.text, second.said) == ("two", "")


def test_what_agrees() -> None:
    assert agree("a  b\n", "a b")
    assert not agree("a b", "a c")
    assert agree("a ...\nz", "a b\nc\nz")
    assert not agree("pid 1", "pid 2")
    assert agree("pid 1", "pid 2", varies=(r"\d+",))
    assert not agree("pid x", "pid 2", varies=(r"\d+",))


def test_what_agrees_in_any_order() -> None:
    assert agree_in_any_order("a\nb 1\n", "b 2\na\n", varies=(r"\d+",))
    assert not agree_in_any_order("a\nb\n", "a\n")
    assert not agree_in_any_order("a\n", "a\na\n")
    assert agree_in_any_order("a\n...\n", "c\nb\na\n")
    assert not agree_in_any_order("a\n...\n", "c\nb\n")
