"""How entries end by themselves: connection, process, ttl, grace. Each is watched on by a
successor."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

import pytest
from breaking import Half, Halves
from conftest import wait_until
from nursery import Manager, Process

from fdshare.client.blocking.client import Client
from fdshare.errors import InvalidArgument, NameNotFound
from server.orders import WITH_NONE, deaths, gone


@deaths(WITH_NONE)
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


@deaths(WITH_NONE)
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


@deaths(WITH_NONE)
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


@deaths(WITH_NONE)
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


@deaths(WITH_NONE)
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


@deaths(WITH_NONE)
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
            with suppress(NameNotFound):  # on a slow machine it has expired
                client.unregister(f"many/{index}")
        client.register("many/1", fd, replace=True)
        ended = 0
        while ended < 99 or list(watch.held) != ["many/1"]:
            ended += next(watch).event in ("expired", "unregistered")
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


@deaths(WITH_NONE)
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
