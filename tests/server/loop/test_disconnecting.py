"""The sockets of clients are closed without a wait, and without a number while they wait."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest
from conftest import census, wait_until

from fdshare.kernel.ancillary import send_message
from fdshare.server.loop.closing import Closer
from fdshare.server.loop.disconnecting import Disconnector
from fdshare.server.loop.lanes import Lanes
from fdshare.server.loop.poller import Poller

UID = 54321
MANY = 1000  # more than one pair has room for


class Disconnecting:
    """A disconnector with its threads; `turn` stands for a turn of the loop."""

    def __init__(self, most: int = 0) -> None:
        self.lanes = Lanes()
        self.closer = Closer(self.lanes, lambda: None, alone=False)
        self.poller = Poller()
        self.disconnector = Disconnector(self.closer, self.poller, most)
        self.gate = threading.Event()

    def hang(self) -> None:
        """Makes the closes of the user hang until the gate is open."""
        self.lanes.put(UID, self.gate.wait)
        wait_until(lambda: self.lanes.hangs(UID))

    def disconnect(self, *, unread: bytes = b"x", fds: tuple[int, ...] = ()) -> socket.socket:
        """The end of a client of which so much is unread."""
        sock, client = socket.socketpair()
        if unread:
            send_message(client, (unread,), fds)
        self.disconnector.disconnect(sock, UID)
        return client

    def turn(self) -> None:
        for key, events in self.poller.wait(0.0):
            key(events, 0.0)  # type: ignore[operator]

    def close(self) -> None:
        self.gate.set()
        assert self.lanes.stop(10)
        self.disconnector.close()
        self.poller.close()


@pytest.fixture
def disconnecting() -> Iterator[Disconnecting]:
    disconnecting = Disconnecting()
    yield disconnecting
    disconnecting.close()


@pytest.mark.parametrize("unread", [0, 1, 100_000])
def test_what_brings_no_descriptor_is_closed_at_once(
    disconnecting: Disconnecting, unread: int
) -> None:
    disconnecting.hang()
    before = census()
    with disconnecting.disconnect(unread=bytes(unread)) as client:
        assert census().keys() - before.keys() == {client.fileno()}
        assert client.recv(1) == b""


def test_a_client_that_is_gone(disconnecting: Disconnecting) -> None:
    """What it had not read makes the end of the stream an error, once."""
    disconnecting.hang()
    sock, client = socket.socketpair()
    sock.sendall(b"unread")
    client.close()
    number = sock.fileno()
    disconnecting.disconnector.disconnect(sock, UID)
    assert number not in census()


def test_what_brings_descriptors_is_closed_in_the_lane(disconnecting: Disconnecting) -> None:
    """They are behind bytes, here; the client need not wait for it to see the end."""
    disconnecting.hang()
    read, write = os.pipe()
    sock, client = socket.socketpair()
    client.sendall(b"x" * 1000)
    send_message(client, (b"x",), (write,))
    os.close(write)
    disconnecting.disconnector.disconnect(sock, UID)
    assert client.recv(1) == b""
    client.close()
    os.set_blocking(read, False)
    with pytest.raises(BlockingIOError):
        os.read(read, 1)
    disconnecting.gate.set()
    wait_until(lambda: disconnecting.lanes.stop(0))
    os.set_blocking(read, True)
    assert os.read(read, 1) == b""
    os.close(read)


def test_those_that_wait_have_no_numbers(disconnecting: Disconnecting) -> None:
    before = census()
    disconnecting.hang()
    for _ in range(MANY):
        disconnecting.disconnect(fds=(0, 0)).close()
    assert len(census().keys() - before.keys()) < MANY // 50
    disconnecting.gate.set()
    wait_until(lambda: not disconnecting.closer.left(UID), "their close")
    disconnecting.turn()
    assert census() == before
    disconnecting.disconnect(fds=(0,)).close()  # in a pair of its own
    wait_until(lambda: not disconnecting.closer.left(UID), "its close")
    disconnecting.turn()
    assert census() == before


def test_nothing_is_put_where_a_close_has_begun(disconnecting: Disconnecting) -> None:
    """The close(2) here would be the last one, and might block."""
    disconnecting.hang()
    disconnecting.disconnect(fds=(0,)).close()
    (pair,) = disconnecting.disconnector._pairs
    pair.seal()
    disconnecting.disconnect(fds=(0,)).close()
    assert [each.count for each in disconnecting.disconnector._pairs] == [1, 1]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_without_privileges_few_wait_in_flight() -> None:
    """The kernel counts them with what is sent to clients; the others need a number each."""
    os.seteuid(UID)
    try:
        disconnecting = Disconnecting(most=10)
    finally:
        os.seteuid(0)
    before = census()
    disconnecting.hang()
    for _ in range(30):
        disconnecting.disconnect(fds=(0,)).close()
    assert len(census().keys() - before.keys()) == 2 + 20
    disconnecting.gate.set()
    wait_until(lambda: not disconnecting.closer.left(UID), "their close")
    disconnecting.turn()
    disconnecting.gate.clear()
    disconnecting.hang()
    for _ in range(10):  # there is room again
        disconnecting.disconnect(fds=(0,)).close()
    assert len(census().keys() - before.keys()) == 2
    disconnecting.close()


def test_in_a_forked_child_the_ends_are_the_parents(disconnecting: Disconnecting) -> None:
    disconnecting.hang()
    disconnecting.disconnect(fds=(0,)).close()
    (pair,) = disconnecting.disconnector._pairs
    number = pair.end.fileno()
    disconnecting.disconnector.abandon()
    del pair
    disconnecting.disconnector._pairs.clear()
    disconnecting.disconnector._last.clear()
    assert number in census()
    disconnecting.poller.unregister(number)
    os.close(number)
