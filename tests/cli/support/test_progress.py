"""Progress: lines in a log, one line on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from fdshare.cli.support.progress import Progress

CODE = """
from fdshare.cli.support.progress import Progress
progress = Progress(quiet=False)
progress.step("one")
progress.step("one")
progress.over()
progress.step("two")
"""


def test_one_line_for_each_step(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(quiet=False)
    for text in ("one", "one", "\33[31mtwo"):
        progress.step(text)
    progress.over()
    progress.step("one")
    assert capsys.readouterr().err.splitlines() == [
        "fdshare: one",
        "fdshare: \\x1b[31mtwo",
        "fdshare: one",
    ]


def test_nothing_where_it_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    Progress(quiet=True).step("one")
    assert capsys.readouterr().err == ""


def test_a_note_stays_where_it_is_quiet_too(capsys: pytest.CaptureFixture[str]) -> None:
    Progress(quiet=True).note("it is killed")
    assert capsys.readouterr().err == "fdshare: it is killed\n"


def test_it_does_not_raise_where_nobody_reads() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    try:
        code = CODE + "progress.note('three')"
        done = subprocess.run([sys.executable, "-c", code], stderr=writes, timeout=60)
    finally:
        os.close(writes)
    assert done.returncode == 0


def test_a_terminal_has_one_line_with_the_time() -> None:
    ours, theirs = pty.openpty()
    try:
        subprocess.run([sys.executable, "-c", CODE], stderr=theirs, check=True, timeout=60)
        said = os.read(ours, 4096).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert said.split("\r\33[K") == [
        "",
        "fdshare: one, 0 s",
        "fdshare: one, 0 s",
        "",
        "fdshare: two, 0 s",
    ]
