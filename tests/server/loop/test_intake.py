"""Intake: no message uses up the numbers, and what is in no entry counts against its sender."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import msgspec
import pytest
from conftest import census, wait_until

from fdshare.errors import DescriptorLimit, QuotaExceeded
from fdshare.kernel.ancillary import send_message
from fdshare.protocol.framing import header
from fdshare.server.core.policy import Subject
from fdshare.server.core.ports import Session
from fdshare.server.core.table import Table
from fdshare.server.core.users import User
from fdshare.server.limits import RESERVE, Limits
from fdshare.server.loop.closing import Closer
from fdshare.server.loop.connection import Connection
from fdshare.server.loop.intake import Intake, NotNow
from fdshare.server.loop.lanes import Lanes

LIMITS = msgspec.structs.replace(
    Limits.for_rlimit(1000), max_unsettled=100, max_unsettled_per_uid=50
)
FEW = RESERVE + 20  # of 20 numbers that are free, a message may have ten
MANY = 10_000


class Receiving:
    """An intake, a connection of each of two users, and their clients' ends."""

    def __init__(self, nofile: int, limits: Limits = LIMITS) -> None:
        self.lanes = Lanes()
        self.closer = Closer(self.lanes, lambda: None, alone=False)
        self.intake = Intake(Table(), limits, nofile, self.closer)
        self.buffer = bytearray(1 << 12)
        self.socks: list[socket.socket] = []

    def connect(self, user: User) -> tuple[Connection, socket.socket]:
        near, far = socket.socketpair()
        near.setblocking(False)
        self.socks += [near, far]
        session = Session(Subject(user.uid, user.uid), 1, user)
        return Connection(near, session, 0.0), far

    def close(self) -> None:
        self.lanes.stop(5)
        for sock in self.socks:
            sock.close()


@pytest.fixture
def few() -> Iterator[Receiving]:
    receiving = Receiving(FEW)
    yield receiving
    receiving.close()


@pytest.fixture
def many() -> Iterator[Receiving]:
    receiving = Receiving(MANY)
    yield receiving
    receiving.close()


def test_a_message_that_fits_is_received_once(few: Receiving) -> None:
    connection, client = few.connect(User(1, False))
    for word in (b"one", b"two"):
        send_message(client, (word,), [0] * 10)
        count, handles, lost = few.intake.receive(connection, few.buffer, 0)
        assert (bytes(few.buffer[:count]), len(handles), lost) == (word, 10, None)
        assert {os.fstat(h.fd).st_ino for h in handles} == {os.fstat(0).st_ino}
        for handle in handles:
            os.close(handle.fd)
    with pytest.raises(BlockingIOError):
        few.intake.receive(connection, few.buffer, 0)


def test_a_message_that_does_not_fit_is_not_read(few: Receiving) -> None:
    """Its descriptors stay in the kernel: nobody closes the last copy of one here."""
    connection, client = few.connect(User(1, False))
    before = census()
    send_message(client, (b"much",), [0] * 50)
    with pytest.raises(DescriptorLimit):
        few.intake.receive(connection, few.buffer, 0)
    assert socket.recv_fds(connection.sock, 10, 0, socket.MSG_PEEK)[0] == b"much"
    wait_until(lambda: census() == before, "those that had fitted are closed")


def test_trusted_users_hear_of_it_and_stay(few: Receiving) -> None:
    connection, client = few.connect(User(0, True))
    send_message(client, (b"much",), [0] * 50)
    send_message(client, (b"more",), [0])
    count, handles, lost = few.intake.receive(connection, few.buffer, 0)
    assert (bytes(few.buffer[:count]), handles) == (b"much", [])
    assert isinstance(lost, DescriptorLimit)
    assert lost.whose == "server"
    count, handles, lost = few.intake.receive(connection, few.buffer, 0)
    assert (bytes(few.buffer[:count]), len(handles), lost) == (b"more", 1, None)
    os.close(handles[0].fd)


def test_descriptors_behind_a_full_buffer_come_once(few: Receiving) -> None:
    """A peek that fills its buffer looks past it, and brings those of the next message, too."""
    connection, client = few.connect(User(1, False))
    client.sendall(b"x" * len(few.buffer))
    send_message(client, (b"next",), [0] * 3)
    received = b""
    found = 0
    while not received.endswith(b"next"):
        count, handles, lost = few.intake.receive(connection, few.buffer, 0)
        assert lost is None
        received += few.buffer[:count]
        found += len(handles)
        for handle in handles:
            os.close(handle.fd)
    assert (len(received), found) == (len(few.buffer) + 4, 3)


def test_what_is_in_use_leaves_less(few: Receiving) -> None:
    connection, client = few.connect(User(1, False))
    send_message(client, (b"x",), [0] * 5)
    with pytest.raises(DescriptorLimit):  # of four numbers that are free, two
        few.intake.receive(connection, few.buffer, 16)


@pytest.fixture
def shared() -> Iterator[Receiving]:
    """Few numbers, of which a user who has some gets no more than five."""
    receiving = Receiving(
        FEW, msgspec.structs.replace(LIMITS, max_unsettled=10, max_unsettled_per_uid=5)
    )
    yield receiving
    receiving.close()


def test_who_has_numbers_gets_no_more_than_a_share(shared: Receiving) -> None:
    user = User(1, False)
    first, second = shared.connect(user), shared.connect(user)
    half_frame(shared, *first, 4)
    connection, client = second
    for count in (1, 0):
        send_message(client, (b"x",), [0] * count)
        assert len(received(shared, connection)) == count
    send_message(client, (b"much",), [0] * 3)  # where there is room for one, two fit
    with pytest.raises(QuotaExceeded) as caught:
        shared.intake.receive(connection, shared.buffer, 0)
    assert caught.value.fields == {"what": "max_unsettled_per_uid", "limit": 5, "used": 4}
    assert socket.recv_fds(connection.sock, 10, 0, socket.MSG_PEEK)[0] == b"much"
    # Others have half of what is left of the numbers.
    connection, client = shared.connect(User(2, False))
    send_message(client, (b"x",), [0] * 8)
    assert len(received(shared, connection)) == 8
    shared.closer.close(first[0].receiver.drain())


def test_the_last_numbers_are_for_who_has_none(shared: Receiving) -> None:
    user = User(1, False)
    first, (connection, client) = shared.connect(user), shared.connect(user)
    half_frame(shared, *first, 1)
    send_message(client, (b"x",), [0])
    with pytest.raises(DescriptorLimit):
        shared.intake.receive(connection, shared.buffer, 20)
    connection, client = shared.connect(User(2, False))
    send_message(client, (b"x",), [0])
    _, handles, lost = shared.intake.receive(connection, shared.buffer, 20)
    assert (len(handles), lost) == (1, None)
    shared.closer.close([*handles, *first[0].receiver.drain()])


def test_who_has_more_than_a_share_is_found_where_numbers_are_few(shared: Receiving) -> None:
    """One message may be of any size, but not at the cost of others."""
    user, other = User(1, False), User(2, False)
    half_frame(shared, *(small := shared.connect(other)), 3)
    assert shared.intake.is_short
    assert shared.intake.over_share() is None
    half_frame(shared, *(large := shared.connect(user)), 8)
    assert shared.intake.over_share() is large[0]
    for connection, _ in (small, large):
        shared.closer.close(connection.receiver.drain())
        shared.intake.forget(connection)
    assert shared.intake.over_share() is None


def test_numbers_that_are_about_to_be_free_are_waited_for(shared: Receiving) -> None:
    user, other = User(1, False), User(2, False)
    connection, client = shared.connect(user)
    send_message(client, (b"x",), [0] * 5)
    _, handles, _ = shared.intake.receive(connection, shared.buffer, 0)
    shared.lanes.rest()  # as before a fork: they are closed later
    shared.closer.close(handles)
    send_message(client, (b"x",), [0])
    with pytest.raises(NotNow):
        shared.intake.receive(connection, shared.buffer, 0)
    theirs, client = shared.connect(other)
    send_message(client, (b"x",), [0])
    assert len(received(shared, theirs)) == 1
    shared.lanes.resume()
    wait_until(lambda: not shared.closer.left(user.uid), "their close")
    assert len(received(shared, connection)) == 1


# What is unsettled.


def received(receiving: Receiving, connection: Connection) -> list[int]:
    """The numbers that a read brings, which are closed again."""
    _, handles, lost = receiving.intake.receive(connection, receiving.buffer, 0)
    assert lost is None
    numbers = [handle.fd for handle in handles]
    for number in numbers:
        os.close(number)
    return numbers


def half_frame(receiving: Receiving, connection: Connection, client: socket.socket, n: int) -> None:
    send_message(client, (header(1000, n, 1) + b"x",), [0] * n)
    count, handles, _ = receiving.intake.receive(connection, receiving.buffer, 0)
    connection.receiver.feed(memoryview(receiving.buffer)[:count], handles)
    receiving.intake.recount(connection)


def test_half_frames_have_a_share_for_each_uid(many: Receiving) -> None:
    user, other = User(1, False), User(2, False)
    connections = [many.connect(user) for _ in range(4)]
    for connection, client in connections[:2]:
        half_frame(many, connection, client, 25)
        assert many.intake.refusal(user, connection) is None
    with pytest.raises(QuotaExceeded) as caught:
        half_frame(many, *connections[2], 1)
    assert caught.value.fields == {"what": "max_unsettled_per_uid", "limit": 50, "used": 50}
    assert many.intake.refusal(user) is None
    mine, client = many.connect(other)
    half_frame(many, mine, client, 200)  # one message may be of any size
    assert many.intake.refusal(other, mine) is None
    refusal = many.intake.refusal(other)  # not even a connection more
    assert refusal is not None
    assert refusal.fields == {"what": "max_unsettled_per_uid", "limit": 25, "used": 200}
    client.sendall(b"x")
    assert received(many, mine) == []  # the rest of that message is read
    for connection, _ in (*connections, (mine, client)):
        many.closer.close(connection.receiver.drain())
        many.intake.forget(connection)
    assert (user.received, other.received, many.intake.received) == (0, 0, 0)
    assert many.intake.refusal(user) is None


def test_what_is_settled_counts_no_more(many: Receiving) -> None:
    user = User(1, False)
    connection, client = many.connect(user)
    half_frame(many, connection, client, 20)
    assert many.intake.unsettled(user) == 20
    many.intake.take(connection, 20)
    assert many.intake.unsettled(user) == 0
    many.closer.close(connection.receiver.drain())
    many.intake.recount(connection)
    assert many.intake.unsettled(user) == 0
