"""child: a server that is told what to do on its control socket, and ends with that."""

from __future__ import annotations

import select
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from breaking import Halves
from conftest import wait_until
from nursery import Manager, Process

import fdshare.manager
from fdshare.activation import NotifySocket
from fdshare.client.blocking.client import Client
from fdshare.kernel.descriptor import Descriptor
from fdshare.protocol import messages as m
from fdshare.server.child import read_message, send_message
from fdshare.server.interpreter import fresh_interpreter
from fdshare.server.settings import Settings

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def child(pair: Pair) -> Iterator[subprocess.Popen[bytes]]:
    """A child whose control socket is the second of the pair; ours is the first."""
    theirs = pair[1].fileno()
    with Descriptor.dup_of(2) as stderr:
        fds = theirs, stderr.fileno()
        command = fresh_interpreter("fdshare.server.child", f"main{fds}")
        process = Process(command, pass_fds=fds, stdin=subprocess.DEVNULL)
    pair[1].close()
    yield process
    process.kill()
    process.wait()


def test_messages_come_whole(pair: Pair) -> None:
    near, far = pair
    settings = Settings(path="x" * 100_000)
    send_message(near, settings)
    assert msgspec.msgpack.decode(read_message(far), type=Settings) == settings
    send_message(far, m.Done())
    assert m.decode_reply(read_message(near)) == m.Done()
    near.sendall(b"\0\0")
    near.close()
    assert read_message(far) == b""


@pytest.mark.parametrize("keeper", [True, False])
def test_it_serves_until_its_owner_ends(
    pair: Pair, child: subprocess.Popen[bytes], folder: Path, keeper: bool
) -> None:
    control = pair[0]
    send_message(control, Settings(path=str(folder / "s"), keeper=keeper, log_level="ERROR"))
    assert m.decode_reply(read_message(control)) == m.Done()
    with Client(folder / "s") as client:
        assert (client.stats().keeper_pid is not None) == keeper
    control.close()
    assert child.wait(20) == 0
    wait_until(lambda: not (folder / "s").exists())


def test_why_it_cannot_start_is_said_to_the_owner(
    pair: Pair, child: subprocess.Popen[bytes], folder: Path
) -> None:
    send_message(pair[0], Settings(path=str(folder / "no" / "s")))
    reply = m.decode_reply(read_message(pair[0]))
    assert isinstance(reply, m.Refused)
    assert reply.code == "endpoint_error"
    assert child.wait(20) == 1


def test_an_owner_that_ends_while_it_starts(
    pair: Pair, child: subprocess.Popen[bytes], folder: Path
) -> None:
    send_message(pair[0], Settings(path=str(folder / "s"), keeper=False, log_level="ERROR"))
    pair[0].close()
    child.wait(20)
    assert not (folder / "s").exists()


def test_it_tells_nothing_to_the_service_manager_of_its_owner(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with NotifySocket(str(folder / "notify")) as told:
        monkeypatch.setenv("NOTIFY_SOCKET", told.address)
        monkeypatch.setenv("WATCHDOG_USEC", "200000")
        with Manager() as manager:
            Halves(manager).kill("keeper")
        with Manager(keeper=False) as manager:
            manager.ping()
        assert select.select([told], [], [], 0)[0] == []


def test_it_hears_of_its_children_where_its_owner_does_not() -> None:
    former = signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # exec(3) keeps that
    try:
        manager = fdshare.manager.Manager(keeper=False).start()
    finally:
        signal.signal(signal.SIGCHLD, former)
    with manager:
        status = Path(f"/proc/{manager.stats().server_pid}/status").read_text()
        ignored = int(status.partition("SigIgn:")[2].split()[0], 16)
        assert not ignored >> (signal.SIGCHLD - 1) & 1
