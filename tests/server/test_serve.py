"""serve: a server in this process, from its path to its end."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from pathlib import Path

import pytest
from conftest import wait_until

from fdshare.activation import NotifySocket
from fdshare.client.blocking.client import Client
from fdshare.errors import AddressInUse, EndpointError, InvalidArgument, PolicyError
from fdshare.kernel.endpoint import listen
from fdshare.server.serve import serve
from fdshare.server.settings import Settings

OURS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture
def settings(folder: Path) -> Settings:
    return Settings(path=str(folder / "s"), keeper=False)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_leaves_no_trace(settings: Settings, number: int) -> None:
    """It may come in any moment from `ready` on; afterwards signals are as they were."""
    before = [signal.getsignal(ours) for ours in OURS]
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    served = []

    def ready() -> None:
        served.append(os.path.exists(settings.path))
        os.kill(os.getpid(), number)

    serve(settings, ready)
    assert served == [True]
    assert [signal.getsignal(ours) for ours in OURS] == before
    assert signal.set_wakeup_fd(-1) == wakeup
    assert os.listdir(os.path.dirname(settings.path)) == ["s.lock"]


def test_a_path_that_is_not_utf8_is_refused(settings: Settings, folder: Path) -> None:
    settings.path = os.fsdecode(bytes(folder) + b"/caf\xe9")
    with pytest.raises(EndpointError, match="not UTF-8"):
        serve(settings, stop)
    assert os.listdir(folder) == []


def test_the_end_of_its_owner_ends_it(
    settings: Settings, pair: tuple[socket.socket, socket.socket]
) -> None:
    owner, control = pair
    serve(settings, owner.close, control=control)
    os.fstat(control.fileno())  # borrowed


def test_a_client_ends_it(settings: Settings) -> None:
    with Client(settings.path) as client:
        thread = threading.Thread(target=client.shutdown)
        serve(settings, thread.start)
        thread.join()


def test_a_listener_that_is_there_already(settings: Settings, folder: Path) -> None:
    """Its path is the server's, and goes with it."""
    listener = listen(folder / "other")
    serve(settings, stop, listener)
    assert sorted(os.listdir(folder)) == ["other.lock"]
    assert listener.fileno() == -1


def test_sighup_reads_the_policy_again(
    settings: Settings, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings.policy = str(folder / "policy")
    (folder / "policy").write_text("")

    def end() -> None:
        wait_until(lambda: caplog.text)
        stop()

    thread = threading.Thread(target=end)

    def ready() -> None:
        (folder / "policy").write_text("no policy")
        os.kill(os.getpid(), signal.SIGHUP)
        thread.start()

    with caplog.at_level(logging.ERROR, "fdshare"):
        serve(settings, ready)
    thread.join()
    assert "the policy stays as it was" in caplog.text


def test_the_service_manager_is_told(
    settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with NotifySocket(str(folder / "notify")) as told:
        monkeypatch.setenv("NOTIFY_SOCKET", told.address)
        monkeypatch.setenv("WATCHDOG_USEC", "2000000000")
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        serve(settings, stop)
        said = [told.receive() for _ in range(2)]
        ending = ["STOPPING=1", "STATUS=Ending"]
        assert [list(each.lines) for each in said if each] == [["WATCHDOG=1"], ending]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"limits": {"max_fun": 1}}, InvalidArgument),
        ({"policy": "/nobody/has/it"}, PolicyError),
        ({"path": "taken"}, AddressInUse),
    ],
)
def test_what_cannot_be_served(
    settings: Settings, folder: Path, change: dict[str, object], error: type[Exception]
) -> None:
    (folder / "taken").touch()
    for field, value in change.items():
        setattr(settings, field, str(folder / "taken") if value == "taken" else value)
    with pytest.raises(error):
        serve(settings, lambda: pytest.fail("it is not ready"))
