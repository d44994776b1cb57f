"""What a held name costs the server: memory, and that of the kernel, and nothing while it is idle.

Each name is a file of its own (a memfd). What is reported is the growth of the private memory of
the server's process (Pss of /proc/PID/smaps_rollup) from few names to many, for each name: what the
kernel has for the descriptor itself is not in it. The keeper holds as much again; its row says so.
"""

from __future__ import annotations

import os
from pathlib import Path
from time import monotonic, sleep

from benchmarks.measure import Bench
from benchmarks.processes import cpu_seconds
from fdshare import Descriptor, Manager

FEW, MANY = 1_000, 11_000
IDLE = 1.0  # seconds


def run(bench: Bench) -> None:
    figures: dict[str, list[float]] = {"server": [], "keeper": []}
    for turn in range(3):
        bench.step(f"{MANY} names, {turn + 1} of 3")
        with Manager() as manager:
            stats = manager.stats()
            pids = {"server": stats.server_pid, "keeper": stats.keeper_pid or 0}
            few, many = bench.plan.count(FEW), bench.plan.count(MANY)
            fill(manager, few)
            before = {half: private_memory(pid) for half, pid in pids.items()}
            fill(manager, many, few)
            for half, pid in pids.items():
                grown = private_memory(pid) - before[half]
                figures[half].append(grown / (many - few) / 1024)
            if turn == 0:
                idle(bench, manager, pids)
    for half, kib in figures.items():
        bench.value(
            f"memory of the {half} for a name", kib, "KiB", goal=2.0 if half == "server" else None
        )


def idle(bench: Bench, manager: Manager, pids: dict[str, int]) -> None:
    """The processor time that holding names takes while nobody asks."""
    before = {half: cpu_seconds(pid) for half, pid in pids.items()}
    until = monotonic() + min(IDLE, bench.plan.slice * 50)
    sleep(until - monotonic())
    for half, pid in pids.items():
        used = (cpu_seconds(pid) - before[half]) / min(IDLE, bench.plan.slice * 50)
        bench.value(f"processor time of the idle {half}", [used * 100], "%", note=f"{MANY:,} names")


def fill(manager: Manager, number: int, already: int = 0) -> None:
    """Registers `a/0` to `a/number-1`, each a file of its own, less those *already* there."""
    for index in range(already, number):
        with Descriptor(os.memfd_create("a")) as file:
            manager.register(f"a/{index}", file)
    assert manager.stats().names >= number


def private_memory(pid: int) -> int:
    """Bytes that are *pid*'s, shared pages counted in part. It collects no garbage before."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("smaps_rollup has no Pss")
