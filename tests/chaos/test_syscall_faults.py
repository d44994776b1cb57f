"""System calls of both halves that fail, at the n-th call for many n: strace injects the errors.

A client changes the table meanwhile and knows what it must be; it sees none of this.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from breaking import Halves
from conftest import wait_until
from nursery import Manager

from chaos.load import Worker, seen
from fdshare.client.blocking.client import Client

FAULTS = {
    "sendmsg": ["EINTR", "EAGAIN", "ENOBUFS", "ENOMEM", "ETOOMANYREFS"],
    "recvmsg": ["EINTR", "EAGAIN", "ENOBUFS", "ENOMEM"],
    "accept4": ["EINTR", "EAGAIN", "EMFILE", "ENFILE", "ENOBUFS", "ECONNABORTED"],
    "epoll_wait": ["EINTR"],
    "close": ["EINTR", "EIO"],
}
CASES = [(call, error) for call, errors in FAULTS.items() for error in errors]


def strace_refuses() -> str:
    """Why there is nothing to be had; empty if there is."""
    if shutil.which("strace") is None:
        return "there is no strace"
    child = subprocess.Popen(["sleep", "60"])
    try:
        with faults([child.pid], "close", "EIO", 1):
            return ""
    except AssertionError as error:
        return f"strace cannot trace: {error}"
    finally:
        child.kill()
        child.wait()


@contextmanager
def faults(pids: list[int], call: str, error: str, first: int, step: int = 7) -> Iterator[None]:
    """The first, and then each step-th *call* of *pids* and their children fails with *error*."""
    inject = f"inject={call}:error={error}:when={first}+{step}"
    command = ["strace", "-f", "-o", "/dev/null", "-e", f"trace={call}", "-e", inject]
    for pid in pids:
        command += ["-p", str(pid)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        assert tracer.stderr is not None
        for _ in pids:
            line = tracer.stderr.readline().decode()
            assert "attached" in line, line.strip()
        yield
        # Detached in the middle of a call that is to fail, a process would see ENOSYS.
        wait_until(lambda: all(map(asleep, pids)), "both to wait for something")
    finally:
        tracer.send_signal(signal.SIGINT)  # it detaches
        tracer.communicate()


def asleep(pid: int) -> bool:
    """Whether the main thread of *pid* waits in a call: it neither runs nor stands at a trap."""
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "S"


@pytest.fixture(scope="module", autouse=True)
def strace() -> None:
    if reason := strace_refuses():
        pytest.skip(reason)


@pytest.mark.parametrize(("call", "error"), CASES)
def test_faults(
    times: Callable[[int], int], seed: int, counted: dict[str, Any], call: str, error: str
) -> None:
    with Manager() as manager:
        halves = Halves(manager)
        halves.redundant()
        pids = halves.pids()
        client = Client(manager.address)
        worker = Worker(client, "w", seed)
        steps = 0
        for first in random.Random(seed).sample(range(1, 8), 3):
            with faults(list(pids.values()), call, error, first):
                for _ in range(times(40)):
                    worker.step()
                    steps += 1
                    if call in ("accept4", "close"):
                        client.close()  # connects anew for the next step
                        client = worker.client = Client(manager.address)
        client.close()
        counted.update(steps=steps)
        assert halves.pids() == pids, "a half was replaced"
        compare(manager, worker)
        manager.register("still", 0)
        manager.unregister("still")
        if call != "close":  # an injected one does not close
            wait_until(lambda: manager.stats().leases == 0)
            halves.check_census()
        for half in ("server", "keeper"):
            halves.kill(half)
            compare(manager, worker)


def compare(manager: Manager, worker: Worker) -> None:
    assert manager.names() == sorted(worker.table)
    for name, descriptor in manager.fetch_many(worker.table).items():
        with descriptor:
            assert seen(descriptor) == worker.table[name]
