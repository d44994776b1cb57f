"""Small tasks without a descriptor: what a program pays that changed one line for a socket
elsewhere. Pools and executors of two workers, of fdshare and the stock ones, in turn.

Processor time is measured with fork and multiprocessing alone: once a worker has started it does
the same with every start method. So spawn is left out, too.
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from time import perf_counter
from typing import Any, TypeAlias

from benchmarks.measure import Bench, Run
from benchmarks.processes import cpu_seconds, in_child
from fdshare.mp import get_context
from fdshare.mp.executor import ProcessPoolExecutor

BACKENDS, METHODS = ("multiprocessing", "multiprocess"), ("fork", "forkserver")
SIDES = ("fdshare", "stock")
WORKERS = 2
LARGE = 8 << 20  # bytes
ROUNDS = 7
TIME, PARENT, ALL_WORKERS = "time", "processor time of the parent", "processor time of the workers"

Way: TypeAlias = Callable[[Any], object]


def double(number: int) -> int:
    return 2 * number


def tell(size: int) -> bytes:
    return bytes(size)


# What is done with a pool, and with an executor.
POOL_WAYS: dict[str, Way] = {
    "map, 200 by one": lambda pool: pool.map(double, range(200), 1),
    "map, 20,000": lambda pool: pool.map(double, range(20_000)),
    "imap, 200": lambda pool: list(pool.imap(double, range(200))),
    "imap_unordered, 200": lambda pool: list(pool.imap_unordered(double, range(200))),
    "starmap, 200 by one": lambda pool: pool.starmap(double, zip(range(200)), 1),
    "starmap, 20,000": lambda pool: pool.starmap(double, zip(range(20_000))),
    "apply_async, 1,000": lambda pool: [
        result.get() for result in [pool.apply_async(double, (n,)) for n in range(1_000)]
    ],
    "apply": lambda pool: pool.apply(double, (1,)),
    "apply, a result of 8 MiB": lambda pool: pool.apply(tell, (LARGE,)),
}
EXECUTOR_WAYS: dict[str, Way] = {
    "map, 200": lambda executor: list(executor.map(double, range(200))),
    "submit, 500": lambda executor: [
        future.result() for future in [executor.submit(double, n) for n in range(500)]
    ],
    "submit": lambda executor: executor.submit(double, 1).result(),
}


def run(bench: Bench) -> None:
    for backend in BACKENDS:
        try:
            import_module(backend)
        except ImportError:
            bench.absent(f"small tasks of {backend}", f"not installed: {backend}")
            continue
        for method in METHODS:
            for make, ways, name in (
                (pool, POOL_WAYS, "Pool"),
                (executor, EXECUTOR_WAYS, "executor"),
            ):
                if make is executor and backend == "multiprocess" and method == "forkserver":
                    why = "cannot: the stock executor has a queue of multiprocessing"
                    bench.absent(f"executor ({backend}, {method})", why)
                    continue
                measure(bench, backend, method, make, ways, name)


def measure(
    bench: Bench, backend: str, method: str, make: Any, ways: dict[str, Way], name: str
) -> None:
    contexts = {who: context_of(who, backend, method) for who in SIDES}
    processes: dict[str, Any] = {
        who: bench.keep(in_child(partial(make, contexts[who]))) for who in SIDES
    }
    clocks: tuple[str, ...] = (TIME,)
    if (backend, method) == ("multiprocessing", "fork") and bench.plan.scale == 1:
        clocks = (TIME, PARENT, ALL_WORKERS)
    for way in ways:
        read: dict[str, dict[str, list[float]]] = {clock: {} for clock in clocks}
        sides = {who: on_clocks(who, partial(processes[who], way, clocks), read) for who in SIDES}
        rounds = len(bench.alternate(sides, rounds=ROUNDS)[SIDES[0]])
        for clock, seconds in read.items():
            times = {who: seconds[who][-rounds:] for who in SIDES}  # not of the calibration
            row = bench.ratio(times, *SIDES, goal=1.0)
            shown = f"{name}.{way}" if clock == TIME else f"{name}.{way}, {clock}"
            row.what, row.against = (f"{who} {shown} ({backend}, {method})" for who in SIDES)


def on_clocks(
    who: str, process: Callable[[int], list[float]], read: dict[str, dict[str, list[float]]]
) -> Run:
    """A side that adds to *read* what one operation has taken by each clock; the first is TIME."""

    def run(count: int) -> float:
        took = process(count)
        for seconds, of_clock in zip(took, read.values(), strict=True):
            of_clock.setdefault(who, []).append(seconds / count)
        return took[0]

    return run


def context_of(who: str, backend: str, method: str) -> Any:
    if who == "fdshare":
        return get_context(method, backend=backend)
    return import_module(backend).get_context(method)


@contextmanager
def pool(context: Any) -> Iterator[Run]:
    with context.Pool(WORKERS) as made:
        yield timed(made, POOL_WAYS, lambda: [worker.pid for worker in made._pool])


@contextmanager
def executor(context: Any) -> Iterator[Run]:
    ours = type(context).__module__.startswith("fdshare")
    cls = ProcessPoolExecutor if ours else concurrent.futures.ProcessPoolExecutor
    with cls(WORKERS, context) as made:
        yield timed(made, EXECUTOR_WAYS, lambda: list(made._processes))


def timed(obj: Any, ways: dict[str, Way], workers: Callable[[], list[int]]) -> Any:
    """Does a way so many times, and returns the seconds by each of some clocks."""

    def now(clock: str) -> float:
        if clock == TIME:
            return perf_counter()
        pids = [os.getpid()] if clock == PARENT else workers()
        return sum(map(cpu_seconds, pids))

    def run(way: str, clocks: tuple[str, ...], count: int) -> list[float]:
        before = {clock: now(clock) for clock in reversed(clocks)}
        for _ in range(count):
            ways[way](obj)
        return [now(clock) - before[clock] for clock in clocks]

    return run
