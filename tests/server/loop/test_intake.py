"""Intake: no message uses up the numbers, and what is open counts against whose it is."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from conftest import census, wait_until
from kernel.pairs import Refusing, make_zero  # noqa: F401

from fdshare.errors import DescriptorLimit, DescriptorRefused, QuotaExceeded
from fdshare.kernel.ancillary import send_message
from fdshare.protocol import messages as m
from fdshare.protocol.framing import header
from fdshare.server.core.policy import Subject
from fdshare.server.core.ports import Session
from fdshare.server.core.records import Put, Record
from fdshare.server.core.table import Table
from fdshare.server.core.users import User
from fdshare.server.limits import RESERVE, Limits
from fdshare.server.loop.closing import Closer, Handle
from fdshare.server.loop.connection import Connection
from fdshare.server.loop.intake import Intake, NotNow
from fdshare.server.loop.keeper_closes import KeeperCloses
from fdshare.server.loop.lanes import Lanes

KIND = m.Kind("fd", msgspec.Raw(m.encode({})))
MANY = 10_000
FEW = RESERVE + 24  # of 22 numbers that two connections leave, a message may have ten


class Receiving:
    """An intake, a connection of each of two users, and their clients' ends."""

    def __init__(self, nofile: int, limits: Limits | None = None) -> None:
        self.lanes = Lanes()
        self.closer = Closer(self.lanes, lambda: None, alone=False)
        self.table = Table()
        self.connections: list[Any] = [None]  # one of another user
        self.keeper_closes = KeeperCloses()
        limits = limits or Limits.for_rlimit(nofile)
        self.intake = Intake(
            self.table, limits, nofile, self.closer, self.keeper_closes, self.connections
        )
        self.buffer = bytearray(1 << 12)
        self.socks: list[socket.socket] = []

    def connect(self, user: User) -> tuple[Connection, socket.socket]:
        near, far = socket.socketpair()
        near.setblocking(False)
        self.socks += [near, far]
        session = Session(Subject(user.uid, user.uid), 1, user)
        connection = Connection(near, session, 0.0)
        self.connections.append(connection)
        user.connections += 1
        return connection, far

    def put(self, user: User, count: int) -> None:
        """Has the table hold so many descriptors of *user*; their numbers are not of files."""
        put = Put("name", 1, KIND, count, m.Registrant(1, user.uid, 1, ""), 0.0)
        self.table.apply(Record([put]), [None] * count)

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
        count, handles, lost = few.intake.receive(connection, few.buffer)
        assert (bytes(few.buffer[:count]), len(handles), lost) == (word, 10, None)
        assert {os.fstat(h.fd).st_ino for h in handles} == {os.fstat(0).st_ino}
        for handle in handles:
            os.close(handle.fd)
    with pytest.raises(BlockingIOError):
        few.intake.receive(connection, few.buffer)


def test_a_message_that_does_not_fit_is_not_read(few: Receiving) -> None:
    """Its descriptors stay in the kernel: nobody closes the last copy of one here."""
    connection, client = few.connect(User(1, False))
    before = census()
    send_message(client, (b"much",), [0] * 50)
    with pytest.raises(DescriptorLimit):
        few.intake.receive(connection, few.buffer)
    assert socket.recv_fds(connection.sock, 10, 0, socket.MSG_PEEK)[0] == b"much"
    wait_until(lambda: census() == before, "those that had fitted are closed")


@pytest.mark.parametrize("size", [FEW, MANY])
@pytest.mark.parametrize("trusted", [False, True])
def test_what_a_security_module_refuses_is_read_and_told(
    zero: int, size: int, trusted: bool
) -> None:
    """It is no loss of numbers: the client may go on."""
    receiving = Receiving(size)
    connection, client = receiving.connect(User(1, trusted))
    before = census()
    send_message(client, (b"one",), [0, zero])
    send_message(client, (b"two",), [0])
    with Refusing(connection.sock) as connection.sock:
        count, handles, lost = receiving.intake.receive(connection, receiving.buffer)
        receiving.closer.close(handles)
        assert bytes(receiving.buffer[:count]) == b"one"
        assert isinstance(lost, DescriptorRefused)
        count, handles, lost = receiving.intake.receive(connection, receiving.buffer)
        assert (bytes(receiving.buffer[:count]), len(handles), lost) == (b"two", 1, None)
        receiving.closer.close(handles)
    wait_until(lambda: census() == before, "what came is closed")
    receiving.close()


def test_what_a_peek_sees_behind_its_bytes_is_not_lost(few: Receiving) -> None:
    """A peek that fills its buffer looks on: nothing was dropped with what is read."""
    connection, client = few.connect(User(1, True))
    few.put(User(2, False), 20)
    body = bytes(len(few.buffer))
    client.sendall(body)
    send_message(client, (b"behind",), [0] * 50)
    count, handles, lost = few.intake.receive(connection, few.buffer)
    assert (count, handles, lost) == (len(body), [], None)
    count, handles, lost = few.intake.receive(connection, few.buffer)
    assert (bytes(few.buffer[:count]), handles) == (b"behind", [])
    assert isinstance(lost, DescriptorLimit)


def test_trusted_users_hear_of_it_and_stay(few: Receiving) -> None:
    connection, client = few.connect(User(0, True))
    send_message(client, (b"much",), [0] * 50)
    send_message(client, (b"more",), [0])
    count, handles, lost = few.intake.receive(connection, few.buffer)
    assert (bytes(few.buffer[:count]), handles) == (b"much", [])
    assert isinstance(lost, DescriptorLimit)
    assert lost.whose == "server"
    count, handles, lost = few.intake.receive(connection, few.buffer)
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
        count, handles, lost = few.intake.receive(connection, few.buffer)
        assert lost is None
        received += few.buffer[:count]
        found += len(handles)
        for handle in handles:
            os.close(handle.fd)
    assert (len(received), found) == (len(few.buffer) + 4, 3)


def test_what_is_in_use_leaves_less(few: Receiving) -> None:
    connection, client = few.connect(User(1, False))
    few.connections += [None] * 18
    send_message(client, (b"x",), [0] * 5)
    with pytest.raises(DescriptorLimit):  # of four numbers that are free, two
        few.intake.receive(connection, few.buffer)


# Users have shares.


@pytest.fixture
def shared() -> Iterator[Receiving]:
    """Of 100 numbers a user may have half of what the others leave."""
    receiving = Receiving(RESERVE + 101, Limits.for_rlimit(RESERVE + 100))
    yield receiving
    receiving.close()


def test_a_user_may_have_half_of_what_others_leave(shared: Receiving) -> None:
    """However it is in use: by connections, half requests, entries, and closes."""
    user, other = User(1, False), User(2, False)
    first, (connection, client) = shared.connect(user), shared.connect(user)
    half_frame(shared, *first, 40)
    assert shared.intake.open_of(user) == 42
    send_message(client, (b"much",), [0] * 10)  # where there is room for eight, nine fit
    with pytest.raises(QuotaExceeded) as caught:
        shared.intake.receive(connection, shared.buffer)
    assert caught.value.fields == {"what": "max_open_per_uid", "limit": 50, "used": 42}
    assert socket.recv_fds(connection.sock, 10, 0, socket.MSG_PEEK)[0] == b"much"
    wait_until(lambda: not shared.closer.left(user.uid), "what the peek brought to be closed")
    theirs, client = shared.connect(other)
    send_message(client, (b"much",), [0] * 31)  # of 58 that others leave, beside a connection
    with pytest.raises(QuotaExceeded) as caught:
        shared.intake.receive(theirs, shared.buffer)
    assert caught.value.fields == {"what": "max_open_per_uid", "limit": 29, "used": 1}
    wait_until(lambda: not shared.closer.left(other.uid), "what the peek brought to be closed")
    theirs, client = shared.connect(other)
    send_message(client, (b"fits",), [0] * 27)
    assert len(received(shared, theirs)) == 27
    shared.closer.close(first[0].receiver.drain())


def test_entries_and_closes_count_like_what_was_received(shared: Receiving) -> None:
    user = User(1, False)
    shared.connect(user)
    assert shared.intake.refusal(user) is None
    shared.put(user, 30)
    shared.lanes.rest()  # as before a fork: they are closed later
    shared.closer.close([Handle(os.dup(0), user.uid) for _ in range(18)])
    assert shared.intake.open_of(user) == 49
    assert shared.intake.refusal(user) is None
    shared.connect(user)
    refusal = shared.intake.refusal(user)
    assert refusal is not None
    assert refusal.fields == {"what": "max_open_per_uid", "limit": 50, "used": 50}
    assert shared.intake.refusal(User(0, True)) is None
    shared.lanes.resume()
    wait_until(lambda: shared.intake.refusal(user) is None, "their close")


def test_who_has_its_share_can_still_replace_some_of_it(shared: Receiving) -> None:
    user = User(1, False)
    connection, client = shared.connect(user)
    shared.put(user, 50)
    send_message(client, (b"x",), [0] * 3)  # of 49 that are left, a sixteenth
    assert len(received(shared, connection)) == 3
    half_frame(shared, connection, client, 1)
    send_message(client, (b"x",), [0] * 2)
    with pytest.raises(QuotaExceeded):
        shared.intake.receive(connection, shared.buffer)
    shared.closer.close(connection.receiver.drain())


def test_the_last_numbers_are_for_who_has_none(shared: Receiving) -> None:
    user, (connection, client) = (other := User(2, False)), shared.connect(User(1, False))
    shared.put(connection.session.user, 40)
    shared.connections += [None] * 45
    send_message(client, (b"x",), [0] * 2)
    with pytest.raises(DescriptorLimit):
        shared.intake.receive(connection, shared.buffer)
    wait_until(lambda: not shared.closer.left(1), "what the peek brought to be closed")
    connection, client = shared.connect(user)
    send_message(client, (b"x",), [0] * 2)
    assert len(received(shared, connection)) == 2
    assert shared.intake.refusal(other) is None


def test_the_largest_half_request_gives_way(shared: Receiving) -> None:
    """Where few numbers are left, and its user has received more than those."""
    user, other = User(1, False), User(2, False)
    small, large = shared.connect(user), shared.connect(user)
    half_frame(shared, *small, 10)
    half_frame(shared, *large, 15)
    assert not shared.intake.is_short
    shared.connections += [None] * 45
    theirs, client = shared.connect(other)
    half_frame(shared, theirs, client, 5)
    assert shared.intake.is_short
    assert shared.intake.gives_way() is large[0]
    assert shared.intake.gives_way(25) is None
    assert shared.intake.gives_way(24) is large[0]
    for connection, _ in (large, small):
        shared.closer.close(connection.receiver.drain())
        shared.intake.forget(connection)
    assert shared.intake.gives_way() is None
    shared.closer.close(theirs.receiver.drain())


def test_numbers_that_are_about_to_be_free_are_waited_for(shared: Receiving) -> None:
    user, other = User(1, False), User(2, False)
    connection, client = shared.connect(user)
    shared.lanes.rest()  # as before a fork: they are closed later
    shared.closer.close([Handle(os.dup(0), user.uid) for _ in range(48)])
    send_message(client, (b"x",), [0] * 4)
    with pytest.raises(NotNow):
        shared.intake.receive(connection, shared.buffer)
    theirs, client = shared.connect(other)
    send_message(client, (b"x",), [0])
    assert len(received(shared, theirs)) == 1
    shared.lanes.resume()
    wait_until(lambda: not shared.closer.left(user.uid), "their close")
    assert len(received(shared, connection)) == 4


# What is received.


def received(receiving: Receiving, connection: Connection) -> list[int]:
    """The numbers that a read brings, which are closed again."""
    _, handles, lost = receiving.intake.receive(connection, receiving.buffer)
    assert lost is None
    numbers = [handle.fd for handle in handles]
    for number in numbers:
        os.close(number)
    return numbers


def half_frame(receiving: Receiving, connection: Connection, client: socket.socket, n: int) -> None:
    send_message(client, (header(1000, n, 1) + b"x",), [0] * n)
    count, handles, _ = receiving.intake.receive(connection, receiving.buffer)
    connection.receiver.feed(memoryview(receiving.buffer)[:count], handles)
    receiving.intake.recount(connection)


def test_what_is_settled_counts_no_more(many: Receiving) -> None:
    user = User(1, False)
    connection, client = many.connect(user)
    half_frame(many, connection, client, 20)
    assert many.intake.open_of(user) == 21
    many.intake.take(connection, 20)
    assert many.intake.open_of(user) == 1
    many.closer.close(connection.receiver.drain())
    many.intake.recount(connection)
    wait_until(lambda: many.intake.open_of(user) == 1, "their close")
