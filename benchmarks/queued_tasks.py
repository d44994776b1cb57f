"""The memory of 100,000 tasks that wait in a pool or an executor for their only worker.

Each figure is of a fresh process, whose worker is busy meanwhile: how much the memory of the parent
grows (Pss), with the results that it is given back. It is measured once: three runs gave the same
to two hundredths. A `map` is of a range, which neither side copies: numbers and text are pickled
when a worker is free. What else a `map` of fdshare has is pickled in the call, so that it may be
closed.
"""

from __future__ import annotations

import concurrent.futures
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from benchmarks.measure import Bench, Run
from benchmarks.memory import private_memory
from benchmarks.processes import in_child
from benchmarks.small_tasks import SIDES, context_of, double
from fdshare.mp.executor import ProcessPoolExecutor

TASKS = 100_000
GOALS = {"Pool.apply_async": 1.5, "executor.submit": 1.5, "Pool.map by one": 1.5}


def run(bench: Bench) -> None:
    for way, goal in GOALS.items():
        number = bench.plan.count(TASKS)
        grown: dict[str, list[float]] = {}
        for who in SIDES:
            bench.step(f"{number} tasks of {way}, {who}")
            with in_child(partial(waiting, who, way)) as memory:
                grown[who] = [memory(number) / number]
        row = bench.ratio(grown, *SIDES, goal=goal)
        assert row.ours is not None
        assert row.theirs is not None
        row.note = f"{row.ours.median:.0f} and {row.theirs.median:.0f} bytes for each"
        row.ours = row.theirs = None  # they are no times
        row.what, row.against = (f"{who} memory of {number:,} tasks, {way}" for who in SIDES)


@contextmanager
def waiting(who: str, way: str) -> Iterator[Run]:
    """Submits so many tasks, and returns the bytes by which this process has grown."""
    context, (reads, writes) = context_of(who, "multiprocessing", "fork"), os.pipe()
    if way.startswith("executor"):
        cls = ProcessPoolExecutor if who == "fdshare" else concurrent.futures.ProcessPoolExecutor
        with cls(1, context) as executor:
            executor.submit(os.read, reads, 1)
            yield growth(lambda count: [executor.submit(double, n) for n in range(count)])
            os.write(writes, b"x")
            executor.shutdown(cancel_futures=True)
        return
    with context.Pool(1) as pool:
        pool.apply_async(os.read, (reads, 1))
        if way == "Pool.apply_async":
            yield growth(lambda count: [pool.apply_async(double, (n,)) for n in range(count)])
        else:
            yield growth(lambda count: pool.map_async(double, range(count), 1))


def growth(submit: Callable[[int], object]) -> Run:
    def run(count: int) -> float:
        gc.collect()
        before = private_memory(os.getpid())
        results = submit(count)
        grown = private_memory(os.getpid()) - before
        del results
        return grown

    return run
