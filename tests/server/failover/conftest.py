"""What the tests of both halves share: a server that has them, and its service manager's start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from breaking import (
    Halves,
)
from conftest import wait_until
from ending import let_end
from nursery import Manager, Process

from fdshare.client.blocking.client import Client
from fdshare.errors import (
    NoServer,
    ServerGone,
)
from server.conftest import answers


@pytest.fixture
def manager() -> Iterator[Manager]:
    with Manager(limits={"journal_timeout": 0.3}) as manager:
        yield manager


@pytest.fixture
def halves(manager: Manager) -> Iterator[Halves]:
    """Both are accounted for at the end of the test."""
    halves = Halves(manager)
    halves.check_census()
    yield halves
    halves.redundant()
    halves.check_census()


@pytest.fixture
def served(folder: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts `fdshare serve` at `folder`/s; nothing of it is left after the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*options: str, **environment: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "fdshare", "serve", str(folder / "s"), *options]
        env = {**os.environ, **environment}
        with open(folder / "log", "ab") as log:
            process = Process(command, env=env, stdin=subprocess.DEVNULL, stderr=log)
        started.append(process)
        wait_until(lambda: answers(folder / "s"), "the server answers")
        return process

    yield start
    if (folder / "s").exists():
        # A test that ended it may be faster than its end.
        with Client(folder / "s") as client, suppress(NoServer, ServerGone):
            client.shutdown()
    for process in started:
        let_end(process)
