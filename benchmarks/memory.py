"""The memory that a held name costs the server, and the processor time of an idle server.

Each name is a file of its own (a memfd). A row shows how much the private memory of the process
(Pss of /proc/PID/smaps_rollup) grows from few names to many, for each name. It does not include the
kernel's memory for the descriptor. The keeper has a copy, and a row of its own. Each is measured
once: three runs gave the same to two hundredths.
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
    few, many = bench.plan.count(FEW), bench.plan.count(MANY)
    bench.step(f"{many} names")
    with Manager() as manager:
        stats = manager.stats()
        pids = {"server": stats.server_pid, "keeper": stats.keeper_pid or 0}
        fill(manager, few)
        before = {half: private_memory(pid) for half, pid in pids.items()}
        fill(manager, many, few)
        grown = {half: private_memory(pid) - before[half] for half, pid in pids.items()}
        idle(bench, manager, pids)
    for half, size in grown.items():
        kib = size / (many - few) / 1024
        goal = 2.0 if half == "server" else None
        bench.value(f"memory of the {half} for a name", [kib], "KiB", goal=goal)


def idle(bench: Bench, manager: Manager, pids: dict[str, int]) -> None:
    """The processor time that a server with names takes while no client asks."""
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
    """The bytes of *pid*, shared pages counted in part. It collects no garbage before."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("smaps_rollup has no Pss")
