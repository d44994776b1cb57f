"""Halves that hang: the keeper replaces its server, systemd restarts the service of a keeper."""

from __future__ import annotations

import signal

import pytest
from conftest import wait_until

from .service import Service, run

# The unit's own would make each test last a minute.
FAST = "WatchdogSec=2\nTimeoutAbortSec=1\n"
PATIENT = "--limit hang_timeout=15"  # more than the watchdog has, and it asks every 2.5 s


def test_a_server_that_hangs_is_replaced(service: Service) -> None:
    service.dropin("WatchdogSec=0", serve="--limit hang_timeout=1")
    service.memory("kept")
    before, keeper = service.table(), service.stats().keeper_pid
    service.signal(signal.SIGSTOP, "server")
    assert service.table() == before
    assert service.redundant().keeper_pid == keeper
    assert service.property("NRestarts") == "0"


@pytest.mark.parametrize("half", ["server", "keeper"])
def test_the_watchdog_ends_what_hangs(service: Service, half: str) -> None:
    service.dropin(FAST, serve=PATIENT)
    service.memory("kept")
    before, pids = service.table(), service.stats()
    service.signal(signal.SIGSTOP, half)
    wait_until(lambda: service.property("NRestarts") == "1", "another start")
    assert service.table() == before
    after = service.redundant()
    assert {after.keeper_pid, after.server_pid}.isdisjoint({pids.keeper_pid, pids.server_pid})


def fed(service: Service) -> None:
    """Waits until the watchdog was fed twice more."""
    times: set[str] = set()
    while len(times) < 3:
        times.add(service.property("WatchdogTimestampMonotonic"))


def test_every_keeper_feeds_it(service: Service) -> None:
    service.dropin(FAST)
    service.memory("kept")
    for death in ("keeper", "server", "upgrade", "keeper", "upgrade"):
        if death == "upgrade":
            run("fdshare", "upgrade").check_returncode()
        else:
            service.kill(death)
        service.redundant()
        fed(service)
    assert service.property("NRestarts") == "0"
