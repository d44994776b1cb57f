"""What a service reports to its manager: sd_notify(3), sd_watchdog_enabled(3)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fdshare.activation.notify_socket import NotifySocket
from fdshare.activation.sd_notify import barrier, notify, store, unstore, watchdog_seconds
from fdshare.errors import InvalidArgument, InvalidName, UnsupportedPlatform


def test_outside_a_service_there_is_nobody_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("NOTIFY_SOCKET", "WATCHDOG_USEC"):
        monkeypatch.delenv(variable, raising=False)
    assert notify("READY=1") is False
    assert barrier() is False
    assert watchdog_seconds() is None


def test_the_variable_is_removed_on_request(manager: NotifySocket) -> None:
    assert notify("READY=1", unset_environment=True) is True
    assert notify("READY=1") is False


def test_a_bad_name_is_refused_before_it_is_sent(manager: NotifySocket) -> None:
    with pytest.raises(InvalidName):
        store("a:b", [0])
    with pytest.raises(InvalidName):
        unstore("a\nREADY=1")


def test_a_barrier_waits_for_the_manager(manager: NotifySocket) -> None:
    with pytest.raises(TimeoutError):
        barrier(timeout=0.01)
    got = manager.receive()
    assert got.is_barrier
    got.close()
    code = "import fdshare.activation as a; print('sent', flush=True); print(a.barrier())"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "sent\n"
        got = manager.receive()
        assert got.is_barrier
        assert process.poll() is None
        got.close()
        assert process.stdout.readline() == "True\n"
    assert process.returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may speak for another process")
def test_a_privileged_sender_speaks_for_another(manager: NotifySocket) -> None:
    notify("MAINPID=1", pid=1)
    assert manager.receive().sender.pid == 1


@pytest.mark.parametrize(
    ("address", "error"),
    [
        ("relative", InvalidArgument),
        ("@", InvalidArgument),
        ("vsock:2:1234", UnsupportedPlatform),
        ("/nobody/is/there", OSError),
    ],
)
def test_an_address_that_is_none_is_an_error(
    monkeypatch: pytest.MonkeyPatch, address: str, error: type[Exception]
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with pytest.raises(error):
        notify("READY=1")


def test_the_watchdog_is_for_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "2500000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert watchdog_seconds() == 2.5
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert watchdog_seconds() is None
    monkeypatch.delenv("WATCHDOG_PID")
    monkeypatch.setenv("WATCHDOG_USEC", "soon")
    with pytest.raises(InvalidArgument):
        watchdog_seconds()
