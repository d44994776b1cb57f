"""What the tests of servers with both halves, and of servers with few descriptors, share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from breaking import Half, Halves
from conftest import wait_until
from ending import let_end
from nursery import Manager

from fdshare.client.blocking.client import Client
from fdshare.errors import NoServer, ServerGone
from fdshare.kernel.endpoint import connect


@pytest.fixture(scope="module")
def shared() -> Iterator[Manager]:
    with Manager() as manager:
        yield manager


@pytest.fixture
def manager(shared: Manager) -> Iterator[Manager]:
    """A server with both halves, empty and accounted for after the test."""
    with Manager(shared.address).connect() as manager:  # connections of the test's own
        yield manager
        for name in manager.names():
            manager.unregister(name)
        Halves(manager).redundant()
        Halves(manager).check_census()


@pytest.fixture
def break_(manager: Manager) -> Callable[[list[Half]], None]:
    def break_(order: list[Half]) -> None:
        for half in order:
            Halves(manager).kill(half)

    return break_


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("held")
    yield fd
    os.close(fd)


@pytest.fixture
def small(folder: Path) -> Iterator[Callable[..., Client]]:
    """Starts `fdshare serve` at a limit of so many descriptors; a client of it. *prepare* is called
    in the new process."""
    started: list[subprocess.Popen[bytes]] = []
    clients: list[Client] = []

    def start(nofile: int, *options: str, prepare: Callable[[], None] | None = None) -> Client:
        serve = [sys.executable, "-m", "fdshare", "serve", str(folder / "s"), *options]
        serve += ["--log-level", "error"]
        command = ["sh", "-c", f'ulimit -n {nofile} && exec "$@"', "sh", *serve]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=prepare)
        started.append(process)
        wait_until(lambda: answers(folder / "s"), "the server answers")
        clients.append(Client(folder / "s"))
        return clients[-1]

    yield start
    for client in clients:
        with suppress(NoServer, ServerGone):  # the test has ended it
            client.shutdown()
        client.close()
    for process in started:
        let_end(process)


def answers(path: Path) -> bool:
    try:
        connect(path).close()
    except NoServer:
        return False
    return True
