"""register, unregister, take, wait and names: the verbs that change the table, or read all of it.

Manager() runs a keeper, so the server also writes each change to a second process before it
answers; s6-fdholderd has no such process. The rows without the keeper compare the same work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import perf_counter_ns

from benchmarks.measure import FEW_ROUNDS, Bench, NotHere, Run, each, middle
from benchmarks.processes import held_file, s6, same_file
from fdshare import Client, Descriptor, Manager

STORE, CYCLE, LIST = "s6 store", "s6 store + delete", "s6 list of 10,000"
LISTS = (1, 100, 10_000)


def run(bench: Bench) -> None:
    fd = bench.keep(held_file())
    sides: dict[str, Run] = {}
    for keeper, suffix in ((True, ""), (False, ", no keeper")):
        manager = bench.keep(Manager(keeper=keeper))
        for name, side in changes(bench, manager, fd).items():
            sides[name + suffix] = side
    peers = s6_sides(bench, fd)
    times = bench.alternate({**sides, **peers}, rounds=FEW_ROUNDS)
    for suffix in (", no keeper", ""):
        for what, peer, goal in (("register", STORE, 2.5), ("register + unregister", CYCLE, 3.5)):
            if peer in peers:
                bench.ratio(times, what + suffix, peer, goal=None if suffix else goal)
    for what in ("register", "register + unregister", "register + take", "wait"):
        bench.ratio(times, what, what + ", no keeper", note="what the keeper costs")
    bench.ratio(times, "register + take", "register + unregister")
    bench.ratio(times, "wait", "register + unregister", note=WAIT)
    lists(bench, fd)


WAIT = "from register in one thread to the end of another's wait"


def changes(bench: Bench, manager: Manager, fd: int) -> dict[str, Run]:
    """The verbs that change the table, on *manager*, which is as empty afterwards."""
    file = bench.keep(Descriptor.dup_of(fd))

    def cycle() -> None:
        manager.register("b/0", file)
        manager.unregister("b/0")

    def take() -> None:
        manager.register("b/0", file)
        manager.take("b/0").close()

    cycle()
    manager.register("b/0", file)
    with manager.take("b/0") as taken:
        assert same_file(taken.fileno(), fd)
    # The confirmation of a take has no answer, but a register that follows finds the name free.
    manager.register("b/0", file)
    manager.unregister("b/0")
    assert manager.names() == []
    return {
        "register": registers(manager, file),
        "register + unregister": each(cycle),
        "register + take": each(take),
        "wait": waits(bench, manager, file),
    }


def registers(manager: Manager, file: Descriptor) -> Run:
    """Stores new names, and removes them after the clock has stopped."""

    def run(count: int) -> float:
        names = [f"b/{number}" for number in range(count)]
        took = []
        for name in names:
            start = perf_counter_ns()
            manager.register(name, file)
            took.append(perf_counter_ns() - start)
        assert len(manager.names()) == count
        for name in names:
            manager.unregister(name)
        return middle(took)

    return run


def waits(bench: Bench, manager: Manager, file: Descriptor) -> Run:
    """One thread waits for a name, this one registers it: the time until the wait ends."""
    asked, ready = threading.Semaphore(0), threading.Semaphore(0)
    ended: list[int] = []
    over: list[bool] = []

    def waiter() -> None:
        with Client(manager.address) as client:
            while asked.acquire() and not over:
                client.wait("b/w")
                ended.append(perf_counter_ns())
                ready.release()

    def requests() -> int:
        return manager.stats().counters["requests"]

    def stop() -> None:
        over.append(True)
        asked.release()
        thread.join()

    thread = threading.Thread(target=waiter)
    thread.start()
    bench.last(stop)

    def run(count: int) -> float:
        took = []
        for _ in range(count):
            before = requests()
            asked.release()
            polls = 1
            while requests() - before < polls + 1:  # until the server has the wait, too
                polls += 1
            start = perf_counter_ns()
            manager.register("b/w", file)
            ready.acquire()
            took.append(ended.pop() - start)
            manager.unregister("b/w")
        return middle(took)

    return run


def s6_sides(bench: Bench, fd: int) -> dict[str, Run]:
    try:
        client = bench.keep(s6(bench.folder(), fd))
    except NotHere as error:
        bench.absent(STORE, error)
        return {}
    return {STORE: client.run("store"), CYCLE: client.run("cycle")}


def lists(bench: Bench, fd: int) -> None:
    """The names of a server that holds 1, 100, 10,000 of them."""
    sides: dict[str, Run] = {}
    for number in LISTS:
        manager = bench.keep(Manager())
        bench.step(f"{number} names")
        held = fill(manager, bench.plan.count(number), fd)
        sides[f"names(), {number:,} held"] = lister(manager, held)
    try:
        client = bench.keep(s6(bench.folder(), fd))
        held = bench.plan.count(10_000)
        client.ask(f"fill {held}")
        assert client.ask("list 1")[1] == held
        sides[LIST] = client.run("list")
    except NotHere as error:
        bench.absent(LIST, error)
    times = bench.alternate(sides)
    for number in LISTS:
        bench.ratio(times, f"names(), {number:,} held", "names(), 1 held")
    if LIST in sides:
        bench.ratio(times, "names(), 10,000 held", LIST)


def fill(manager: Manager, number: int, fd: int) -> int:
    with Descriptor.dup_of(fd) as file:
        for index in range(number):
            manager.register(f"a/{index}", file)
    return number


def lister(manager: Manager, held: int) -> Run:
    names: Callable[[], list[str]] = manager.names
    assert len(names()) == held
    return each(names)
