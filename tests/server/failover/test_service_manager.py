"""service_manager: what it is told, by whichever half, and that nobody waits for it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from breaking import (
    Halves,
    ended,
)
from conftest import wait_until

from fdshare.activation import NotifySocket
from fdshare.client.blocking.client import Client


def expect(socket_: NotifySocket, key: str) -> str:
    """The value of the next notification that has *key*."""
    while True:
        ready, _, _ = select.select([socket_], [], [], 20)
        assert ready, f"no {key}="
        said = socket_.receive()
        assert said is not None
        said.close()
        if (value := said.value(key)) is not None:
            return value


def test_the_service_manager_is_told(
    served: Callable[..., subprocess.Popen[bytes]], folder: Path
) -> None:
    with NotifySocket(str(folder / "notify")) as told:
        process = served(NOTIFY_SOCKET=told.address, WATCHDOG_USEC="200000")
        assert expect(told, "READY") == "1"
        with Client(folder / "s") as client:
            halves = Halves(client)
            pids = halves.pids()
            assert pids["keeper"] == process.pid
            assert expect(told, "WATCHDOG") == "1"
            halves.kill("server")
            assert expect(told, "WATCHDOG") == "1"
            halves.kill("keeper")
            keeper = halves.pids()["keeper"]
        assert expect(told, "MAINPID") == str(keeper)
        assert expect(told, "WATCHDOG") == "1"
        os.kill(keeper, signal.SIGTERM)
        assert expect(told, "STOPPING") == "1"
        wait_until(lambda: ended(keeper))
        process.wait()
    assert not (folder / "s").exists()


def test_the_service_manager_is_told_without_a_keeper(
    served: Callable[..., subprocess.Popen[bytes]], folder: Path
) -> None:
    with NotifySocket(str(folder / "notify")) as told:
        process = served("--no-keeper", NOTIFY_SOCKET=told.address, WATCHDOG_USEC="200000")
        assert expect(told, "READY") == "1"
        for _ in range(3):
            assert expect(told, "WATCHDOG") == "1"
        process.terminate()
        assert expect(told, "STOPPING") == "1"
        process.wait()
    assert not (folder / "s").exists()


def test_a_service_manager_that_is_gone_harms_nobody(
    served: Callable[..., subprocess.Popen[bytes]], folder: Path
) -> None:
    with NotifySocket(str(folder / "notify")) as told:
        process = served(NOTIFY_SOCKET=told.address, WATCHDOG_USEC="200000")
        expect(told, "READY")
    with Client(folder / "s") as client:
        halves = Halves(client)
        for half in ("keeper", "server", "keeper"):
            halves.kill(half)
        client.shutdown()
    process.wait()
