"""What was run where: runs a suite and keeps its log, and makes the table of docs/platforms.md.

python tests/platforms.py run LOG SUITE [METHOD]   # with this interpreter
python tests/platforms.py table LOG...             # rows of the same Python, suite and method
                                                   # are replaced, the others stay
python tests/platforms.py repeats LOG...           # counts these runs in the table of repeats, so
                                                   # each log once
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "platforms.md"
HEAD = "| Python | suite | start method | passed | failed | skipped | run by hand | with |"
LINE = "|---|---|---|---|---|---|---|---|"
REPEATS_HEAD = "| Python | runs of the whole suite | without a failure | failed, in how many runs |"
REPEATS_LINE = "|---|---|---|---|"

OTHERS = ("kernel", "protocol", "kinds", "client", "server")
SUITES = {
    "whole": ["-m", "pytest", "-n", "4", "-q"],
    "mp": ["-m", "pytest", "tests/mp", "tests/parity", "tests/parking", "-n", "2", "-q"],
    "others": ["-m", "pytest", *map("tests/{}".format, OTHERS), "-n", "2", "-q"],
    "chaos": ["-m", "pytest", "tests/chaos", "-n", "2", "-q"],
    "multiprocessing": ["tests/compat/stdlib_suite.py"],
    "concurrent.futures": ["tests/compat/futures_suite.py"],
    "standard executor": ["tests/compat/futures_suite.py"],
}
ENVIRON = {"standard executor": {"FDSHARE_COMPAT_EXECUTOR": "stock"}}
DEPENDENCIES = ("msgspec", "click", "rich", "anyio", "tblib", "multiprocess", "dill")


class Row(NamedTuple):
    """One of the table: what it is about is `key`."""

    python: str
    suite: str
    method: str
    passed: int
    failed: int
    skipped: int
    day: str
    versions: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.python, self.suite, self.method


def run(log: Path, suite: str, method: str) -> int:
    """Runs it; the log begins with a line of JSON that says where. The exit status."""
    found = {name: version_of(name) for name in DEPENDENCIES}
    where = {
        "python": platform.python_version()
        + ("t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""),
        "suite": suite,
        "method": method,
        "day": datetime.date.today().isoformat(),
        "versions": ", ".join(f"{name} {version}" for name, version in found.items() if version),
    }
    with log.open("w") as file:
        print(json.dumps(where), file=file, flush=True)
        command = [sys.executable, *SUITES[suite], *([method] if method else [])]
        environ = {**os.environ, **ENVIRON.get(suite, {})}
        done = subprocess.run(command, stdout=file, stderr=file, cwd=ROOT, env=environ, check=False)
        return done.returncode


def version_of(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def row_of(log: str) -> Row:
    """The row of a log. Raises: ValueError: it did not come to its end."""
    head, _, output = log.partition("\n")
    where = json.loads(head)
    return Row(
        where["python"],
        where["suite"],
        where["method"] or "all",
        *counts(output),
        where["day"],
        where["versions"],
    )


def counts(output: str) -> tuple[int, int, int]:
    """Passed, failed and skipped, of the last line of pytest or unittest. Raises: ValueError."""
    ends = re.findall(r"^(?:=+ )?(\d+ \w+(?:, \d+ \w+)*) in [\d.]+s", output, re.MULTILINE)
    if ends:
        words = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", ends[-1])}
        failed = sum(words.get(word, 0) for word in ("failed", "error", "errors"))
        return words.get("passed", 0), failed, words.get("skipped", 0)
    ran = re.findall(r"^Ran (\d+) tests? in", output, re.MULTILINE)
    verdict = re.findall(r"^(?:OK|FAILED)(?: \((.*)\))?$", output, re.MULTILINE)
    if not ran or not verdict:
        raise ValueError("the log has no last line of pytest or unittest")
    words = {w.strip(): int(n) for w, n in re.findall(r"([a-z ]+)=(\d+)", verdict[-1])}
    failed = words.get("failures", 0) + words.get("errors", 0)
    skipped = words.get("skipped", 0)
    return int(ran[-1]) - failed - skipped, failed, skipped


def rows_of(page: str) -> list[Row]:
    """Those that the page has."""
    found = []
    for line in page.partition(LINE + "\n")[2].splitlines():
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        found.append(Row(*cells[:3], *map(int, cells[3:6]), *cells[6:]))  # type: ignore[arg-type]
    return found


def order(row: Row) -> tuple[list[int], str, int, str]:
    """By version, suite and method, in the order of SUITES."""
    return numbers(row.python), row.python, list(SUITES).index(row.suite), row.method


def numbers(python: str) -> list[int]:
    """Those of a version."""
    return [int(number) for number in re.findall(r"\d+", python)]


def with_rows(page: str, new: Iterable[Row]) -> str:
    """The page with them."""
    rows = {row.key: row for row in (*rows_of(page), *new)}
    before, _, rest = page.partition(f"{HEAD}\n{LINE}\n")
    after = re.sub(r"\A(\|.*\n)*", "", rest)
    lines = [f"| {' | '.join(map(str, row))} |\n" for row in sorted(rows.values(), key=order)]
    return f"{before}{HEAD}\n{LINE}\n{''.join(lines)}{after}"


def failures(log: str) -> set[str]:
    """The tests that failed in a run of pytest."""
    return set(re.findall(r"^(?:FAILED|ERROR) (\S+(?: \S+)*?)(?: - .*)?$", log, re.MULTILINE))


class Repeats(NamedTuple):
    """A row of the table of repeats: the runs of the whole suite under one Python."""

    runs: int
    green: int
    often: Counter[str]  # in how many of them each test failed

    def and_one(self, failed: set[str]) -> Repeats:
        """With one more run, in which these tests failed."""
        return Repeats(self.runs + 1, self.green + (not failed), self.often + Counter(failed))


def repeats_of(page: str) -> dict[str, Repeats]:
    """Those that the page has, by Python."""
    found = {}
    for line in page.partition(f"{REPEATS_HEAD}\n{REPEATS_LINE}\n")[2].splitlines():
        if not line.startswith("|"):
            break
        python, runs, green, names = line.strip("| ").split(" | ", 3)
        tests = re.findall(r"`(.*?)` (\d+)", names.replace("\\|", "|"))
        often = Counter({test: int(count) for test, count in tests})
        found[python] = Repeats(int(runs), int(green), often)
    return found


def with_repeats(page: str, logs: Iterable[str]) -> str:
    """The page with the runs of the logs counted, too.

    Raises: ValueError: a log is of another suite, or did not come to its end.
    """
    rows = repeats_of(page)
    for log in logs:
        row = row_of(log)
        if row.suite != "whole":
            raise ValueError(f"a run of {row.suite}, not of the whole suite")
        found = failures(log)
        if bool(found) != bool(row.failed):
            raise ValueError(f"{row.failed} tests failed, and {len(found)} have a name in the log")
        rows[row.python] = rows.get(row.python, Repeats(0, 0, Counter())).and_one(found)
    before, _, rest = page.partition(f"{REPEATS_HEAD}\n{REPEATS_LINE}\n")
    after = re.sub(r"\A(\|.*\n)*", "", rest)
    lines = [line_of(python, rows[python]) for python in sorted(rows, key=numbers)]
    return f"{before}{REPEATS_HEAD}\n{REPEATS_LINE}\n{''.join(lines)}{after}"


def line_of(python: str, repeats: Repeats) -> str:
    names = "; ".join(f"`{test}` {count}" for test, count in sorted(repeats.often.items()))
    names = names.replace("|", "\\|")  # it would end the cell
    return f"| {python} | {repeats.runs} | {repeats.green} | {names or 'nothing'} |\n"


def main(words: list[str]) -> int:
    if words[:1] == ["run"]:
        return run(Path(words[1]), words[2], words[3] if words[3:] else "")
    logs = [Path(log).read_text() for log in words[1:]]
    page = PAGE.read_text()
    if words[0] == "repeats":
        PAGE.write_text(with_repeats(page, logs))
    else:
        PAGE.write_text(with_rows(page, map(row_of, logs)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
