"""The framework: it measures sides in turn in one run, and summarises the figures.

An absolute time means little on a machine with other load; the ratio of two sides that were
measured in turn means much. So every family of benchmarks makes *sides*, callables that do an
operation n times and return the seconds it took, and `Bench.alternate` runs slices of all of them
in turn, again and again, in an order that rotates. A row of two sides has the median and the
quartiles of the ratios of all rounds.

A family is a module with `run(bench)`. It sets its sides up with `bench.keep`, asserts its own
workload, and calls `alternate`, then `ratio`, `value`, `absent` and `curve` for its results.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from time import perf_counter_ns
from typing import Any, Final, TypeAlias, TypeVar

__all__ = [
    "FEW_ROUNDS",
    "Bench",
    "Curve",
    "Line",
    "NotHere",
    "Plan",
    "Row",
    "Run",
    "Spread",
    "each",
    "middle",
]

FEW_ROUNDS: Final = 11  # rounds, instead of 21, of what takes long

T = TypeVar("T")
Run: TypeAlias = Callable[[int], float]  # does it n times, and returns the seconds it took
Times: TypeAlias = dict[str, list[float]]  # side -> seconds for one operation, round by round


class NotHere(Exception):
    """A peer is not installed, or cannot do the work. The message says which and why."""


@dataclass(frozen=True)
class Plan:
    """How much is measured. *scale* shrinks counts of names and clients in a quick run."""

    rounds: int = 21
    slice: float = 0.02  # seconds of one side in one round
    scale: float = 1.0

    def count(self, number: int) -> int:
        return max(int(number * self.scale), 1)

    def points(self, points: Sequence[int]) -> list[int]:
        """The points of a curve: in a quick run the first and the last two."""
        return list(points) if self.scale == 1 else [points[0], *points[-2:]]


@dataclass(frozen=True)
class Spread:
    """The median and the quartiles of *rounds* figures."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, figures: Sequence[float]) -> Spread:
        if len(figures) < 2:
            return cls(figures[0], figures[0], figures[0], 1)
        low, median, high = statistics.quantiles(figures, n=4, method="inclusive")
        return cls(median, low, high, len(figures))


@dataclass
class Row:
    """One line of the table. Without a value it says in *note* why there is none."""

    family: str
    what: str
    against: str = ""  # what *what* is divided by; empty: the value itself is the result
    value: Spread | None = None
    unit: str = "x"
    ours: Spread | None = None  # seconds for one operation
    theirs: Spread | None = None
    goal: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the median meets the goal; None where there is no goal, or nothing measured."""
        if self.goal is None or self.value is None:
            return None
        return self.value.median <= self.goal


@dataclass
class Line:
    """One line of a chart: points of (x, spread), or the ideal, which has no spread."""

    name: str
    points: list[tuple[float, Spread]] = field(default_factory=list)
    ideal: bool = False

    def add(self, x: float, figures: Sequence[float]) -> None:
        self.points.append((x, Spread.of(figures)))


@dataclass
class Curve:
    """A chart: what is measured against what it depends on. Times are in microseconds."""

    key: str  # of the file: docs/img/bench-KEY.svg
    title: str
    x: str
    y: str
    lines: list[Line]
    note: str = ""
    log_y: bool = False


class Bench:
    """What a family gets: how much to measure, and where to report it."""

    def __init__(self, plan: Plan, tell: Callable[[str], None] = lambda text: None) -> None:
        self.plan = plan
        self.rows: list[Row] = []
        self.curves: list[Curve] = []
        self.family = ""
        self._tell = tell
        self._stack = ExitStack()

    @contextmanager
    def of(self, family: str) -> Iterator[Bench]:
        """Inside, rows belong to *family*; at its end, what it kept is closed."""
        self.family = family
        with ExitStack() as self._stack:
            yield self

    # Setting up.

    def keep(self, thing: AbstractContextManager[T]) -> T:
        """Enters the context, and leaves it at the end of the family."""
        return self._stack.enter_context(thing)

    def last(self, call: Callable[..., object], *args: Any) -> None:
        """Calls *call* at the end of the family."""
        self._stack.callback(call, *args)

    def folder(self) -> Path:
        """A new folder with a short path, removed at the end of the family."""
        return Path(self.keep(tempfile.TemporaryDirectory(prefix="fdb-")))

    def step(self, text: str) -> None:
        """Shows what is being done now."""
        self._tell(f"{self.family}: {text}")

    # Measuring.

    def alternate(
        self, sides: Mapping[str, Run], *, rounds: int | None = None, longer: float = 1
    ) -> Times:
        """side -> seconds for one operation in each round; all sides in turn in every round.

        A slice is *longer* times as long if processes run at the same time: the scheduler takes
        some milliseconds to give each a core, and the figure is not to include that.
        """
        names = list(sides)
        wanted = self.plan.slice * longer
        counts = {}
        for name in names:
            self.step(name)
            counts[name] = calibrate(sides[name], wanted) if self.plan.scale == 1 else 1
        times: Times = {name: [] for name in names}
        total = min(rounds or self.plan.rounds, self.plan.rounds)
        gc.collect()
        gc.freeze()  # what is there now is no garbage: to look at all of it takes 10 ms each time
        for turn in range(total):
            self.step(f"round {turn + 1} of {total}, {len(names)} sides")
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                gc.collect()  # one side does not collect the garbage of another
                times[name].append(sides[name](counts[name]) / counts[name])
        gc.unfreeze()
        return times

    # Reporting.

    def ratio(
        self,
        times: Times,
        what: str,
        against: str,
        *,
        goal: float | None = None,
        note: str = "",
        per: int = 1,
    ) -> Row:
        """A row: *what* divided by *against*, round by round. *per*: *what* did so many at once."""
        ours = [time / per for time in times[what]]
        theirs = times[against]
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        name = what if per == 1 else f"{what}, each"
        row = Row(self.family, name, against, Spread.of(ratios), "x", goal=goal, note=note)
        row.ours, row.theirs = Spread.of(ours), Spread.of(theirs)
        self.rows.append(row)
        return row

    def value(
        self,
        what: str,
        figures: Sequence[float],
        unit: str,
        *,
        goal: float | None = None,
        note: str = "",
    ) -> Row:
        """A row of a figure without a comparison."""
        row = Row(self.family, what, "", Spread.of(figures), unit, goal=goal, note=note)
        self.rows.append(row)
        return row

    def absent(self, what: str, why: object, *, goal: float | None = None) -> None:
        """A row that says why there is no figure."""
        self.rows.append(Row(self.family, what, goal=goal, note=str(why)))

    def curve(self, curve: Curve) -> None:
        self.curves.append(curve)


def calibrate(run: Run, wanted: float) -> int:
    """How many operations take about *wanted* seconds. What it runs also warms the side up."""
    # The first one may start a thread or a server, and that is not its cost.
    if run(1) > 50 * wanted:
        return 1
    count = 1
    while True:
        took = run(count)
        if took >= wanted / 2 or count >= 1 << 20:
            return max(round(count * wanted / max(took, 1e-9)), 1)
        count *= 2 if took <= 0 else max(2, min(16, int(wanted / 2 / took) + 1))


def each(call: Callable[[], object]) -> Run:
    """A side that calls *call* again and again; the time of one is the median."""

    def run(count: int) -> float:
        took = []
        for _ in repeat(None, count):
            start = perf_counter_ns()
            call()
            took.append(perf_counter_ns() - start)
        return middle(took)

    return run


def middle(nanoseconds: Sequence[int]) -> float:
    """The seconds that so many operations take, if each takes the median.

    Other processes use the processor, too: of a thousand operations a few take a hundred times
    longer than the rest, and would dominate a mean.
    """
    return statistics.median(nanoseconds) * len(nanoseconds) / 1e9
