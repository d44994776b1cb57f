"""The same programs in the standard packages, after install() and in our contexts.

Each case has the same outcome everywhere, or a row in the table of docs/compat.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).parents[1]
DOCUMENT = TESTS.parent / "docs" / "compat.md"
HEADING = "## Case by case"
RUNS = (("multiprocessing", "fork"), ("multiprocess", "fork"), ("multiprocessing", "spawn"))
AS_STANDARD = "="


class Row(NamedTuple):
    """A pattern of cases, and the outcomes of each that are allowed."""

    cases: str
    standard: tuple[str, ...]
    install: tuple[str, ...]
    context: tuple[str, ...]
    why: str


def table() -> list[Row]:
    section = DOCUMENT.read_text().split(HEADING + "\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [Row(row[0], *(tuple(cell.split(" or ")) for cell in row[1:4]), row[4]) for row in rows]


def run(column: str, method: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "parity.run", column, method],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},  # not what is installed
        capture_output=True,
        timeout=300,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    print(done.stderr)  # for the report of a failure
    outcomes: dict[str, str] = json.loads(done.stdout)
    return outcomes


def row_of(case: str, rows: list[Row]) -> Row | None:
    """The first that is about *case*."""
    return next((row for row in rows if fnmatchcase(case, row.cases)), None)


def allows(allowed: tuple[str, ...], outcome: str, standard: str) -> bool:
    return outcome == standard if allowed == (AS_STANDARD,) else outcome in allowed


# Some 250 cases, most of which start processes, three times: 20 seconds, or minutes on a machine at
# work. One that hangs says so.
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("package", "method"), RUNS)
def test_what_differs_is_documented(package: str, method: str) -> None:
    names = [f"{kind} {package}" for kind in ("standard", "install", "context")]
    with ThreadPoolExecutor(2) as threads:
        standard, install, context = threads.map(lambda name: run(name, method), names)
    assert standard.keys() == install.keys() == context.keys()
    assert len(standard) > (200 if method == "fork" else 50)
    assert {case for case in standard if "hangs" in install[case] + context[case]} == set()
    rows, wrong, used = table(), [], set()
    for case, plain in standard.items():
        found = plain, install[case], context[case]
        differs, row = len(set(found)) > 1, row_of(case, rows)
        # What a row allows to be alike may differ on another Python or package alone.
        if differs or (row is not None and plain in row.standard and plain in row.context):
            used.add(row)
        if row is None and differs:
            wrong.append(f"| {case} | {' | '.join(found)} | is in no row |")
        elif row is not None and not (
            plain in row.standard
            and allows(row.install, install[case], plain)
            and allows(row.context, context[case], plain)
        ):
            wrong.append(f"| {case} | {' | '.join(found)} | is not as {row} |")
    assert not wrong, "\n".join(wrong)
    if method == "fork":  # the others run the objects alone
        assert [row.cases for row in rows if row not in used] == []


def test_every_row_has_its_reason() -> None:
    assert all(row.why for row in table())
