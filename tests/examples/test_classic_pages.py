"""Every block of docs/classic: programs and transcripts are run, parts of programs are compared."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from textwrap import dedent
from xml.etree import ElementTree

import pytest
from pages.blocks import blocks_of

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "classic"
PROGRAMS = ROOT / "examples" / "classic"
PAGES = sorted(DOCS.glob("*.md"))


@dataclass(frozen=True)
class Block:
    """One code block of a page, and what it prints."""

    page: str
    line: int
    language: str
    text: str
    output: str  # of a program: the block `text` right behind it

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        here = blocks_of(page)
        for block, after in zip_longest(here, here[1:]):
            if block.language == "text":
                continue
            output = after.text if after is not None and after.language == "text" else ""
            found.append(Block(page.stem, block.line, block.language, block.text, output))
    return found


def squeezed(text: str) -> str:
    return " ".join(text.split())


SOURCES = [squeezed(path.read_text()) for path in sorted(PROGRAMS.glob("**/*.[chp]*"))]


def is_part_of_a_program(block: Block) -> bool:
    return any(squeezed(dedent(block.text)) in source for source in SOURCES)


RUN = [b for b in blocks() if b.language == "python" and not is_part_of_a_program(b)]
TRANSCRIPTS = [b for b in blocks() if b.language == "console"]


def plain(line: str) -> str:
    """A line without what differs from run to run: numbers, and what `ls -l` says of the owner."""
    line = re.sub(r"\w+ \w+ +0 \w+ +\d+ [\d:]+", "LISTED", line)
    return squeezed(re.sub(r"[\d.]+", "#", line))


def pattern_of(line: str) -> str:
    """What a plain line has to match; `...` is anything."""
    return ".*".join(re.escape(plain(part)) for part in re.split(r" ?\.\.\. ?", line))


@pytest.fixture
def place(folder: Path) -> Path:
    """A folder with the programs, as a reader has it."""
    for program in PROGRAMS.glob("*.py"):
        shutil.copy(program, folder)
    return folder


def test_each_block_is_of_a_language_that_is_run() -> None:
    assert {block.language for block in blocks()} == {"python", "console", "c"}
    assert len(RUN) > 20
    assert len(TRANSCRIPTS) > 10


@pytest.mark.parametrize("block", [b for b in blocks() if b.language == "c"], ids=str)
def test_what_is_shown_in_c_is_in_a_program(block: Block) -> None:
    assert is_part_of_a_program(block)


@pytest.mark.parametrize("block", RUN, ids=str)
def test_a_program_prints_what_the_page_says(block: Block, place: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", block.text],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    # The number of a process differs; every other number is what the page says.
    assert re.sub(r"pid \d+", "pid #", done.stdout) == re.sub(r"pid \d+", "pid #", block.output)


class Terminal:
    """A shell whose jobs write to the same terminal."""

    def __init__(self, folder: Path) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.shell = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=folder,
            env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.text = ""

    def run(self, command: str, expected: Counter[str]) -> tuple[int, list[str]]:
        """Status and lines of *command*, when those that are expected have come, or no more do."""
        assert self.shell.stdin is not None
        self.shell.stdin.write(f"{command}\nprintf '\\n@%d@\\n' $?\n".encode())
        self.shell.stdin.flush()
        deadline = time.monotonic() + 60
        while True:
            status = re.search(r"^@(\d+)@\n", self.text, re.MULTILINE)
            lines = [line for line in self.text.splitlines() if line and not line.startswith("@")]
            whole = self.text.endswith("\n") and len(lines) >= expected.total()
            if status and whole:
                self.text = ""
                return int(status[1]), lines
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"$ {command}\n{self.text}")

    def _read(self, seconds: float) -> bool:
        assert self.shell.stdout is not None
        if not select.select([self.shell.stdout], [], [], max(0, seconds))[0]:
            return False
        data = os.read(self.shell.stdout.fileno(), 65536)
        self.text += data.decode()
        return bool(data)

    def close(self) -> None:
        assert self.shell.stdin is not None
        assert self.shell.stdout is not None
        os.killpg(self.shell.pid, signal.SIGTERM)  # the servers, too
        os.killpg(self.shell.pid, signal.SIGKILL)
        self.shell.stdin.close()
        self.shell.stdout.close()
        self.shell.wait()


@pytest.fixture
def terminal(place: Path) -> Iterator[Terminal]:
    terminal = Terminal(place)
    yield terminal
    terminal.close()


@pytest.mark.parametrize("block", TRANSCRIPTS, ids=str)
def test_a_transcript_is_what_the_terminal_shows(
    block: Block, place: Path, terminal: Terminal, request: pytest.FixtureRequest
) -> None:
    if "strace" in block.text and shutil.which("strace") is None:
        pytest.skip("no strace")
    if "c/" in block.text:
        shutil.copytree(request.getfixturevalue("compiled"), place / "c")
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        wanted = re.search(r"# status (\d+)$", command)
        expected = Counter(map(pattern_of, shown.splitlines()))
        status, lines = terminal.run(command, expected)
        assert status == (int(wanted[1]) if wanted else 0), lines
        # Two processes write to one terminal: the order of their lines is not always the same.
        left = list(map(plain, lines))
        for pattern in expected.elements():
            fits = next((line for line in left if re.fullmatch(pattern, line)), None)
            assert fits is not None, f"$ {command}\nnot printed: {pattern}\n{lines}"
            left.remove(fits)
        assert not left or ".*" in expected, f"$ {command}\nnot on the page: {left}"


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
