"""Descriptors in flight: shared by users and connections, and asked about a few at a time."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from barepeer import Peer
from breaking import Wire
from users import ANYBODY, AsUser, Say, as_user, needs_root

from fdshare.client.blocking.client import Client
from fdshare.kernel.ancillary import send_message
from fdshare.manager import Manager
from fdshare.protocol import messages as m
from fdshare.server.core.policy import Subject
from fdshare.server.core.ports import Session
from fdshare.server.core.users import User
from fdshare.server.limits import Limits
from fdshare.server.loop.connection import Connection
from fdshare.server.loop.in_flight import InFlight

LIMITS = msgspec.structs.replace(
    Limits.for_rlimit(1000), in_flight=80, in_flight_per_uid=40, in_flight_per_connection=20
)
KIND = m.Kind("fd", msgspec.Raw(m.encode({})))


class Flights:
    """Connections over real sockets, and one budget for them."""

    def __init__(self) -> None:
        self.in_flight = InFlight(LIMITS)
        self.peers: dict[Connection, socket.socket] = {}

    def connect(self, user: User) -> Connection:
        near, far = socket.socketpair()
        connection = Connection(near, Session(Subject(user.uid, user.uid), 1, user), 0.0)
        self.peers[connection] = far
        return connection

    def send(self, connection: Connection, count: int = 1) -> None:
        send_message(connection.sock, (b"x",), [0] * count)
        self.in_flight.sent(connection, count)

    def read(self, connection: Connection) -> None:
        _, fds, _, _ = socket.recv_fds(self.peers[connection], 1, 253)
        for fd in fds:
            os.close(fd)

    def close(self) -> None:
        for connection, far in self.peers.items():
            connection.sock.close()
            far.close()


@pytest.fixture
def flights() -> Iterator[Flights]:
    flights = Flights()
    yield flights
    flights.close()


def test_a_uid_has_its_share(flights: Flights) -> None:
    greedy, other = User(1, False), User(2, False)
    for _ in range(LIMITS.in_flight_per_uid):
        connection = flights.connect(greedy)
        assert flights.in_flight.fits(connection, 1)
        flights.send(connection)
    assert not flights.in_flight.fits(flights.connect(greedy), 1)
    assert flights.in_flight.fits(flights.connect(other), 20)
    assert flights.in_flight.fits(flights.connect(User(0, True)), 40)


def test_many_uids_leave_room_for_one_more(flights: Flights) -> None:
    for uid in range(1, 5):
        user = User(uid, False)
        while flights.in_flight.fits(connection := flights.connect(user), 1):
            flights.send(connection)
    assert flights.in_flight.fits(flights.connect(User(9, False)), 1)


def test_what_was_read_is_found_out(flights: Flights) -> None:
    user = User(1, False)
    connection = flights.connect(user)
    flights.send(connection, 20)
    assert not flights.in_flight.fits(connection, 1)
    assert not flights.in_flight.makes_room(connection, 1, 0.0)
    flights.read(connection)
    assert flights.in_flight.makes_room(connection, 1, 0.0)
    assert (flights.in_flight.total, user.in_flight) == (0, 0)


def test_a_look_is_at_a_few(flights: Flights) -> None:
    """However many connections there are; but all of them in the end."""
    user = User(1, True)
    connections = [flights.connect(user) for _ in range(75)]
    for connection in connections:
        flights.send(connection)
    deaf, connections = connections[:35], connections[35:]
    for connection in connections:
        flights.read(connection)
    flights.in_flight.look(0.0)
    assert flights.in_flight.total == 75  # those who had read were not among the first
    flights.in_flight.look(0.0, user)
    flights.in_flight.look(0.0)
    flights.in_flight.look(0.0)
    assert flights.in_flight.total == len(deaf)


def test_deaf_is_who_reads_nothing_for_long(flights: Flights) -> None:
    user = User(1, False)
    deaf, slow, quick = (flights.connect(user) for _ in range(3))
    for connection in (deaf, slow, quick):
        for _ in range(10):
            flights.send(connection)
    start = flights.in_flight.next_look()
    assert start is not None
    for second in range(8):
        now = start + LIMITS.request_timeout * second / 8
        assert flights.in_flight.deaf(now) == []
        flights.read(slow)
        if second < 1:
            for _ in range(10):
                flights.read(quick)
    assert flights.in_flight.deaf(start + LIMITS.request_timeout) == [deaf]
    flights.in_flight.forget(deaf)
    assert user.in_flight == 10  # the slow one has not read all


# In a server.


@needs_root
def test_a_deaf_user_stops_nobody(folder: Path) -> None:
    """Connections that read nothing, each with one descriptor: too few to be slow."""
    folder.chmod(0o755)
    (folder / "policy").write_text(ANYBODY)
    limits = {"in_flight": 20, "in_flight_per_uid": 10}
    with Manager(folder / "s", mode=0o666, policy=folder / "policy", limits=limits) as manager:
        manager.register("x", 0)

        def be_deaf(say: Say) -> list[Wire]:
            wires = [Wire(manager.address, f"{number}") for number in range(30)]
            for wire in wires:
                wire.send(1, m.Fetch("x"))
            say("deaf")
            return wires

        with AsUser(1501, be_deaf) as deaf:
            assert deaf.hear() == "deaf"
            fetched = as_user(1502, lambda: len(Client(manager.address).fetch_raw("x")))
            assert fetched == "1"
            manager.fetch("x").close()
            assert manager.stats().in_flight == 10


def test_who_does_not_read_has_to_go(serve: Callable[..., Manager], until: Any) -> None:
    """Although the kernel has taken the answer; and it can still be read."""
    manager = serve(limits={"request_timeout": 0.3})
    with Client(manager.address) as client, Peer(manager.address) as deaf:
        client.register("x", 0)
        deaf.send(m.Fetch("x"))
        until(lambda: client.stats().connections == 1, "the deaf one to be dropped")
        assert client.stats().in_flight == 0
        _, reply, (descriptor,) = deaf.receive()
        descriptor.close()
        assert type(reply) is m.Given
        with pytest.raises(EOFError):
            deaf.receive()
