"""How a fetch grows with the number of names and clients, and a queue with the size of its items.

Each point of a curve has a server of its own; all points of a curve are measured in turn. The two
rows with goals are points of the curves. Each chart has the ideal: constant for names and idle
clients, a share of one processor for active clients, the time to copy the bytes for a queue.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any

from benchmarks.measure import Bench, Curve, Line, Run, Spread, each
from benchmarks.memory import fill
from benchmarks.processes import HERE, cpu_seconds, held_file, in_child, same_file
from fdshare import Manager
from fdshare.mp import get_context

NAMES = (1, 10, 100, 1_000, 10_000)
IDLE = (1, 10, 100, 1_000, 5_000)
ACTIVE = (1, 2, 4, 8, 16, 32, 64)
CORES = len(os.sched_getaffinity(0))
PAYLOADS = (1, 100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000)


def run(bench: Bench) -> None:
    fd = bench.keep(held_file())
    by_names(bench, fd)
    by_idle_clients(bench, fd)
    by_active_clients(bench, fd)
    by_payload(bench)


def fetched(manager: Manager, fd: int) -> Run:
    """A side that fetches one name, checked."""
    manager.register("mark", fd)
    with manager.fetch("mark") as found:
        assert same_file(found.fileno(), fd)
    return each(lambda: manager.fetch("mark").close())


def by_names(bench: Bench, fd: int) -> None:
    sides, line = {}, Line("fetch")
    for number in bench.plan.points(NAMES):
        held = bench.plan.count(number)
        bench.step(f"{held} names")
        # The defaults keep a quarter of the descriptors for connections.
        room: dict[str, float | int] = {
            "max_descriptors": held + 64,
            "max_names": held + 64,
            "max_connections": 64,
        }
        manager = bench.keep(Manager(limits=room))
        fill(manager, held - 1)
        sides[f"fetch, {number:,} names held"] = fetched(manager, fd)
        assert manager.stats().names == held
    times = bench.alternate(sides)
    for number, name in zip(bench.plan.points(NAMES), sides, strict=True):
        line.add(number, microseconds(times[name]))
    first = "fetch, 1 names held"
    bench.ratio(times, "fetch, 10,000 names held", first, goal=1.1)
    title, note = "A fetch, by the names that are held", "median of a fetch; the band: quartiles"
    lines = [line, constant(line)]
    bench.curve(Curve("names", title, "names held", "time of a fetch, µs", lines, note))


def by_idle_clients(bench: Bench, fd: int) -> None:
    sides, line = {}, Line("fetch")
    for number in bench.plan.points(IDLE):
        count = bench.plan.count(number)
        bench.step(f"{count} idle clients")
        room: dict[str, float | int] = {
            "max_connections": count + 64,
            "max_connections_per_uid": count + 64,
        }
        manager = bench.keep(Manager(limits=room))
        bench.keep(others("idle", manager.address, str(count)))
        sides[f"fetch, {number:,} idle clients"] = fetched(manager, fd)
        assert manager.stats().connections == count + 1
    times = bench.alternate(sides)
    for number, name in zip(bench.plan.points(IDLE), sides, strict=True):
        line.add(number, microseconds(times[name]))
    first = "fetch, 1 idle clients"
    bench.ratio(times, "fetch, 1,000 idle clients", first, goal=1.2)
    bench.ratio(times, "fetch, 5,000 idle clients", first)
    title, note = "A fetch, by the idle clients", "median of a fetch; the band: quartiles"
    lines = [line, constant(line)]
    bench.curve(Curve("idle", title, "idle clients", "time of a fetch, µs", lines, note))


def by_active_clients(bench: Bench, fd: int) -> None:
    """Total throughput and latency with clients that do nothing but fetch."""
    manager = bench.keep(Manager())
    manager.register("mark", fd)
    total, waits = Line("all clients together"), Line("fetch")
    seconds: dict[int, list[float]] = {}
    ceiling = Line("ideal: all cores busy with fetches alone", ideal=True)
    ideal_wait = Line("ideal: the cores are shared fairly", ideal=True)
    for number in bench.plan.points(ACTIVE):
        count = min(number, bench.plan.count(400))
        bench.step(f"{count} active clients")
        with others("active", manager.address, "mark", str(count)) as child:
            rates, times, best = fetching(bench, manager, child)
        total.add(number, rates)
        seconds[number] = [1 / rate for rate in rates]
        waits.add(number, times)
        # One client waits for the server, so it uses one processor: the two processes take turns.
        top = min(best, 1e6 / waits.points[0][1].median * number)
        ceiling.points.append((number, Spread(top, top, top, 1)))
        wait = number / top * 1e6
        ideal_wait.points.append((number, Spread(wait, wait, wait, 1)))
    for line, unit in ((total, "/s"), (waits, "us")):
        for number in (ACTIVE[0], ACTIVE[-1]):
            what = "fetches, all clients together" if unit == "/s" else "a fetch, median"
            row = bench.value(f"{number} active clients: {what}", [0.0], unit)
            row.value = dict(line.points)[number]
    each = {f"{number} active clients, each fetch of all": s for number, s in seconds.items()}
    first, *_, last = each
    bench.ratio(each, last, first, goal=1.05)
    note = f"clients and server share {CORES} cores; the band: quartiles"
    title, lines = "Fetches a second, by the active clients", [total, ceiling]
    bench.curve(Curve("throughput", title, "active clients", "fetches a second", lines, note))
    title, lines = "A fetch, by the active clients", [waits, ideal_wait]
    curve = Curve("active", title, "active clients", "time of a fetch, µs", lines, note, log_y=True)
    bench.curve(curve)


def fetching(
    bench: Bench, manager: Manager, child: subprocess.Popen[str]
) -> tuple[list[float], list[float], float]:
    """(fetches a second, microseconds of one, the most a second that the cores could do)"""
    rates, times, best = [], [], []
    server, seconds = manager.stats().server_pid, bench.plan.slice * 10
    for _ in range(5):
        used, before = cpu_seconds(server), manager.stats().counters["fetched"]
        fetches, ns, clients = ask(child, f"{seconds}")
        used = cpu_seconds(server) - used
        assert manager.stats().counters["fetched"] - before >= fetches
        rates.append(fetches / seconds)
        times.append(ns / 1e3)
        best.append(fetches / max(used, (used + clients / 1e9) / CORES))
    assert manager.stats().server_pid == server
    return rates, times, statistics.median(best)


def by_payload(bench: Bench) -> None:
    sizes = bench.plan.points(PAYLOADS)
    sides: dict[str, Run] = {}
    for who in ("stock", "fdshare"):
        for item in (False, True) if who == "fdshare" else (False,):
            for size in sizes:
                side = partial(carried, who, size, item)
                sides[f"{who}, {size}, {item}"] = bench.keep(in_child(side))
    sides |= {
        f"copy, {size}": bench.keep(in_child(partial(copied, size)))
        for size in bench.plan.points(PAYLOADS)
    }
    times = bench.alternate(sides, rounds=7)
    lines = [
        Line("queue of fdshare.get_context(), bytes"),
        Line("the same, bytes and a socket"),
        Line("stock multiprocessing.Queue, bytes"),
        Line("ideal: the bytes through a bare socket pair", ideal=True),
    ]
    for size in sizes:
        keys = (f"fdshare, {size}, False", f"fdshare, {size}, True", f"stock, {size}, False")
        for line, key in zip(lines, (*keys, f"copy, {size}"), strict=True):
            line.add(size, microseconds(times[key]))
    for size in (1, 1_000_000):
        row = bench.ratio(times, f"fdshare, {size}, False", f"stock, {size}, False")
        row.what, row.against = f"{size:,} bytes through our queue", "through the stock queue"
    title = "An item through a queue, by its bytes"
    note = "put in one process to get in another, one after the other"
    curve = Curve("payload", title, "bytes in one item", "time of an item, µs", lines, note)
    curve.log_y = True
    bench.curve(curve)


def constant(line: Line) -> Line:
    """The ideal of a line that should not rise: its first point."""
    spread = line.points[0][1]
    flat = Spread(spread.median, spread.median, spread.median, 1)
    return Line("ideal: constant", [(x, flat) for x, _ in line.points], ideal=True)


def microseconds(figures: list[float]) -> list[float]:
    return [figure * 1e6 for figure in figures]


# Other processes.


@contextmanager
def others(*words: str) -> Iterator[subprocess.Popen[str]]:
    """Clients in a process of their own, all connected."""
    command = [sys.executable, str(HERE / "peers" / "clients.py"), *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == "ready\n", f"{words} could not connect"
            yield child
        finally:
            child.stdin.close()


def ask(child: subprocess.Popen[str], line: str) -> list[int]:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(f"{line}\n")
    child.stdin.flush()
    return [int(word) for word in child.stdout.readline().split()]


@contextmanager
def carried(who: str, size: int, with_socket: bool) -> Iterator[Run]:
    """*size* bytes, perhaps with a socket, from a child through a queue."""
    context: Any = multiprocessing if who == "stock" else get_context("fork")
    orders: Any = multiprocessing.SimpleQueue()
    queue = context.Queue()
    payload = os.urandom(size)
    listener = socket.create_server(("127.0.0.1", 0))
    item = (payload, listener) if with_socket else payload

    def child() -> None:
        while count := orders.get():
            for _ in range(count):
                queue.put(item)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()

    def run(count: int) -> float:
        start = perf_counter()
        orders.put(count)
        for _ in range(count):
            got = queue.get()
            if with_socket:
                got[1].close()
        took = perf_counter() - start
        assert (got[0] if with_socket else got) == payload
        return took

    try:
        yield run
    finally:
        orders.put(0)
        process.join()
        listener.close()


@contextmanager
def copied(size: int) -> Iterator[Run]:
    """*size* bytes from a child through a socket pair: send and recv, no more."""
    orders: Any = multiprocessing.SimpleQueue()
    ours, theirs = socket.socketpair()
    payload = os.urandom(size)

    def child() -> None:
        ours.close()
        while count := orders.get():
            for _ in range(count):
                theirs.sendall(payload)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    theirs.close()

    def run(count: int) -> float:
        start = perf_counter()
        orders.put(count)
        for _ in range(count):
            got = ours.recv(size, socket.MSG_WAITALL)
        took = perf_counter() - start
        assert got == payload
        return took

    try:
        yield run
    finally:
        orders.put(0)
        process.join()
        ours.close()
