"""hangups: an entry ends with its peer, whichever half of the server notices."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from breaking import Half, Halves, connected_pair
from conftest import wait_until
from nursery import Manager

from fdshare.client.blocking.client import Client
from server.orders import WITH_NONE, deaths, gone


@deaths(WITH_NONE)
def test_the_peer_of_a_socket(manager: Manager, break_: Any, order: list[Half]) -> None:
    near, far = socket.socketpair()
    manager.register("a", near, drop_on_hangup=True)
    manager.register("b", near)
    near.close()
    break_(order)
    far.send(b"data is no hang-up")
    assert manager.names() == ["a", "b"]
    far.close()
    gone(manager)
    assert manager.names() == ["b"]


@deaths(WITH_NONE)
def test_the_peer_of_a_connection(manager: Manager, break_: Any, order: list[Half]) -> None:
    near, far = connected_pair()
    manager.register("a", near, drop_on_hangup=True)
    near.close()
    break_(order)
    far.send(b"data is no hang-up")
    assert manager.names() == ["a"]
    far.close()
    gone(manager)


@deaths(WITH_NONE)
@pytest.mark.parametrize("end", [0, 1])
def test_the_other_end_of_a_pipe(
    manager: Manager, break_: Any, order: list[Half], end: int
) -> None:
    """A reader without writers, and a writer without readers."""
    pipe = list(os.pipe())
    manager.register("a", pipe[end], drop_on_hangup=True)
    os.close(pipe[end])
    break_(order)
    assert manager.names() == ["a"]
    os.close(pipe[1 - end])
    gone(manager)


@deaths(WITH_NONE)
def test_the_process_of_a_pidfd(manager: Manager, break_: Any, order: list[Half]) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    pidfd = os.pidfd_open(process.pid)
    manager.register("a", pidfd, drop_on_hangup=True)
    os.close(pidfd)
    break_(order)
    assert manager.names() == ["a"]
    process.kill()
    gone(manager)  # before anybody has asked for its status, which alone is a hang-up to epoll
    process.communicate()


def test_what_cannot_hang_up_stays(manager: Manager, folder: Path) -> None:
    (folder / "f").touch()
    with open(folder / "f") as file:
        manager.register("file", file, drop_on_hangup=True)
    event = os.eventfd(0)
    manager.register("event", event, drop_on_hangup=True)
    os.close(event)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        manager.register("listener", listener, drop_on_hangup=True)
    with select.epoll() as epoll:
        manager.register("epoll", epoll, drop_on_hangup=True)
    assert manager.names() == ["epoll", "event", "file", "listener"]
    Halves(manager).kill("server")
    assert manager.names() == ["epoll", "event", "file", "listener"]


def test_a_peer_that_was_gone_before(manager: Manager) -> None:
    near, far = socket.socketpair()
    far.close()
    manager.register("a", near, drop_on_hangup=True)
    near.close()
    gone(manager)


def test_the_same_socket_twice(manager: Manager) -> None:
    """Two entries of one open file description: both are told."""
    near, far = socket.socketpair()
    for name in ("a", "b"):
        manager.register(name, near, drop_on_hangup=True)
    near.close()
    far.close()
    gone(manager, "a")
    gone(manager, "b")


def test_a_replaced_entry_is_not_watched(manager: Manager, fd: int) -> None:
    """Its hang-up, seen late, does not end the one that took its place."""
    near, far = socket.socketpair()
    for _ in range(50):
        manager.register("a", near, drop_on_hangup=True, replace=True)
        manager.register("a", fd, replace=True)
    near.close()
    far.close()
    manager.ping()
    assert manager.names() == ["a"]
    with Client(manager.address) as client:
        client.register("a", fd, lifetime="connection", replace=True)
        manager.register("a", fd, replace=True)
    manager.ping()
    assert manager.names() == ["a"]


def test_an_icmp_error_is_no_hang_up(manager: Manager) -> None:
    """It reports that one datagram did not arrive; the socket is as good as before."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = nobody.getsockname()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        near, far = socket.socketpair()
        manager.register("datagrams", sock, drop_on_hangup=True)
        manager.register("stream", near, drop_on_hangup=True)
        sock.send(b"x")
        wait_until(lambda: select.select([sock], [], [], 0)[0], "the ICMP message")
        near.close()
        far.close()
        wait_until(lambda: manager.names() == ["datagrams"], "the stream's hang-up")
