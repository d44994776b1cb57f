"""close(2) that blocks: a TCP socket with SO_LINGER and unsent data. Nobody waits for it."""

from __future__ import annotations

import os
import socket
import statistics
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from breaking import Halves, leave_unread, lingering_pair, reset
from conftest import wait_until
from nursery import Manager

from fdshare.client.blocking.client import Client

LINGER = 30  # seconds


@pytest.fixture
def stuck() -> Iterator[Callable[[], socket.socket]]:
    """Makes sockets whose last close takes LINGER seconds; at the end their peers let them go."""
    peers: list[socket.socket] = []

    def make() -> socket.socket:
        sock, peer = lingering_pair(LINGER)
        peers.append(peer)
        return sock

    yield make
    for peer in peers:
        reset(peer)


def fetches(client: Client, count: int) -> tuple[float, float]:
    """The median and the most of the seconds of *count* fetches."""
    took = []
    for _ in range(count):
        began = time.monotonic()
        client.fetch_raw("usual")[0].close()
        took.append(time.monotonic() - began)
    return statistics.median(took), max(took)


def test_the_socket_does_block(stuck: Callable[[], socket.socket]) -> None:
    """Otherwise the rest proves nothing."""
    sock = stuck()
    os.close(os.dup(sock.fileno()))  # not the last close: it does not wait
    began = time.monotonic()
    with sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 1))
    assert time.monotonic() - began > 0.9


@pytest.mark.parametrize("keeper", [True, False])
@pytest.mark.parametrize("how", ["unregister", "replace", "ttl", "drop", "unread"])
def test_nobody_waits(
    stuck: Callable[[], socket.socket], counted: dict[str, Any], keeper: bool, how: str
) -> None:
    with Manager(keeper=keeper) as manager, Client(manager.address) as other:
        other.register("usual", 0)
        before, _ = fetches(other, 100)
        for _ in range(5):
            sock = stuck()
            let_go(manager, sock, how)
        after, most = fetches(other, 100)
        counted.update(before_us=round(before * 1e6), after_us=round(after * 1e6))
        # The bound is for a wait of seconds, not for the speed of this machine.
        assert most < LINGER / 10
        other.register("later", 0)
        other.unregister("later")
        if keeper:
            Halves(manager).kill("keeper")
            assert fetches(other, 10)[1] < LINGER / 10


def let_go(manager: Manager, sock: socket.socket, how: str) -> None:
    """The server, or its keeper, has the last copy, and closes it."""
    if how == "unread":
        leave_unread(manager.address, manager.stats().server_pid, sock)
        return
    options: dict[str, Any] = {"ttl": 0.2} if how == "ttl" else {}
    if how == "drop":
        with Client(manager.address) as owner, sock:
            owner.register("stuck", sock, lifetime="connection")
    else:
        with sock:
            manager.register("stuck", sock, **options)
    if how == "unregister":
        manager.unregister("stuck")
    elif how == "replace":
        manager.register("stuck", 0, replace=True)
        manager.unregister("stuck")
    else:
        wait_until(lambda: "stuck" not in manager)
