"""fetch and fetch_many on an open connection, beside the floor, s6-fdholderd and BaseManager.

A fetch sends a name, receives the descriptor that a server of its own process holds under it, and
closes it. The server holds 300 different files. It is `fdshare serve` with its default options,
which logs into a file who was given what; beside it the same without that log, and `Manager()`,
whose log has warnings only. BaseManager works inside one process tree only: in its row, a manager
that this process started returns a socket.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any

from benchmarks.measure import Bench, NotHere, Run, each
from benchmarks.processes import (
    bare_python,
    c_pingpong,
    cpu_seconds,
    fdshare_serve,
    held_file,
    quiet,
    s6,
    same_file,
)
from fdshare import Client, Descriptor, Manager

C, PYTHON, S6 = "bare C ping-pong", "bare Python ping-pong", "s6-fdholderd retrieve"
BASE = "BaseManager, a socket, same process tree"
BARE_64 = "bare Python, 64 in one message"
BATCHES = (1, 8, 64, 253)
HELD = 300
ROTATED = f"fetch, {HELD} files in turn"
ONE, MANY = "fetch, a Descriptor", "fetch_many of 64"
OTHERS = LOG_OFF, MANAGER = "log off", "Manager()"


def run(bench: Bench) -> None:
    fd = bench.keep(held_file())
    folder = bench.folder()
    sides: dict[str, Run] = {PYTHON: bench.keep(bare_python("plain", fd))}
    sides[BARE_64] = bench.keep(bare_python("plain", fd, (900, 2500), copies=64))
    for name, make in ((C, c_pingpong), (S6, s6_retrieve), (BASE, base_manager)):
        try:
            sides[name] = bench.keep(make(folder, fd))
        except NotHere as error:
            bench.absent(name, error)
    client = bench.keep(fdshare_serve(folder))
    log_off = bench.keep(fdshare_serve(folder, "--log-level", "warning"))
    ours = fetches(client, fd)
    for other, name in zip((log_off, bench.keep(Manager())), OTHERS, strict=True):
        of_other = fetches(other, fd)
        ours.update({f"{side}, {name}": of_other[side] for side in (ONE, MANY)})
    server = client.stats().server_pid
    times = bench.alternate({**ours, **sides})
    check_logs(client, log_off)
    report(bench, times, set(sides))
    bench.absent("BaseManager, a socket, unrelated process", unrelated())
    use_of_processors(bench, client, server)


def check_logs(client: Client, log_off: Client) -> None:
    """Every hand-over was noted where it was to be, and nothing elsewhere."""
    fetched = client.stats().counters["fetched"]
    client.unregister("web/raw")  # the last line
    log = Path(f"{client.address}.log")
    while "unregister 'web/raw'" not in (text := log.read_text()):
        pass
    assert text.count(": given\n") == fetched
    assert client.stats().log_dropped == 0
    assert Path(f"{log_off.address}.log").read_text() == ""


def fetches(manager: Manager | Client, fd: int) -> dict[str, Run]:
    """The sides of fdshare; each was checked to do what it says."""
    names = [f"file/{number:03}" for number in range(HELD)]
    for name in names:
        with Descriptor(os.memfd_create(name)) as file:
            manager.register(name, file)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        manager.register("web/http", listener)
        with manager.fetch("web/http") as fetched:
            assert type(fetched) is socket.socket
            assert same_file(fetched.fileno(), listener.fileno())
    manager.register("web/raw", fd)
    with manager.fetch("web/raw") as fetched:
        assert same_file(fetched.fileno(), fd)
    assert len(manager.names()) == HELD + 2
    sides = {
        ONE: each(lambda: manager.fetch("web/raw").close()),
        "fetch, a socket": each(lambda: manager.fetch("web/http").close()),
        ROTATED: each(in_turn([partial(fetch_and_close, manager, name) for name in names])),
        "ping, no descriptor": each(manager.ping),
    }
    for size in BATCHES:
        sides[f"fetch_many of {size}"] = batch(manager, names[:size])
    return sides


def fetch_and_close(manager: Manager | Client, name: str) -> None:
    manager.fetch(name).close()


def in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A call that makes one of *calls* after the other."""
    turns = cycle(calls)
    return lambda: next(turns)()


def batch(manager: Manager | Client, names: list[str]) -> Run:
    def fetch() -> None:
        for found in manager.fetch_many(names).values():
            found.close()

    many = manager.fetch_many(names)
    assert list(many) == names
    files = {(os.fstat(d.fileno()).st_dev, os.fstat(d.fileno()).st_ino) for d in many.values()}
    assert len(files) == len(names), "the same descriptor came under two names"
    for found in many.values():
        found.close()
    return each(fetch)


def report(bench: Bench, times: dict[str, list[float]], peers: set[str]) -> None:
    bench.ratio(times, ONE, PYTHON, goal=1.6)
    bench.ratio(times, "fetch, a socket", PYTHON, goal=1.5)
    bench.ratio(times, ROTATED, PYTHON)
    bench.ratio(times, "ping, no descriptor", PYTHON)
    for name, goal in ((C, None), (S6, None), (BASE, None)):
        if name in peers:
            bench.ratio(times, "fetch, a socket", name, goal=goal)
    for size in BATCHES:
        goal = 0.10 if size == 64 else None
        against = S6 if S6 in peers else PYTHON
        bench.ratio(times, f"fetch_many of {size}", against, per=size, goal=goal)
    bench.ratio(times, MANY, BARE_64, goal=2.0)
    for goal, side in ((1.1, ONE), (1.2, MANY)):
        bench.ratio(times, side, f"{side}, {LOG_OFF}", goal=goal)
    bench.ratio(times, f"{ONE}, {MANAGER}", PYTHON)
    bench.ratio(times, f"{MANY}, {MANAGER}", BARE_64)
    if S6 in peers:
        bench.ratio(times, BARE_64, S6, per=64)


def use_of_processors(bench: Bench, manager: Client, server: int) -> None:
    """How much processor time one fetch takes on each side."""
    bench.step("processor time")
    figures: tuple[list[float], list[float]] = ([], [])
    run = each(lambda: manager.fetch("web/http").close())
    count = bench.plan.count(1000)
    for _ in range(5):
        before = [cpu_seconds(pid) for pid in (os.getpid(), server)]
        run(count)
        after = [cpu_seconds(pid) for pid in (os.getpid(), server)]
        for list_, b, a in zip(figures, before, after, strict=True):
            list_.append((a - b) / count * 1e6)
    assert manager.stats().server_pid == server
    bench.value("processor time of a fetch, client", figures[0], "us")
    bench.value("processor time of a fetch, server", figures[1], "us")


# The peers.


@contextmanager
def s6_retrieve(folder: Any, fd: int) -> Iterator[Run]:
    with s6(folder, fd) as client:
        client.ask(f"fill {HELD}")
        assert client.ask("list 1")[1] == HELD
        yield client.run("retrieve")


class Shelf:
    """What a BaseManager serves: a socket for each caller."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))

    def address(self) -> Any:
        return self._listener.getsockname()

    def fetch(self) -> socket.socket:
        return self._listener


class Shelves(BaseManager):
    """A manager that knows them."""

    shelf: Any


# Registered in the class, so that a spawned server has it, too. One shelf for all callers.
_shelf: list[Shelf] = []


def the_shelf() -> Shelf:
    if not _shelf:
        _shelf.append(Shelf())
    return _shelf[0]


Shelves.register("shelf", the_shelf, exposed=("address", "fetch"))


@contextmanager
def base_manager(folder: Any, fd: int) -> Iterator[Run]:
    with Shelves() as manager:
        shelf: Any = manager.shelf()
        address = shelf._callmethod("address")

        def fetch() -> None:
            with shelf._callmethod("fetch") as fetched:
                assert fetched.getsockname() == address

        yield each(fetch)


_STRANGER = """
import sys
from benchmarks.fetch import Shelves
manager = Shelves((sys.argv[1], int(sys.argv[2])), authkey=b"benchmark")
manager.connect()
try:
    manager.shelf()._callmethod("fetch").close()
    print("works here")
except Exception as error:
    print(f"cannot: {type(error).__name__}: {error}")
"""


def unrelated() -> str:
    """What a process gets that is not a child of the manager."""
    with quiet():  # the manager's server prints it, too
        manager = Shelves(("127.0.0.1", 0), authkey=b"benchmark")
        manager.start()
    with manager:
        address: Any = manager.address
        words = [sys.executable, "-c", _STRANGER, *map(str, address)]
        return subprocess.run(words, capture_output=True, text=True, timeout=60).stdout.strip()
