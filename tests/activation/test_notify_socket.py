"""What a manager receives from its services, and from systemd's own systemd-notify."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess

import pytest
from kernel.pairs import Refusing, make_zero  # noqa: F401

from fdshare.activation.notify_socket import NotifySocket
from fdshare.activation.sd_notify import notify, store, unstore
from fdshare.kernel.passing import send_fds
from fdshare.kernel.unix_address import sockaddr


def test_a_notification_arrives_with_its_sender(manager: NotifySocket) -> None:
    assert notify("READY=1\nSTATUS=up and running") is True
    got = manager.receive()
    assert got is not None
    assert got.says("READY=1")
    assert got.value("STATUS") == "up and running"
    assert got.value("MAINPID") is None
    assert got.sender is not None
    assert (got.sender.pid, got.sender.uid) == (os.getpid(), os.geteuid())


def test_stored_descriptors_arrive_with_their_name(manager: NotifySocket) -> None:
    fd = os.memfd_create("kept")
    try:
        assert store("kept", [fd], poll=False)
        got = manager.receive()
        assert got is not None
        assert got.lines == ["FDSTORE=1", "FDNAME=kept", "FDPOLL=0"]
        assert os.fstat(got.descriptors[0].fileno()).st_ino == os.fstat(fd).st_ino
        got.close()
    finally:
        os.close(fd)
    assert unstore("kept")
    assert manager.receive().lines == ["FDSTOREREMOVE=1", "FDNAME=kept"]


@pytest.mark.parametrize("datagram", [b"x" * 4097, b"READY=1\0STATUS=", b"STATUS=\xff"])
def test_what_systemd_refuses_is_refused(manager: NotifySocket, datagram: bytes) -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock,
        sockaddr(manager.address, exists=True) as name,
    ):
        send_fds(sock, [0], datagram, address=name)
    assert manager.receive() is None


def test_what_a_security_module_refuses_is_dropped(manager: NotifySocket, zero: int) -> None:
    assert store("refused", [zero])
    assert notify("READY=1") is True
    with manager._listener.socket as sock:
        manager._listener.socket = Refusing(sock)
    assert manager.receive() is None
    assert manager.receive().says("READY=1")


@pytest.mark.skipif(
    shutil.which("systemd-notify") is None, reason="no systemd-notify (Debian: systemd)"
)
def test_systemd_notify_is_understood(manager: NotifySocket) -> None:
    if len(manager.address) > 107:
        pytest.skip("systemd-notify takes no path longer than sun_path")
    # --no-block: it waits with a barrier otherwise, which nobody here would answer.
    subprocess.run(
        ["systemd-notify", "--no-block", "--ready", "--status=hello"], check=True, timeout=30
    )
    got = manager.receive()
    assert got.says("READY=1")
    assert got.value("STATUS") == "hello"
