"""Every block of docs/classic: programs and transcripts are run, parts of programs are compared."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from textwrap import dedent
from xml.etree import ElementTree

import pytest
from pages.blocks import Block, blocks_of
from pages.runs import Run, run_block
from pages.sandbox import Machine, machine_in

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "classic"
PROGRAMS = ROOT / "examples" / "classic"
PAGES = sorted(DOCS.glob("*.md"))


@dataclass(frozen=True)
class Shown(Block):
    """One code block of a page, and what it prints."""

    page: str
    output: str  # of a program: the block `text` right behind it

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> list[Shown]:
    found = []
    for page in PAGES:
        here = blocks_of(page)
        for block, after in zip_longest(here, here[1:]):
            if block.language == "text":
                continue
            output = after.text if after is not None and after.language == "text" else ""
            found.append(Shown(block.language, block.text, block.line, page.stem, output))
    return found


def squeezed(text: str) -> str:
    return " ".join(text.split())


SOURCES = [squeezed(path.read_text()) for path in sorted(PROGRAMS.glob("**/*.[chp]*"))]


def is_part_of_a_program(block: Block) -> bool:
    return any(squeezed(dedent(block.text)) in source for source in SOURCES)


RUN = [b for b in blocks() if b.language == "python" and not is_part_of_a_program(b)]
TRANSCRIPTS = [b for b in blocks() if b.language == "console"]


# The order counts: what `ls -l` says of the owner has numbers, too.
OWNER = r"\w+ \w+ +0 \w+ +\d+ [\d:]+"
NUMBER = r"\d[\d.]*"


@pytest.fixture
def machine(folder: Path) -> Iterator[Machine]:
    """With the programs, as a reader has them."""
    for program in PROGRAMS.glob("*.py"):
        shutil.copy(program, folder)
    with machine_in(folder) as machine:
        yield machine


def test_each_block_is_of_a_language_that_is_run() -> None:
    assert {block.language for block in blocks()} == {"python", "console", "c"}
    assert len(RUN) > 20
    assert len(TRANSCRIPTS) > 10


@pytest.mark.parametrize("block", [b for b in blocks() if b.language == "c"], ids=str)
def test_what_is_shown_in_c_is_in_a_program(block: Shown) -> None:
    assert is_part_of_a_program(block)


@pytest.mark.parametrize("block", RUN, ids=str)
def test_a_program_prints_what_the_page_says(block: Shown, machine: Machine) -> None:
    # The number of a process differs; every other number is what the page says.
    run_block(block, Run(says=block.output, varies=(r"pid \d+",)), machine)


@pytest.mark.parametrize("block", TRANSCRIPTS, ids=str)
def test_a_transcript_is_what_the_terminal_shows(
    block: Shown, machine: Machine, request: pytest.FixtureRequest
) -> None:
    how = Run(
        given="unset PYTHONUNBUFFERED",  # or a line is two writes
        terminal=True,
        varies=(OWNER, NUMBER),
    )
    if "strace" in block.text and shutil.which("strace") is None:
        pytest.skip("no strace")
    if "c/" in block.text:
        shutil.copytree(request.getfixturevalue("compiled"), machine.folder / "c")
    run_block(block, how, machine)


def test_the_table_has_every_program_and_every_page() -> None:
    table = (DOCS / "index.md").read_text()
    for program in PROGRAMS.glob("*.py"):
        assert program.stem in table
    for page in PAGES:
        assert page.stem == "index" or f"({page.name}" in table


def test_each_picture_is_on_a_page_and_says_in_words_what_it_shows() -> None:
    for picture in DOCS.glob("*.svg"):
        assert any(f"({picture.name})" in page.read_text() for page in PAGES)
        root = ElementTree.parse(picture).getroot()
        assert root[1].tag == "{http://www.w3.org/2000/svg}desc"
