"""connection: frames that go in pieces, their descriptors, and what the peer has read of them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from fdshare.kernel.passing import recv_fds
from fdshare.server.core.policy import Subject
from fdshare.server.core.ports import Session
from fdshare.server.core.users import User
from fdshare.server.loop.closing import Handle
from fdshare.server.loop.connection import Connection


@pytest.fixture
def peer(pair: tuple[socket.socket, socket.socket]) -> socket.socket:
    return pair[1]


@pytest.fixture
def connection(pair: tuple[socket.socket, socket.socket]) -> Connection:
    pair[0].setblocking(False)
    return Connection(pair[0], Session(Subject(0, 0), 1, User(0, True)), 0.0)


@pytest.fixture
def handles(null: int) -> Iterator[tuple[Handle, ...]]:
    made = tuple(Handle(os.dup(null)) for _ in range(3))
    yield made
    for handle in made:
        os.close(handle.fd)


def test_it_is_slow_from_its_first_moment(connection: Connection) -> None:
    """It owes the Hello."""
    assert connection.slow_since == 0.0
    assert not connection.greeted


def test_what_waits_is_pinned(connection: Connection, handles: tuple[Handle, ...]) -> None:
    connection.queue(b"one", handles[:2])
    connection.queue(b"three", handles[:1])
    assert [handle.pins for handle in handles] == [2, 1, 0]
    assert connection.output_bytes == 8


def test_descriptors_go_with_the_first_piece(
    connection: Connection, peer: socket.socket, handles: tuple[Handle, ...]
) -> None:
    data = b"x" * (1 << 20)
    connection.queue(data, handles)
    connection.queue(b"behind", handles[:1])
    assert connection.send_next() == handles
    assert connection.send_next() is None  # the socket is full
    left = connection.output_bytes
    assert 0 < left < len(data)
    got, numbers = b"", []
    while len(got) < len(data) + len(b"behind"):
        with recv_fds(peer, 1 << 16, 10) as message:
            got += message.data
            numbers.append(len(message.descriptors))
        while connection.output and connection.send_next() is not None:
            pass
    assert got == data + b"behind"
    assert [number for number in numbers if number] == [3, 1]
    assert connection.output_bytes == 0


def test_what_the_peer_has_not_read(
    connection: Connection, peer: socket.socket, handles: tuple[Handle, ...]
) -> None:
    assert not connection.unread()
    connection.queue(b"one", handles[:2])
    connection.send_next()
    size = connection.unread()
    assert size == connection.unread_size > 0
    recv_fds(peer, 100, 10).close()
    assert connection.unread() == connection.unread_size == 0


def test_a_peer_that_is_gone(connection: Connection, peer: socket.socket) -> None:
    connection.queue(b"one", ())
    peer.close()
    with pytest.raises(BrokenPipeError):
        connection.send_next()
    assert connection.output_bytes == 3  # whoever drops it still finds what it had
