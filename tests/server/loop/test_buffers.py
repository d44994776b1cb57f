"""Buffers: what the connections of a user make the server keep, and when it is too much."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Iterator

import msgspec
import pytest

from fdshare.protocol import messages as m
from fdshare.protocol.framing import Frame, header
from fdshare.server.core.policy import Subject
from fdshare.server.core.ports import Session, Waiter
from fdshare.server.core.users import User
from fdshare.server.limits import Limits
from fdshare.server.loop.buffers import Buffers
from fdshare.server.loop.connection import Connection

LIMITS = msgspec.structs.replace(
    Limits.for_rlimit(1000), max_buffered=10_000, max_buffered_per_uid=5_500
)


@pytest.fixture
def connect() -> Iterator[Callable[[User], Connection]]:
    socks: deque[socket.socket] = deque()

    def connect(user: User) -> Connection:
        sock = socket.socket(socket.AF_UNIX)
        socks.append(sock)
        return Connection(sock, Session(Subject(user.uid, user.uid), 1, user), 0.0)

    yield connect
    for sock in socks:
        sock.close()


def half_a_request(connection: Connection) -> None:
    connection.receiver.feed(header(4000, 0, 1) + bytes(988))


def requests_that_wait(connection: Connection) -> None:
    connection.pending.extend(Frame(id, bytes(244), [], None) for id in (1, 2))


def an_answer(connection: Connection) -> None:
    connection.queue(bytes(744), ())


def answers_that_are_being_made(connection: Connection) -> None:
    connection.reserved += 1000


def waits(connection: Connection) -> None:
    session = connection.session
    fetch = m.Fetch("x", None)
    session.waiting = {id: Waiter(session, id, fetch, None) for id in range(2)}
    session.watches = {2: "*", 3: "*"}


@pytest.mark.parametrize(
    "keep",
    [half_a_request, requests_that_wait, an_answer, answers_that_are_being_made, waits],
    ids=lambda keep: keep.__name__,
)
def test_everything_counts_until_it_is_gone(
    connect: Callable[[User], Connection], keep: Callable[[Connection], None]
) -> None:
    buffers, user = Buffers(LIMITS), User(1501, False)
    connections = [connect(user) for _ in range(6)]
    for count, connection in enumerate(connections):
        assert buffers.refusal(user) is None, count
        keep(connection)
        buffers.recount(connection)
        buffers.recount(connection)  # what has not changed is counted once
    refusal = buffers.refusal(user)
    assert refusal is not None
    assert (refusal.what, refusal.limit, refusal.used) == (
        "max_buffered_per_uid",
        5500,
        buffers.total,
    )
    for connection in connections:
        buffers.forget(connection)
    assert buffers.total == user.buffered == 0
    assert buffers.refusal(user) is None


def test_a_user_has_less_where_others_have_much(connect: Callable[[User], Connection]) -> None:
    buffers = Buffers(LIMITS)
    users = [User(uid, False) for uid in (1501, 1502, 1503)]
    for user, size in zip(users, (4000, 4000, 900), strict=True):
        connection = connect(user)
        connection.reserved = size
        buffers.recount(connection)
    assert [buffers.refusal(user) is None for user in users] == [False, False, True]


def test_nobody_refuses_who_is_trusted(connect: Callable[[User], Connection]) -> None:
    buffers, user = Buffers(LIMITS), User(0, True)
    connection = connect(user)
    connection.reserved = 1 << 30
    buffers.recount(connection)
    assert buffers.refusal(user) is None
