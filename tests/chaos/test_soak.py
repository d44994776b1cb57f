"""Mixed load, for a while: memory, descriptors and threads stay flat in every process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
from breaking import Half, Halves, resident
from conftest import wait_until

from chaos.conftest import LONG
from chaos.test_kill_under_load import Load, compare, load  # noqa: F401
from fdshare.client.blocking.client import Client
from fdshare.manager import Manager

pytestmark = pytest.mark.usefixtures("fresh")

SECONDS = 300 if LONG else 2
# The loop, four that ask the kernel for `info`, one that closes, and a closer for one that is slow.
MOST_THREADS = 7


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


@pytest.mark.timeout(SECONDS + 300)
def test_soak(
    load: Callable[[str, int], Load],  # noqa: F811
    seed: int,
    counted: dict[str, Any],
) -> None:
    with Manager() as manager, Client(manager.address) as other, other.watch() as watch:
        halves = Halves(manager)
        pids = halves.pids()
        workers = load(manager.address, seed)
        workers.progress(3000)  # what is made once and kept has been made
        manager.infos()
        before = {half: resident(pid) for half, pid in pids.items()}
        mine = resident(os.getpid())
        ends = time.monotonic() + SECONDS
        while time.monotonic() < ends:
            workers.progress(500)
            manager.infos("w0/*")
            manager.bind("bound", "tcp://127.0.0.1:0").close()
            manager.unregister("bound")
            manager.register("brief", 0, ttl=0.01, replace=True)
            with Client(manager.address) as passing:
                passing.register("passing", 0, lifetime="connection")
            for _ in range(100):
                next(watch)
        ledgers = workers.ledgers()
        wrong = [ledger["wrong"] for ledger in ledgers if "wrong" in ledger]
        assert not wrong, "\n".join(wrong)
        wait_until(lambda: not {"brief", "passing"} & set(manager.names()))
        compare(manager, ledgers)
        table = {e.name: e.generation for e in manager.infos()}
        while watch.held != table:
            next(watch)
        watch.close()
        other.close()
        counted.update(seconds=SECONDS, operations=workers.done)
        assert halves.pids() == pids
        half: Half
        for half, pid in pids.items():
            memory = before[half]
            counted[f"{half}_grew_kb"] = (resident(pid) - memory) >> 10
            counted[f"{half}_threads"] = threads(pid)
            assert resident(pid) < memory + (8 << 20)
            assert threads(pid) <= MOST_THREADS
        counted["watcher_grew_kb"] = (resident(os.getpid()) - mine) >> 10
        halves.check_census()
