"""A socket through the stock channels, before and after install(), which replaces no queue.

Before, multiprocessing duplicates the socket for a thread of the sender, and the receiver fetches
it from there over a connection of its own with two challenges. After, a server of the process tree
holds it until the receiver takes it.
"""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any

import fdshare
from benchmarks.measure import Bench, Run
from benchmarks.processes import in_child
from benchmarks.queues import Checked, draining

STATES = ("before install()", "after install()", "hold()")
SENT = 32  # sockets in one list, in the rows that say so


def run(bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sides: dict[str, Run] = {}
        for state in STATES:
            for shape, make in (("Queue", streamed), ("ProcessPoolExecutor", submitted)):
                side = partial(make, state, listener)
                sides[f"stock {shape}, a socket, {state}"] = bench.keep(in_child(side))
        for state in STATES[:2]:
            sides[f"stock Queue, an int, {state}"] = bench.keep(in_child(partial(numbers, state)))
            side = partial(streamed, state, listener, SENT)
            sides[f"stock Queue, {SENT} sockets at once, {state}"] = bench.keep(in_child(side))
        times = bench.alternate(sides)
    before, after, held = STATES
    for shape, goal in (("Queue", 0.33), ("ProcessPoolExecutor", None)):
        name = f"stock {shape}, a socket, "
        bench.ratio(times, name + after, name + before, goal=goal)
        bench.ratio(times, name + held, name + before)
    name = f"stock Queue, {SENT} sockets at once, "
    bench.ratio(times, name + after, name + before)
    bench.ratio(times, f"stock Queue, an int, {after}", f"stock Queue, an int, {before}")


@contextmanager
def streamed(state: str, listener: socket.socket, several: int = 0) -> Iterator[Run]:
    """A child that puts sockets into a multiprocessing.Queue."""
    context = multiprocessing.get_context("fork")
    orders: Any = multiprocessing.SimpleQueue()
    queue = context.Queue()
    sent = Several(listener, several) if several else Checked("socket", listener)

    def child() -> None:
        if state == "after install()":
            fdshare.install()
        while count := orders.get():
            for _ in range(count):
                queue.put(fdshare.hold(listener) if state == "hold()" else sent.item)

    yield from draining(context, child, orders, queue.get, sent)


class Several(Checked):
    """A list of sockets, each with a descriptor of its own."""

    def __init__(self, listener: socket.socket, number: int) -> None:
        super().__init__("socket", listener)
        self._kept = [listener.dup() for _ in range(number)]
        self.item = self._kept

    def done_with(self, item: Any) -> None:
        for one in item:
            one.close()

    def check(self, item: Any) -> None:
        assert len(item) == len(self._kept)
        assert len({one.fileno() for one in item}) == len(item)
        for one in item:
            super().check(one)


@contextmanager
def numbers(state: str) -> Iterator[Run]:
    """An int through a queue after install(): the cost for programs that send no descriptors."""
    context = multiprocessing.get_context("fork")
    orders: Any = multiprocessing.SimpleQueue()
    queue = context.Queue()

    def child() -> None:
        if state == "after install()":
            fdshare.install()
        while count := orders.get():
            for _ in range(count):
                queue.put(12345)

    process = context.Process(target=child)
    process.start()

    def run(count: int) -> float:
        start = perf_counter()
        orders.put(count)
        total = sum(queue.get() for _ in range(count))
        took = perf_counter() - start
        assert total == 12345 * count
        return took

    try:
        yield run
    finally:
        orders.put(0)
        process.join()


def port_of(sock: socket.socket) -> int:
    """What a worker does with a socket."""
    with sock:
        return int(sock.getsockname()[1])


@contextmanager
def submitted(state: str, listener: socket.socket) -> Iterator[Run]:
    """One call after the other, each with a socket, to a stock executor of one worker."""
    if state == "after install()":
        fdshare.install()
    port = listener.getsockname()[1]
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as executor:

        def run(count: int) -> float:
            start = perf_counter()
            for _ in range(count):
                given: Any = fdshare.hold(listener) if state == "hold()" else listener
                assert executor.submit(port_of, given).result() == port
            return perf_counter() - start

        yield run
