"""Stopping, reloading and restarting in good order, whoever was replaced before."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import wait_until

from .service import Service, properties, systemctl

HISTORIES = ["", "server", "keeper", "keeper keeper", "server keeper", "keeper server"]


@pytest.mark.parametrize("history", HISTORIES)
def test_nobody_is_killed(service: Service, history: str) -> None:
    service.memory("kept")
    before = service.table()
    for half in history.split():
        service.kill(half)
        service.redundant()
    started = service.property("NRestarts")

    keeper = service.stats().keeper_pid
    assert "PPid:\t1\n" in Path(f"/proc/{keeper}/status").read_text()
    systemctl("reload", "fdshare.service")
    assert service.stats().keeper_pid == keeper
    assert service.property("NRestarts") == started

    service.restart()
    assert service.table() == before
    for half in history.split():
        service.kill(half)
        service.redundant()
    systemctl("stop", "fdshare.service")
    assert service.property("Result") == "success"
    assert service.property("ActiveState") == "inactive"
    log = service.log()
    for complaint in ("with signal SIGKILL", "not our child", "Failed with result", "Traceback"):
        assert complaint not in log


@pytest.mark.parametrize("half", ["server", "keeper"])
def test_a_half_that_is_stopped_ends_with_the_rest(service: Service, half: str) -> None:
    service.dropin("TimeoutStopSec=1")
    service.memory("kept")
    before = service.table()
    service.signal(signal.SIGSTOP, half)
    service.restart()
    assert service.table() == before
    service.signal(signal.SIGSTOP, half)
    systemctl("stop", "fdshare.service")
    assert service.property("ActiveState") == "inactive"
    assert service.property("Result") == "success"


@pytest.mark.parametrize("half", ["server", "keeper"])
@pytest.mark.parametrize("first", ["death", "stop"])
def test_a_half_dies_when_the_service_stops(service: Service, half: str, first: str) -> None:
    """At any moment of it. A successor that had heard of no signal would be waited for."""
    for _ in range(6):
        stats = service.redundant()
        pid = stats.server_pid if half == "server" else stats.keeper_pid
        assert pid is not None
        if first == "death":
            os.kill(pid, signal.SIGKILL)
        systemctl("stop", "--no-block", "fdshare.service")
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: service.property("ActiveState") == "inactive", "it has stopped", 60)
        assert service.property("Result") == "success"
    assert "timed out" not in service.log()


def test_a_keeper_dies_while_the_service_stops(service: Service) -> None:
    service.dropin("TimeoutStopSec=3")
    service.memory("kept")
    before = service.table()
    keeper = service.stats().keeper_pid
    assert keeper is not None
    service.signal(signal.SIGSTOP, "server")  # the keeper waits for it, until systemd continues it

    def is_stopping() -> bool:  # or has stopped: on a busy machine the moment is missed
        seen = properties("fdshare.service", "SubState", "MainPID")
        return "stop" in seen["SubState"] or seen["MainPID"] != str(keeper)

    systemctl("restart", "--no-block", "fdshare.service")
    wait_until(is_stopping, "it is being stopped")
    with suppress(ProcessLookupError):
        os.kill(keeper, signal.SIGKILL)
    assert service.table() == before
