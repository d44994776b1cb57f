"""How entries end by themselves: connection, process, ttl, grace, hang-up. Each is watched on by a
successor."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from breaking import Half, Halves, connected_pair
from conftest import wait_until
from nursery import Manager, Process

from fdshare.client.blocking.client import Client
from fdshare.errors import InvalidArgument, NameNotFound

deaths = pytest.mark.parametrize(
    "order", [[], ["server"], ["keeper"], ["keeper", "server"]], ids=lambda o: "-".join(o) or "none"
)


@pytest.fixture(scope="module")
def shared() -> Iterator[Manager]:
    with Manager() as manager:
        yield manager


@pytest.fixture
def manager(shared: Manager) -> Iterator[Manager]:
    """A server with both halves, empty and accounted for after the test."""
    with Manager(shared.address).connect() as manager:  # connections of the test's own
        yield manager
        for name in manager.names():
            manager.unregister(name)
        Halves(manager).redundant()
        Halves(manager).check_census()


@pytest.fixture
def break_(manager: Manager) -> Callable[[list[Half]], None]:
    def break_(order: list[Half]) -> None:
        for half in order:
            Halves(manager).kill(half)

    return break_


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("held")
    yield fd
    os.close(fd)


def gone(manager: Manager, name: str = "a") -> None:
    wait_until(lambda: name not in manager, f"{name} is gone")


# Connection.


@deaths
def test_connection_ends_with_the_client(
    manager: Manager, break_: Any, fd: int, order: list[Half]
) -> None:
    with Client(manager.address) as client:
        client.register("a", fd, lifetime="connection")
        client.register("b", fd, lifetime="connection")
        manager.register("c", fd)
        break_(order)
        assert manager.names() == ["a", "b", "c"]
        assert manager.info("a").lifetime == "connection"
    gone(manager, "a")
    gone(manager, "b")
    assert manager.names() == ["c"]


def test_connection_is_not_the_socket(manager: Manager, fd: int) -> None:
    """A client that connects anew, because it was evicted or the server died, keeps its entries."""
    with Client(manager.address) as client:
        client.register("a", fd, lifetime="connection")
        for channel in client._idle:
            channel.close()
        assert client.names() == ["a"]


FORKS = """
import os, sys
from fdshare.client.blocking.client import Client

client = Client(sys.argv[1])
client.register("a", 0, lifetime=sys.argv[2])
if not os.fork():
    os.close(1)
    os.read(0, 1)
    os._exit(0)
print("registered", flush=True)
os.read(0, 1)
"""


def start(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    process = Process(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"registered\n"
    return process


@deaths
@pytest.mark.parametrize("lifetime", ["connection", "process"])
def test_a_killed_process(manager: Manager, break_: Any, order: list[Half], lifetime: str) -> None:
    """A forked child of it that lives on does not keep the entry."""
    process = start(FORKS, manager.address, lifetime)
    break_(order)
    assert manager.names() == ["a"]
    process.kill()
    process.wait()
    gone(manager)
    process.communicate()


@deaths
def test_process_outlives_the_client(manager: Manager, break_: Any, order: list[Half]) -> None:
    code = FORKS.replace('print("reg', 'client.close()\nprint("reg')
    process = start(code, manager.address, "process")
    break_(order)
    wait_until(lambda: manager.stats().connections == 1)
    assert manager.names() == ["a"]
    process.kill()
    process.wait()
    gone(manager)
    process.communicate()


def test_a_successor_notices_a_death_that_was_before_it(manager: Manager) -> None:
    for lifetime in ("connection", "process"):
        process = start(FORKS, manager.address, lifetime)
        halves = Halves(manager)
        server = halves.pids()["server"]
        os.kill(server, 19)  # SIGSTOP: it sees nothing of what follows
        process.kill()
        process.wait()
        os.kill(server, 9)
        gone(manager)
        process.communicate()


# Grace.


@deaths
def test_grace_begins_with_the_end(
    manager: Manager, break_: Any, fd: int, order: list[Half]
) -> None:
    with Client(manager.address) as client:
        client.register("a", fd, lifetime="connection", grace=1.0)
        assert manager.info("a").ttl is None
    wait_until(lambda: manager.info("a").ttl is not None)
    break_(order)
    assert "a" in manager
    gone(manager)


@deaths
def test_grace_that_begins_after_a_death(
    manager: Manager, break_: Any, fd: int, order: list[Half]
) -> None:
    with Client(manager.address) as client:
        client.register("a", fd, lifetime="connection", grace=0.3)
        break_(order)
    wait_until(lambda: manager.info("a").ttl is not None)
    gone(manager)


def test_grace_does_not_prolong_the_ttl(manager: Manager, fd: int) -> None:
    with Client(manager.address) as client:
        client.register("a", fd, lifetime="connection", grace=60, ttl=0.3)
    gone(manager)


def test_a_register_in_the_grace_is_a_replacement(manager: Manager, fd: int) -> None:
    with Client(manager.address) as client:
        client.register("a", fd, lifetime="connection", grace=60)
    wait_until(lambda: manager.info("a").ttl is not None)
    manager.register("a", fd, replace=True)
    assert manager.info("a").ttl is None


# Time to live.


@deaths
def test_what_is_left_of_the_ttl(manager: Manager, break_: Any, fd: int, order: list[Half]) -> None:
    began = time.monotonic()
    manager.register("a", fd, ttl=1.0)
    manager.register("long", fd, ttl=500.0)
    break_(order)
    left = manager.info("long").ttl
    assert left is not None
    assert abs(left - (500.0 - (time.monotonic() - began))) < 1.0
    gone(manager)
    assert time.monotonic() - began >= 1.0
    assert manager.names() == ["long"]


def test_equal_deadlines(manager: Manager, fd: int) -> None:
    with Client(manager.address) as client, client.watch("many/*", timeout=20) as watch:
        next(watch)
        for index in range(100):
            client.register(f"many/{index}", fd, ttl=0.5)
        for index in range(0, 100, 2):
            client.unregister(f"many/{index}")
        client.register("many/1", fd, replace=True)
        seen = []
        while len([e for e in seen if e.event == "expired"]) < 49:
            seen.append(next(watch))
        assert list(watch.held) == ["many/1"]
    manager.unregister("many/1")


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf")])
def test_a_ttl_is_a_time(manager: Manager, fd: int, ttl: float) -> None:
    with pytest.raises(InvalidArgument):
        manager.register("a", fd, ttl=ttl)


@pytest.mark.parametrize("grace", [-1, float("nan"), float("inf")])
def test_a_grace_is_a_time(manager: Manager, fd: int, grace: float) -> None:
    with Client(manager.address) as client, pytest.raises(InvalidArgument):
        client.register("a", fd, lifetime="connection", grace=grace)


def test_ages(manager: Manager, fd: int) -> None:
    manager.register("a", fd, ttl=1e12)
    manager.register("b", fd, ttl=1e-9)
    gone(manager, "b")
    assert manager.names() == ["a"]


# Hang-up.


@deaths
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


@deaths
def test_the_peer_of_a_connection(manager: Manager, break_: Any, order: list[Half]) -> None:
    near, far = connected_pair()
    manager.register("a", near, drop_on_hangup=True)
    near.close()
    break_(order)
    far.send(b"data is no hang-up")
    assert manager.names() == ["a"]
    far.close()
    gone(manager)


@deaths
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


@deaths
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


@deaths
def test_a_leased_entry_whose_owner_goes(
    manager: Manager, break_: Any, fd: int, order: list[Half]
) -> None:
    from server.test_leases import Taker

    with Client(manager.address) as client:
        client.register("a", fd, lifetime="connection")
        taker = Taker(manager.address, "a")
        break_(order)
    wait_until(lambda: manager.stats().leases == 0)
    with pytest.raises(BrokenPipeError):
        taker.confirm()
    taker.close()
    with pytest.raises(NameNotFound):
        manager.fetch("a")


def test_watchers_are_told_why(manager: Manager, fd: int) -> None:
    near, far = socket.socketpair()
    with Client(manager.address) as watcher, watcher.watch(timeout=20) as watch:
        next(watch)
        with Client(manager.address) as client:
            client.register("connection", fd, lifetime="connection")
            client.register("ttl", fd, ttl=0.2)
            client.register("hangup", near, drop_on_hangup=True)
        near.close()
        far.close()
        said: dict[str, str] = {}
        while len(said) < 3:
            change: Any = next(watch)
            if change.event != "registered":
                said[change.name] = change.event
    assert said == {"connection": "hung_up", "ttl": "expired", "hangup": "hung_up"}
