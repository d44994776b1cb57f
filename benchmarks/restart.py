"""After a kill -9: the time until the first fetch succeeds, with the same descriptor.

The clock starts when SIGKILL is sent. It stops when a client that was connected before has fetched
a name that was registered before. The rows with one name show how much of the time depends on the
number of names.
"""

from __future__ import annotations

import os
import signal
from time import perf_counter

from benchmarks.measure import Bench
from benchmarks.memory import fill
from benchmarks.processes import held_file, quiet, same_file
from fdshare import Client, Manager

HELD = (1, 10_000)
KILLS = 4  # of one server: the fifth within ten seconds is a crash loop, which waits


def run(bench: Bench) -> None:
    for number in HELD:
        held = bench.plan.count(number)
        for victim in ("server", "keeper"):
            goal = 100.0 if victim == "server" and number == 10_000 else None
            figures = kills(bench, held, victim)
            what = f"kill -9 of the {victim}, {number:,} names held: first fetch"
            bench.value(what, figures, "ms", goal=goal)


def kills(bench: Bench, held: int, victim: str) -> list[float]:
    """Milliseconds of each of a few kills, on one server that survives them all."""
    took = []
    with quiet():  # it would print on this terminal that it was killed
        manager = Manager().start()
    with manager, held_file() as fd:
        bench.step(f"{held} names")
        fill(manager, held)
        manager.register("mark", fd)
        for turn in range(min(bench.plan.rounds, KILLS)):
            bench.step(f"kill {turn + 1} of the {victim}, {held} names")
            took.append(one_kill(manager, victim, fd) * 1e3)
            assert len(manager.names()) == held + 1
    return took


def one_kill(manager: Manager, victim: str, fd: int) -> float:
    with Client(manager.address) as client:
        client.fetch("mark").close()
        while not (stats := client.stats()).redundant:
            pass  # the successor of the last one does not have the whole table yet
        pid = stats.server_pid if victim == "server" else stats.keeper_pid
        assert pid is not None
        start = perf_counter()
        os.kill(pid, signal.SIGKILL)
        found = client.fetch("mark")
        while victim == "server" and client.stats().server_pid == pid:
            found.close()  # it answered before it died
            found = client.fetch("mark")
        took = perf_counter() - start
        with found:
            assert same_file(found.fileno(), fd)
        return took
