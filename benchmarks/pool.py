"""Pools and executors over sockets and ints: those of fdshare, and the stock ones.

A map has 64 items, in chunks of 8, on two workers; a worker asks a socket for its port and closes
it. The parent keeps its sockets open, because the stock pool pickles them later in a thread.

*Small tasks* are those of `WAYS`, without a descriptor in them: what a program pays that changed
one line for a socket elsewhere.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from time import perf_counter
from typing import Any

from benchmarks.measure import Bench, Run, each
from benchmarks.parked import port_of
from benchmarks.processes import in_child
from fdshare.mp import get_context
from fdshare.mp.executor import ProcessPoolExecutor

ITEMS, CHUNK, WORKERS = 64, 8, 2
BACK = "a socket each way"
TASKS = 200
LARGE = 8 << 20  # bytes


def run(bench: Bench) -> None:
    sides: dict[str, Run] = {}
    for who in ("fdshare", "stock"):
        for what in ("sockets", "ints"):
            sides[f"{who} Pool.map, {what}"] = bench.keep(in_child(partial(mapped, who, what)))
            side = partial(executed, who, what)
            sides[f"{who} executor.map, {what}"] = bench.keep(in_child(side))
        sides[f"{who} Pool.apply, {BACK}"] = bench.keep(in_child(partial(applied, who)))
    times = {name: [t / ITEMS for t in took] for name, took in bench.alternate(sides).items()}
    for name in (f"fdshare Pool.apply, {BACK}", f"stock Pool.apply, {BACK}"):
        times[name] = [t * ITEMS for t in times[name]]
    for shape in ("Pool.map", "executor.map"):
        for what in ("sockets", "ints"):
            bench.ratio(times, f"fdshare {shape}, {what}", f"stock {shape}, {what}")
    bench.ratio(times, f"fdshare Pool.apply, {BACK}", f"stock Pool.apply, {BACK}")
    bench.ratio(times, "fdshare Pool.map, sockets", "fdshare Pool.map, ints")
    small(bench)


def small(bench: Bench) -> None:
    for name in WAYS:
        sides = {
            who: bench.keep(in_child(partial(asked, who, name))) for who in ("fdshare", "stock")
        }
        row = bench.ratio(bench.alternate(sides), "fdshare", "stock", goal=1.0)
        row.what, row.against = f"fdshare {name}", f"stock {name}"


def tell(size: int) -> bytes:
    return bytes(size)


# A call of each, with a pool and an executor of two workers.
WAYS: dict[str, Callable[[Any, Any], object]] = {
    f"Pool.map, {TASKS} by one": lambda pool, _: pool.map(double, range(TASKS), 1),
    "Pool.map, 20,000": lambda pool, _: pool.map(double, range(20_000)),
    f"Pool.imap, {TASKS}": lambda pool, _: list(pool.imap(double, range(TASKS))),
    f"Pool.imap_unordered, {TASKS}": lambda pool, _: list(
        pool.imap_unordered(double, range(TASKS))
    ),
    f"Pool.starmap, {TASKS} by one": lambda pool, _: pool.starmap(
        double, [(number,) for number in range(TASKS)], 1
    ),
    f"Pool.apply_async, {TASKS}": lambda pool, _: [
        result.get() for result in [pool.apply_async(double, (n,)) for n in range(TASKS)]
    ],
    "Pool.apply": lambda pool, _: pool.apply(double, (1,)),
    "Pool.apply, a result of 8 MiB": lambda pool, _: pool.apply(tell, (LARGE,)),
    f"executor.submit, {TASKS}": lambda _, executor: [
        future.result() for future in [executor.submit(double, n) for n in range(TASKS)]
    ],
    "executor.submit": lambda _, executor: executor.submit(double, 1).result(),
    f"executor.map, {TASKS}": lambda _, executor: list(executor.map(double, range(TASKS))),
}


@contextmanager
def asked(who: str, name: str) -> Iterator[Run]:
    cls = ProcessPoolExecutor if who == "fdshare" else concurrent.futures.ProcessPoolExecutor
    context, way = context_of(who), WAYS[name]
    with context.Pool(WORKERS) as pool, cls(WORKERS, context) as executor:
        yield each(lambda: way(pool, executor))


def context_of(who: str) -> Any:
    return get_context("fork") if who == "fdshare" else multiprocessing.get_context("fork")


def double(number: int) -> int:
    return 2 * number


@contextmanager
def work(what: str) -> Iterator[tuple[Any, list[Any], list[int]]]:
    """(function, items, results)"""
    if what == "ints":
        yield double, list(range(ITEMS)), [double(number) for number in range(ITEMS)]
        return
    with ExitStack() as stack:  # 64 objects, because one object twice in a chunk arrives as one
        items = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(ITEMS)]
        yield port_of, items, [item.getsockname()[1] for item in items]


@contextmanager
def mapped(who: str, what: str) -> Iterator[Run]:
    with work(what) as (function, items, results), context_of(who).Pool(WORKERS) as pool:

        def run(count: int) -> float:
            start = perf_counter()
            for _ in range(count):
                assert pool.map(function, items, CHUNK) == results
            return perf_counter() - start

        yield run


@contextmanager
def executed(who: str, what: str) -> Iterator[Run]:
    cls = ProcessPoolExecutor if who == "fdshare" else concurrent.futures.ProcessPoolExecutor
    with work(what) as (function, items, results), cls(WORKERS, context_of(who)) as executor:

        def run(count: int) -> float:
            start = perf_counter()
            for _ in range(count):
                assert list(executor.map(function, items, chunksize=CHUNK)) == results
            return perf_counter() - start

        yield run


def same(sock: socket.socket) -> socket.socket:
    return sock


@contextmanager
def applied(who: str) -> Iterator[Run]:
    """A socket to a worker and back, one call at a time."""
    with work("sockets") as (_, items, _), context_of(who).Pool(1) as pool:
        address = items[0].getsockname()

        def run(count: int) -> float:
            start = perf_counter()
            for _ in range(count):
                with pool.apply(same, (items[0],)) as back:
                    assert back.getsockname() == address
            return perf_counter() - start

        yield run
