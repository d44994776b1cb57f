"""Charts as SVG, written without a library: they have only a few lines and bars.

Each has a light background of its own, so that the page may be light or dark.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from html import escape

from benchmarks.measure import Curve, Line, Row

__all__ = ["draw", "draw_goals"]

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 74, 24, 78, 56
# Colour-blind readers can distinguish them, too (Okabe and Ito); the ideal is grey and dashed.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
INK, PALE, GRID = "#24292f", "#57606a", "#d8dee4"
# What a row's name has besides: of which package, of which size, of whose processor time.
VARIANT = re.compile(r" \(.*|, (array|bytes|processor time) .*")
FONT = "font-family='system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif'"


def draw(curve: Curve) -> str:
    """The chart of *curve*: both quartiles as a band, the median as a line."""
    xs = [x for line in curve.lines for x, _ in line.points]
    tops = [spread.high for line in curve.lines for _, spread in line.points]
    lows = [spread.low for line in curve.lines for _, spread in line.points]
    across = Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT, log=True)
    if curve.log_y:
        low, high = 10 ** math.floor(math.log10(min(lows))), 10 ** math.ceil(math.log10(max(tops)))
        up = Scale(low, high, HEIGHT - BOTTOM, TOP, log=True)
    else:
        up = Scale(0, max(tops) * 1.08, HEIGHT - BOTTOM, TOP)
    parts = [*head(curve.title, curve.note, HEIGHT), *grid(across, up, sorted(set(xs)))]
    parts += axis_titles(curve)
    colours = iter(COLOURS)
    for index, line in enumerate(curve.lines):
        colour = PALE if line.ideal else next(colours)
        parts += plot(line, across, up, colour)
        parts += legend(line, index, colour)
    return "\n".join([*parts, "</svg>", ""])


class Scale:
    """From a value to a coordinate of the chart."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False):
        self.log = log
        self.low, self.high = low, high if high > low else low + 1
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            return [10.0**power for power in range(first, last + 1)]
        step = 10 ** math.floor(math.log10(self.high / 2))
        step *= next(m for m in (1, 2, 5, 10) if self.high / (step * m) <= 6)
        return [step * n for n in range(int(self.high / step) + 1)]


def head(title: str, note: str, height: int) -> list[str]:
    return [
        (
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' "
            f"width='{WIDTH}' height='{height}' role='img' {FONT}>"
        ),
        f"<title>{escape(title)}</title>",
        (
            f"<rect x='0.5' y='0.5' width='{WIDTH - 1}' height='{height - 1}' rx='8' "
            f"fill='#ffffff' stroke='{GRID}'/>"
        ),
        text(20, 30, title, size=17, weight=600),
        text(20, 50, note, size=12, fill=PALE),
    ]


def text(
    x: float,
    y: float,
    words: str,
    *,
    size: int = 12,
    anchor: str = "start",
    fill: str = INK,
    weight: int = 400,
    more: str = "",
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' text-anchor='{anchor}' fill='{fill}' "
        f"font-weight='{weight}' {more}>{escape(words)}</text>"
    )


def grid(across: Scale, up: Scale, xs: Sequence[float]) -> list[str]:
    parts = []
    for value in up.ticks():
        y = up(value)
        parts.append(stroke([(LEFT, y), (WIDTH - RIGHT, y)], GRID, 1))
        parts.append(text(LEFT - 8, y + 4, figure(value), anchor="end", fill=PALE))
    taken = -100.0
    for value in xs:
        x = across(value)
        parts.append(stroke([(x, HEIGHT - BOTTOM), (x, HEIGHT - BOTTOM + 4)], PALE, 1))
        if x - taken > 44:  # labels do not overlap
            parts.append(text(x, HEIGHT - BOTTOM + 18, figure(value), anchor="middle", fill=PALE))
            taken = x
    return parts


def axis_titles(curve: Curve) -> list[str]:
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = f"transform='rotate(-90 18 {middle:.0f})'"
    return [
        text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, curve.x, anchor="middle"),
        text(18, middle, curve.y, anchor="middle", more=turned),
    ]


def plot(line: Line, across: Scale, up: Scale, colour: str) -> list[str]:
    points = [(across(x), up(spread.median)) for x, spread in line.points]
    if line.ideal:
        return [stroke(points, colour, 1.5, "stroke-dasharray='6 4'")]
    band = [(across(x), up(s.high)) for x, s in line.points]
    band += [(across(x), up(s.low)) for x, s in reversed(line.points)]
    parts = [f"<polygon points='{places(band)}' fill='{colour}' opacity='0.15'/>"]
    parts.append(stroke(points, colour, 2.2))
    parts += [f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{colour}'/>" for x, y in points]
    return parts


def legend(line: Line, index: int, colour: str) -> list[str]:
    x, y = LEFT + 12 + index % 2 * 320, TOP - 10 + index // 2 * 16
    dash = "stroke-dasharray='6 4'" if line.ideal else ""
    return [stroke([(x, y), (x + 22, y)], colour, 2.2, dash), text(x + 28, y + 4, line.name)]


def stroke(points: Iterable[tuple[float, float]], colour: str, width: float, more: str = "") -> str:
    return (
        f"<polyline points='{places(points)}' fill='none' stroke='{colour}' "
        f"stroke-width='{width}' {more}/>"
    )


def places(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def figure(value: float) -> str:
    """1,500,000 as 1.5 M: short enough for an axis."""
    for size, letter in ((1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == ' k' else size):g}{letter}"
    return f"{value:g}"


# The goals: which share of each is used.

ROW, LABELS, FIGURES = 34, 400, 600  # x of the bars, and of the numbers: no line crosses those


def draw_goals(rows: Sequence[Row]) -> str:
    """A bar for each row that has a goal: what was measured, as a share of what is allowed. Of rows
    that are variants of one, the bar of the one that is furthest from its goal."""
    worst: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row.goal is None or row.value is None:
            continue
        kept = worst.setdefault((row.family, VARIANT.sub("", row.what)), row)
        if share_of_goal(row) > share_of_goal(kept):
            worst[row.family, VARIANT.sub("", row.what)] = row
    shown = list(worst.values())
    height = TOP + ROW * len(shown) + 24
    title, note = "Goals", "measured as a share of the goal: left of the line is met"
    across = Scale(0, 2, LABELS, FIGURES - 10)
    parts = head(title, note, height)
    for index, row in enumerate(shown):
        parts += goal_bar(row, TOP + ROW * index, across)
    parts.append(stroke([(across(1), TOP - 12), (across(1), height - 16)], INK, 1.5))
    return "\n".join([*parts, "</svg>", ""])


def share_of_goal(row: Row) -> float:
    assert row.value is not None
    assert row.goal is not None
    return row.value.median / row.goal


def goal_bar(row: Row, y: float, across: Scale) -> list[str]:
    assert row.value is not None
    end = across(min(share_of_goal(row), 2))
    colour = COLOURS[2] if row.met else COLOURS[1]
    unit = "" if row.unit == "x" else f" {row.unit}"
    said = f"{row.value.median:.3g} of {row.goal:g}{unit}"
    below = f"/ {row.against}" if row.against else ""
    return [
        text(20, y + 8, shortened(row.what), size=12),
        text(20, y + 22, shortened(below), size=11, fill=PALE),
        (
            f"<rect x='{LABELS}' y='{y}' width='{max(end - LABELS, 1):.1f}' height='{ROW - 14}' "
            f"rx='2' fill='{colour}'/>"
        ),
        text(FIGURES, y + 14, said, size=11),
    ]


def shortened(words: str) -> str:
    return words if len(words) <= 62 else words[:60] + " ..."
