"""Upgrades of a server that holds a thousand names and is kept busy: to the same code, to better,
to code that does not start, that refuses the table, that hangs, that dies. No client sees any."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from breaking import Halves, identities, identity
from conftest import wait_until
from installed import HANGS, Installed

from chaos.test_kill_under_load import Load, compare, load  # noqa: F401
from fdshare.client.blocking.client import Client
from fdshare.errors import FdshareError

HELD = 1000


@pytest.fixture
def installed(folder: Path) -> Iterator[Installed]:
    installed = Installed(folder)
    yield installed
    installed.end()


@pytest.fixture
def fds() -> Iterator[list[int]]:
    fds = [os.memfd_create(f"held {index}") for index in range(HELD)]
    yield fds
    for fd in fds:
        os.close(fd)


def bad(installed: Installed, way: str) -> tuple[str, Callable[[], None]]:
    """Breaks what is installed: (what the old code will say, how to mend it)."""
    file = {"dies": "server/failover/new_code.py", "hangs": "server/failover/new_code.py"}.get(
        way, "server/failover/upgrade.py"
    )
    path = installed.package / file
    good = path.read_text()
    resume = r"def resume\(fd: int\) -> int:\n"
    if way == "does not start":
        installed.begin(file, "def f(:")
        reason = "SyntaxError"
    elif way == "refuses":
        installed.change(file, r"HANDOVER_VERSION: Final = \d+", "HANDOVER_VERSION: Final = 99")
        reason = "reads 99"
    elif way == "hangs in its trial":
        installed.begin(file, HANGS)
        reason = "said nothing"
    elif way == "dies":
        installed.change(file, resume, "def resume(fd: int) -> int:\n    1 / 0\n")
        reason = "died at its start"
    else:
        installed.change(file, resume, f"def resume(fd: int) -> int:\n    {HANGS}\n")
        reason = "started and then hung"

    def mend() -> None:
        path.write_text(good)
        installed.forget_compiled(path)

    return reason, mend


WAYS = ["does not start", "refuses", "hangs in its trial", "dies", "hangs"]


@pytest.mark.timeout(300)
def test_upgrades_under_load(
    installed: Installed,
    load: Callable[[str, int], Load],  # noqa: F811
    times: Callable[[int], int],
    fds: list[int],
    seed: int,
    counted: dict[str, Any],
) -> None:
    installed.wait_less(trial=8.0, silence=8.0)
    installed.start()
    good = failed = 0
    with Client(installed.path) as client, Client(installed.path) as watcher:
        halves = Halves(client)
        for index, fd in enumerate(fds):
            client.register(f"held/{index}", fd)
        watch = watcher.watch()
        workers = load(str(installed.path), seed)
        workers.progress(200)
        for _ in range(times(1)):
            for way in WAYS:
                reason, mend = bad(installed, way)
                with pytest.raises(FdshareError, match=reason):
                    client.upgrade()
                failed += 1
                assert reason in client.stats().notes["upgrade"]
                mend()
                halves.redundant()
                workers.progress(20)
            keeper = halves.pids()["keeper"]  # of the old code, for the new died and hung
            for _ in range(3):
                good += 1
                installed.name_it(f"code {good}")
                client.upgrade()
                assert client.stats().notes == {"code": f"code {good}"}
                assert halves.pids()["keeper"] == keeper
                workers.progress(20)
            halves.redundant()
        workers.progress(100)
        ledgers = workers.ledgers()
        wrong = [ledger["wrong"] for ledger in ledgers if "wrong" in ledger]
        assert not wrong, "\n".join(wrong)
        counted.update(held=HELD, upgrades=good, refused=failed, operations=workers.done)
        check_held(client, fds)
        for index in range(HELD):
            client.unregister(f"held/{index}")
        compare(client, ledgers)
        table = {e.name: e.generation for e in client.infos()}
        while watch.held != table:
            next(watch)
        watch.close()
        wait_until(lambda: halves.excess("keeper") == -1)


def check_held(client: Client, fds: list[int]) -> None:
    """Each of them is there, in both halves, once."""
    wanted = [identity(fd) for fd in fds]
    for start in range(0, HELD, 250):
        names = [f"held/{index}" for index in range(start, start + 250)]
        for name, descriptor in client.fetch_many(names).items():
            with descriptor:
                assert identity(descriptor) == wanted[int(name[5:])]
    for pid in Halves(client).pids().values():
        held = identities(pid)
        assert set(wanted) <= set(held)
        assert len([one for one in held if one in set(wanted)]) == HELD
