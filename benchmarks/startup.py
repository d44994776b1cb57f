"""The time to start: an import, a server, a command. Each starts a new process.

The time of an import is that of an interpreter that does nothing else, from exec to exit, minus the
time of one that imports nothing in the same round. Commands, and those that they are compared with,
are measured whole.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.managers import BaseManager
from time import perf_counter

from benchmarks.measure import FEW_ROUNDS, Bench, Run
from fdshare import Manager

NOTHING = "import nothing"
IMPORTS = {
    "import fdshare": "import fdshare",
    "import fdshare; fdshare.Manager": "import fdshare; fdshare.Manager",
    "import fdshare; fdshare.connect": "import fdshare; fdshare.connect",
    "import fdshare; fdshare.install": "import fdshare; fdshare.install",
    "import multiprocessing.managers": "import multiprocessing.managers",
}
STDLIB = "import multiprocessing.managers"
TRUE, LS, BARE = "fdshare run web -- true", "fdshare ls", "python -c pass"
CONNECT = "python -c 'import fdshare; fdshare.connect'"
MSGSPEC, CLICK = "python -c 'import msgspec'", "python -c 'import click'"
SERVERS = ("Manager().start()", "Manager(keeper=False).start()", "BaseManager().start()")


def run(bench: Bench) -> None:
    imports(bench)
    commands(bench)
    servers(bench)


def process(words: Sequence[str]) -> Run:
    """A side that runs a command to its end. It finds modules compiled, as they are installed."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}

    def run(count: int) -> float:
        start = perf_counter()
        for _ in range(count):
            null = subprocess.DEVNULL
            subprocess.run(words, check=True, stdin=null, stdout=null, env=environment)
        return perf_counter() - start

    return run


def imports(bench: Bench) -> None:
    code = {NOTHING: "pass", **IMPORTS}
    sides = {name: process([sys.executable, "-c", words]) for name, words in code.items()}
    heavy = "import sys, fdshare; print(*sorted({'click', 'rich', 'anyio', 'dill', 'numpy'} & "
    heavy += "sys.modules.keys()))"
    got = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert not got.stdout.strip(), f"import fdshare imports {got.stdout}"
    times = bench.alternate(sides, rounds=FEW_ROUNDS)
    bare = times[NOTHING]
    for name in IMPORTS:
        times[name] = [max(took - base, 1e-6) for took, base in zip(times[name], bare, strict=True)]
    for name in IMPORTS:
        if name != STDLIB:
            goal = 1.5 if name == "import fdshare" else None
            bench.ratio(times, name, STDLIB, goal=goal)


def commands(bench: Bench) -> None:
    """`fdshare run` of a command that ends at once, with a server that holds a listener for it, and
    `fdshare ls` of that; what a client and they import, beside what they are made of."""
    with Manager() as manager, socket.create_server(("127.0.0.1", 0)) as listener:
        manager.register("web", listener)
        fdshare = [sys.executable, "-m", "fdshare"]
        at = ["--path", manager.address]
        words = [*fdshare, "run", *at, "web", "--", "true"]
        shown = subprocess.run(
            [*words[:-1], sys.executable, "-c", "import os; print(os.environ['LISTEN_FDNAMES'])"],
            capture_output=True,
            text=True,
        )
        if shown.returncode:
            bench.absent(TRUE, shown.stderr.strip().splitlines()[-1])
            return
        assert shown.stdout.strip() == "web"
        listed = [*fdshare, "ls", *at]
        shown = subprocess.run(listed, capture_output=True, text=True, check=True)
        assert shown.stdout.splitlines()[1].startswith("web ")
        sides = {TRUE: process(words), LS: process(listed)}
        for name in (BARE, CONNECT, MSGSPEC, CLICK):
            sides[name] = process([sys.executable, "-c", name.partition(" -c ")[2].strip("'")])
        times = bench.alternate(sides, rounds=FEW_ROUNDS)
    bench.ratio(times, CONNECT, MSGSPEC, goal=1.4)
    bench.ratio(times, LS, CLICK, goal=1.8)
    bench.ratio(times, TRUE, BARE, goal=2.2)


def started(make: type) -> Run:
    """A server, from its start to its first answer, and its end."""

    def run(count: int) -> float:
        took = 0.0
        for _ in range(count):
            start = perf_counter()
            manager = make()
            manager.start()
            manager.connect()
            took += perf_counter() - start
            manager.shutdown()
        return took

    return run


def servers(bench: Bench) -> None:
    context = multiprocessing.get_context("spawn")
    sides = {
        SERVERS[0]: started(Manager),
        SERVERS[1]: started(lambda: Manager(keeper=False)),  # type: ignore[arg-type]
        SERVERS[2]: started(lambda: BaseManager(ctx=context)),  # type: ignore[arg-type]
    }
    times = bench.alternate(sides, rounds=9)
    for name in SERVERS[:2]:
        bench.ratio(times, name, SERVERS[2], note="spawned, as ours is")
