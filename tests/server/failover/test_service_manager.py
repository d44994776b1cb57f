"""service_manager: what it is told, by whichever half, and that nobody waits for it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from breaking import (
    Halves,
    ended,
)
from conftest import wait_until

from fdshare.activation import NotifySocket
from fdshare.client.blocking.client import Client
from fdshare.server.failover.service_manager import Watchdog, announce_main_pid, report


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


# Alone.


@pytest.fixture
def told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NotifySocket]:
    """The service manager of this process."""
    with NotifySocket(str(folder / "notify")) as told:
        monkeypatch.setenv("NOTIFY_SOCKET", told.address)
        yield told


def waiting(told: NotifySocket) -> list[list[str]]:
    """The lines of what has come."""
    said = []
    while select.select([told], [], [], 0)[0]:
        notification = told.receive()
        assert notification is not None
        notification.close()
        said.append(list(notification.lines))
    return said


def test_who_takes_over_is_the_one_that_is_watched(
    told: NotifySocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    announce_main_pid()
    assert "WATCHDOG_PID" not in os.environ
    monkeypatch.setenv("WATCHDOG_PID", "1")
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    assert Watchdog().due is None  # process 1 feeds it
    announce_main_pid()
    assert Watchdog().due is not None
    assert waiting(told) == [[f"MAINPID={os.getpid()}"]] * 2


def test_a_watchdog_is_fed_when_it_is_due(
    told: NotifySocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    monkeypatch.setenv("WATCHDOG_USEC", "2000000000")
    before = time.monotonic()
    watchdog = Watchdog()
    watchdog.feed()
    assert waiting(told) == [["WATCHDOG=1"]]
    assert watchdog.due is not None
    assert before + 1000 <= watchdog.due <= time.monotonic() + 1000  # half of the time
    watchdog.feed()
    assert waiting(told) == []
    watchdog.due = before
    watchdog.feed()
    assert waiting(told) == [["WATCHDOG=1"]]


def test_a_watchdog_is_not_fed_while_not_all_is_well(
    told: NotifySocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    monkeypatch.setenv("WATCHDOG_USEC", "2000000000")
    watchdog = Watchdog()
    watchdog.feed(well=False)
    assert waiting(told) == []
    # It looks again long before the half of the time is over.
    assert watchdog.due is not None
    assert time.monotonic() < watchdog.due < time.monotonic() + 500


@pytest.mark.parametrize("usec", [None, "soon", "-1"])
def test_no_watchdog(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, usec: str | None
) -> None:
    """Where none was asked for, or nobody can tell how often."""
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    if usec is not None:
        monkeypatch.setenv("WATCHDOG_USEC", usec)
    watchdog = Watchdog()
    watchdog.feed()
    assert watchdog.due is None
    assert ("is not fed" in caplog.text) == (usec is not None)


def test_a_report_never_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, folder: Path
) -> None:
    for address in (str(folder / "nobody"), "neither a path nor a name", "/" + "x" * 200):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        report("READY=1")
    assert caplog.text.count("the service manager was not told READY=1") == 3
    monkeypatch.delenv("NOTIFY_SOCKET")
    report("READY=1")
