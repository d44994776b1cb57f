"""Pools and executors over sockets and ints: those of fdshare, and the stock ones.

A map has 64 items, in chunks of 8, on two workers; a worker asks a socket for its port and closes
it. The parent keeps its sockets open, because the stock pool pickles them later in a thread.

Tasks without a descriptor have modules of their own: small_tasks.py has their time, queued_tasks.py
the memory of those that wait.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from time import perf_counter
from typing import Any

from benchmarks import queued_tasks, small_tasks
from benchmarks.measure import FEW_ROUNDS, Bench, Run
from benchmarks.parked import port_of
from benchmarks.processes import in_child
from fdshare.mp import get_context
from fdshare.mp.executor import ProcessPoolExecutor

ITEMS, CHUNK, WORKERS = 64, 8, 2
BACK = "a socket each way"


def run(bench: Bench) -> None:
    sides: dict[str, Run] = {}
    for who in ("fdshare", "stock"):
        for what in ("sockets", "ints"):
            sides[f"{who} Pool.map, {what}"] = bench.keep(in_child(partial(mapped, who, what)))
            side = partial(executed, who, what)
            sides[f"{who} executor.map, {what}"] = bench.keep(in_child(side))
        sides[f"{who} Pool.apply, {BACK}"] = bench.keep(in_child(partial(applied, who)))
    whole = bench.alternate(sides, rounds=FEW_ROUNDS)
    times = {name: [t / ITEMS for t in took] for name, took in whole.items()}
    for name in (f"fdshare Pool.apply, {BACK}", f"stock Pool.apply, {BACK}"):
        times[name] = whole[name]
    for shape in ("Pool.map", "executor.map"):
        for what in ("sockets", "ints"):
            goal = 0.2 if what == "sockets" else None
            bench.ratio(times, f"fdshare {shape}, {what}", f"stock {shape}, {what}", goal=goal)
    bench.ratio(times, f"fdshare Pool.apply, {BACK}", f"stock Pool.apply, {BACK}")
    bench.ratio(times, "fdshare Pool.map, sockets", "fdshare Pool.map, ints")
    small_tasks.run(bench)
    queued_tasks.run(bench)


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
