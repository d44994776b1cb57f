"""The table of docs/platforms.md, and the script that makes it from logs."""

from __future__ import annotations

import json

import platforms
import pytest

HEAD = {"python": "3.15.2", "suite": "whole", "method": "", "day": "2026-11-27", "versions": "x 1"}


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("...\n1198 passed, 2 skipped, 3 warnings in 8.69s\n", (1198, 0, 2)),
        ("== 1 failed, 2 passed, 4 errors in 8.69s (0:00:08) ==\n", (2, 5, 0)),
        ("Ran 339 tests in 87.1s\n\nOK (skipped=50)\n", (289, 0, 50)),
        ("Ran 9 tests in 7.1s\n\nOK\n", (9, 0, 0)),
        ("Ran 9 tests in 7.1s\n\nOK (skipped=1, expected failures=2)\n", (8, 0, 1)),
        ("Ran 9 tests in 7.1s\n\nFAILED (failures=1, errors=2, skipped=3)\n", (3, 3, 3)),
    ],
)
def test_counts(output: str, expected: tuple[int, int, int]) -> None:
    assert platforms.counts(output) == expected


def test_a_log_that_did_not_come_to_its_end() -> None:
    with pytest.raises(ValueError, match="no last line"):
        platforms.row_of(json.dumps(HEAD) + "\n....")


def test_a_row_takes_the_place_of_the_former() -> None:
    page = f"a\n\n{platforms.HEAD}\n{platforms.LINE}\n\nb\n"
    for passed in (5, 6):
        row = platforms.row_of(f"{json.dumps(HEAD)}\n{passed} passed in 1.00s\n")
        page = platforms.with_rows(page, [row])
    other = row._replace(python="3.9.1t", method="spawn")
    page = platforms.with_rows(page, [other])
    assert platforms.rows_of(page) == [other, row]
    assert row.passed == 6
    assert page.startswith("a\n\n")
    assert page.endswith("\n\nb\n")


def test_the_page_is_as_the_script_makes_it() -> None:
    page = platforms.PAGE.read_text()
    assert platforms.rows_of(page)
    assert platforms.with_rows(page, []) == page
    assert platforms.repeats_of(page)
    assert platforms.with_repeats(page, []) == page


EMPTY = f"a\n\n{platforms.REPEATS_HEAD}\n{platforms.REPEATS_LINE}\n\nb\n"


def rows(page: str) -> str:
    """Those of the table of repeats, in a page that was EMPTY."""
    before, after = EMPTY.split("\n\nb")
    assert page.startswith(before + "\n")
    assert page.endswith("\n\nb" + after)
    return page.removeprefix(before + "\n").removesuffix("\nb" + after)


def test_repeats_are_added() -> None:
    head = json.dumps(HEAD)
    green = f"{head}\n7 passed in 1.00s\n"
    red = f"{head}\nFAILED tests/a.py::b[c d] - x - y\nERROR tests/a.py::e\n2 failed in 1.00s\n"
    once = f"{head}\nFAILED tests/a.py::b[c d]\nFAILED tests/a.py::f[|]\n2 failed in 1.00s\n"
    other = f"{json.dumps({**HEAD, 'python': '3.9.1'})}\n7 passed in 1.00s\n"
    page = platforms.with_repeats(EMPTY, [green])
    assert rows(page) == "| 3.15.2 | 1 | 1 | nothing |\n"
    page = platforms.with_repeats(page, [red, other])
    page = platforms.with_repeats(page, [once])
    assert rows(page) == (
        "| 3.9.1 | 1 | 1 | nothing |\n"
        "| 3.15.2 | 3 | 1 | `tests/a.py::b[c d]` 2; `tests/a.py::e` 1; `tests/a.py::f[\\|]` 1 |\n"
    )
    assert platforms.with_repeats(page, []) == page


def test_repeats_are_of_the_whole_suite() -> None:
    other = json.dumps({**HEAD, "suite": "mp"})
    with pytest.raises(ValueError, match="a run of mp"):
        platforms.with_repeats(EMPTY, [f"{other}\n7 passed in 1.00s\n"])
    with pytest.raises(ValueError, match="1 tests failed, and 0 have a name"):
        platforms.with_repeats(EMPTY, [f"{json.dumps(HEAD)}\n1 failed in 1.00s\n"])
