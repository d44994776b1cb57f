"""The output: progress, the table on the terminal, results.md and results.json."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import charts
from benchmarks.measure import Bench, Row, Spread

__all__ = ["environment", "print_table", "progress", "write"]

console = Console()
_PACKAGES = ("fdshare", "msgspec", "multiprocess", "dill")
HEADINGS = ("what", "time", "compared with", "its time", "ratio", "goal", "")


class Shown:
    """Progress: a bar on a terminal, a line for each family elsewhere."""

    def __init__(self, bar: Progress | None, total: int) -> None:
        self._bar = bar
        self._since = time.monotonic()
        self._task = bar.add_task("starting", total=total) if bar else None

    def tell(self, text: str) -> None:
        if self._bar and self._task is not None:
            self._bar.update(self._task, description=text)

    def done(self, family: str, bench: Bench) -> None:
        if self._bar and self._task is not None:
            self._bar.advance(self._task)
        else:
            rows = sum(row.family == family for row in bench.rows)
            print(f"{family}: {rows} rows, {time.monotonic() - self._since:.0f} s", flush=True)
            self._since = time.monotonic()


@contextmanager
def progress(total: int) -> Iterator[Shown]:
    if not console.is_terminal:
        yield Shown(None, total)
        return
    columns = (BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        yield Shown(bar, total)


# The cells of a row.


def duration(spread: Spread | None) -> str:
    return "" if spread is None else number(spread.median * 1e6) + " us"


def number(value: float) -> str:
    """Three digits, more only before the point."""
    if value == 0:
        return "0"
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    if abs(value) < 0.1:
        digits = 4
    elif abs(value) < 1:
        digits = 3
    return f"{value:,.{digits}f}"


def ratio(row: Row) -> str:
    if row.value is None:
        return ""
    unit = "" if row.unit == "x" else f" {row.unit}"
    value = row.value
    if value.rounds == 1:
        return f"{number(value.median)}{unit}"
    return f"{number(value.median)}{unit} ({number(value.low)} to {number(value.high)})"


def goal(row: Row) -> str:
    if row.goal is None:
        return ""
    return f"<= {row.goal:g}" + ("" if row.unit == "x" else f" {row.unit}")


def verdict(row: Row) -> str:
    return {True: "met", False: "NOT MET", None: ""}[row.met]


def cells(row: Row) -> tuple[str, ...]:
    if row.value is None:
        return (row.what, "", row.note, "", "", goal(row), "not measured")
    against = "; ".join(filter(None, (row.against, row.note)))
    theirs = duration(row.theirs)
    return (row.what, duration(row.ours), against, theirs, ratio(row), goal(row), verdict(row))


def print_table(bench: Bench, seconds: float) -> None:
    table = Table(title=f"fdshare, measured in {seconds:.0f} s", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading in {"time", "its time"} else "left")
    before = ""
    for row in bench.rows:
        if row.family != before:
            table.add_section()
            table.add_row(f"[bold]{row.family}[/bold]")
            before = row.family
        style = {True: "green", False: "red", None: None}[row.met]
        table.add_row(*cells(row), style=style)
    console.print(table)


# Files.


def environment() -> dict[str, Any]:
    """The machine and the versions."""
    model = ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": model or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
        "s6": s6_version(),
        "load": os.getloadavg()[0],
    }


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def s6_version() -> str:
    if shutil.which("s6-fdholderd") is None:
        return "not installed"
    query = ["dpkg-query", "-W", "-f", "${Version}", "s6"]
    try:
        return subprocess.run(query, capture_output=True, text=True).stdout or "version unknown"
    except FileNotFoundError:
        return "version unknown"


def write(bench: Bench, seconds: float, folder: Path, images: Path) -> None:
    """results.md and results.json into *folder*, a chart for each curve into *images*."""
    folder.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    here = environment()
    figures = {
        "environment": here,
        "seconds": round(seconds),
        "rows": [{**dataclasses.asdict(row), "met": row.met} for row in bench.rows],
        "curves": [dataclasses.asdict(curve) for curve in bench.curves],
    }
    (folder / "results.json").write_text(json.dumps(figures, indent=1) + "\n")
    (folder / "results.md").write_text(markdown(bench, seconds, here))
    for curve in bench.curves:
        (images / f"bench-{curve.key}.svg").write_text(charts.draw(curve))
    if any(row.goal for row in bench.rows):
        (images / "bench-goals.svg").write_text(charts.draw_goals(bench.rows))


def markdown(bench: Bench, seconds: float, here: dict[str, Any]) -> str:
    goals = [row for row in bench.rows if row.goal is not None]
    met = sum(row.met is True for row in goals)
    versions = ", ".join(f"{name} {number}" for name, number in here["versions"].items())
    lines = [
        "# Results",
        "",
        (
            f"Written by `python -m benchmarks` on {here['date']}, in {seconds:.0f} s: "
            f"{here['processor']}, {here['cores']} cores, {here['system']}, "
            f"CPython {here['python']}, {versions}, s6 {here['s6']}."
        ),
        "",
        (
            "A ratio is the median of the ratios of all rounds, with their quartiles; both sides "
            "of a row were measured in turn in the same run. What each row does and how is in "
            "[docs/performance.md](../docs/performance.md)."
        ),
        "",
        f"Goals met: {met} of {len(goals)}.",
    ]
    before = ""
    for row in bench.rows:
        if row.family != before:
            lines += ["", f"## {row.family}", "", line(HEADINGS), line(("---",) * len(HEADINGS))]
            before = row.family
        lines.append(line(cells(row)))
    return "\n".join(lines) + "\n"


def line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


if __name__ == "__main__":
    json.dump(environment(), sys.stdout, indent=1)
