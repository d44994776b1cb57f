"""The benchmarks work: a run with tiny counts, and the framework's own arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed

from benchmarks import charts, report  # noqa: E402
from benchmarks.__main__ import FAMILIES  # noqa: E402
from benchmarks.measure import Bench, Curve, Line, Plan, Spread, calibrate, each  # noqa: E402


@pytest.mark.parametrize("family", FAMILIES)
def test_quick_run(family: str, tmp_path: Path) -> None:
    """Every family runs, asserts its own workload, and writes what it found."""
    words = [sys.executable, "-m", "benchmarks", "--quick", family, "--out", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "results.json").read_text())
    assert figures["rows"]
    for row in figures["rows"]:
        assert row["family"] == family
        assert row["value"] or row["note"], "a silent gap"
    assert f"## {family}" in (tmp_path / "results.md").read_text()
    drawn = list(tmp_path.glob("bench-*.svg"))
    assert len(drawn) >= len(figures["curves"])
    for chart in drawn:
        ElementTree.parse(chart)


def test_alternate_takes_turns() -> None:
    turns: list[str] = []

    def side(name: str, seconds: float) -> object:
        def run(count: int) -> float:
            turns.append(name)
            return seconds * count

        return run

    bench = Bench(Plan(rounds=4, slice=0.001))
    sides = {"ours": side("ours", 2e-6), "theirs": side("theirs", 1e-6)}
    with bench.of("test"):
        times = bench.alternate(sides)  # type: ignore[arg-type]
        row = bench.ratio(times, "ours", "theirs", goal=1.5)
    assert turns[-8:] == ["ours", "theirs", "theirs", "ours"] * 2
    assert row.value is not None
    assert row.value.median == pytest.approx(2.0)
    assert row.met is False


def test_goal_is_met_at_the_goal() -> None:
    bench = Bench(Plan())
    assert bench.value("a", [1.5], "ms", goal=1.5).met is True
    assert bench.value("b", [1.6], "ms", goal=1.5).met is False
    assert bench.value("c", [9.9], "ms").met is None
    bench.absent("d", "not installed: d", goal=1.0)
    assert bench.rows[-1].met is None
    assert "not installed: d" in report.cells(bench.rows[-1])


def test_spread_has_the_quartiles() -> None:
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)


def test_calibrate_fills_the_slice() -> None:
    assert calibrate(lambda count: count * 1e-3, 0.02) == 20
    assert calibrate(lambda count: count * 1.0, 0.02) == 1
    ran = []
    assert each(lambda: ran.append(1))(3) > 0
    assert len(ran) == 3


def test_what_is_kept_ends_with_the_family() -> None:
    bench = Bench(Plan())
    with bench.of("test"):
        folder = bench.folder()
        assert folder.is_dir()
        ended: list[int] = []
        bench.last(ended.append, 1)
    assert not folder.exists()
    assert ended == [1]


@pytest.mark.parametrize("log_y", [False, True])
def test_chart_is_xml_with_a_line_for_each_point(log_y: bool) -> None:
    line = Line("a < b")
    for x in (1, 10, 15_000):
        line.add(x, [x + 1.0, x + 2.0, x + 3.0])
    flat = Line("ideal", [(x, spread) for x, spread in line.points], ideal=True)
    curve = Curve("k", "t & t", "x", "y", [line, flat], log_y=log_y)
    root = ElementTree.fromstring(charts.draw(curve))
    space = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{space}circle")) == 3
    assert "a < b" in [text.text for text in root.iter(f"{space}text")]


def test_no_bar_and_no_line_crosses_a_number() -> None:
    bench = Bench(Plan(rounds=4, slice=0.001))
    with bench.of("test"):
        bench.value("well below", [0.5], "ms", goal=2)
        bench.value("far beyond", [9.0], "ms", goal=2)
    root = ElementTree.fromstring(charts.draw_goals(bench.rows))
    space = "{http://www.w3.org/2000/svg}"
    numbers = [t for t in root.iter(f"{space}text") if " of 2 ms" in (t.text or "")]
    assert len(numbers) == 2
    line = [p for part in root.iter(f"{space}polyline") for p in part.attrib["points"].split()]
    bars = list(root.iter(f"{space}rect"))[1:]  # the first is the background
    right = [float(point.split(",")[0]) for point in line]
    right += [float(bar.attrib["x"]) + float(bar.attrib["width"]) for bar in bars]
    assert max(right) < min(float(number.attrib["x"]) for number in numbers)


def test_variants_of_a_row_have_one_bar() -> None:
    bench = Bench(Plan(rounds=4, slice=0.001))
    with bench.of("test"):
        bench.value("map (multiprocessing)", [1.0], "ms", goal=2)
        bench.value("map (multiprocess)", [3.0], "ms", goal=2)
        bench.value("map, processor time of the parent", [1.0], "ms", goal=2)
        bench.value("apply", [1.0], "ms", goal=2)
    said = "".join(ElementTree.fromstring(charts.draw_goals(bench.rows)).itertext())
    assert said.count(" of 2 ms") == 2
    assert "map (multiprocess)" in said


def test_numbers_have_three_digits() -> None:
    assert [report.number(value) for value in (0.0123, 0.5, 1.234, 12.34, 1234.5)] == [
        "0.0123",
        "0.500",
        "1.23",
        "12.3",
        "1,234",
    ]
