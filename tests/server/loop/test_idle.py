"""Idle: the order in which the connections of a user are closed to make room."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from fdshare.protocol import messages as m
from fdshare.server.core.policy import Subject
from fdshare.server.core.ports import Session, Waiter
from fdshare.server.core.users import User
from fdshare.server.loop.connection import Connection
from fdshare.server.loop.idle import Idle


@pytest.fixture
def crowd() -> Iterator[tuple[Idle, list[Connection]]]:
    """Four, who have asked for something one after the other."""
    idle, user, connections = Idle(), User(1501, False), []
    for _ in range(4):
        session = Session(Subject(1501, 1501), 1, user)
        connections.append(Connection(socket.socket(socket.AF_UNIX), session, 0.0))
        idle[connections[-1]] = None
    yield idle, connections
    for connection in connections:
        connection.sock.close()


Crowd = tuple[Idle, list[Connection]]


def wait(connection: Connection) -> None:
    session = connection.session
    session.waiting[1] = Waiter(session, 1, m.Fetch("x", None), None)


def test_the_last_request_decides(crowd: Crowd) -> None:
    idle, (a, b, c, d) = crowd
    assert idle.longest() is a
    assert idle.longest() is a  # looking changes nothing
    idle.move_to_end(a)
    assert idle.longest() is b
    for connection in (b, c, d):
        idle.forget(connection)
    assert idle.longest() is a
    idle.forget(a)
    assert idle.longest() is idle.longest_engaged() is None


def test_who_waits_is_found_last(crowd: Crowd) -> None:
    idle, (a, b, c, d) = crowd
    wait(a)
    b.session.watches[1] = "*"
    c.session.holds = True
    assert idle.longest() is d
    idle.forget(d)
    assert idle.longest() is None
    assert idle.longest_engaged() is a
    b.session.watches.clear()
    idle.restore(b)  # it was answered
    assert idle.longest() is b
    idle.forget(a)
    idle.forget(b)
    assert idle.longest() is None
    assert idle.longest_engaged() is c


def test_who_has_something_unread_is_not_found(crowd: Crowd) -> None:
    idle, (a, b, c, d) = crowd
    a.queue(b"unread", ())
    wait(b)
    assert idle.longest() is c
    b.queue(b"unread", ())
    idle.forget(c)
    idle.forget(d)
    assert idle.longest() is idle.longest_engaged() is None
    a.output.clear()
    idle.restore(a)  # it has read
    assert idle.longest() is a


@pytest.mark.parametrize("owed", ["a change", "an info"])
def test_who_is_owed_an_answer_that_is_being_made_is_not_found(crowd: Crowd, owed: str) -> None:
    idle, (a, *others) = crowd
    for connection in others:
        idle.forget(connection)
    if owed == "a change":
        a.session.owed += 1
    else:
        a.inspecting += 1
    assert idle.longest() is idle.longest_engaged() is None
    a.session.owed = a.inspecting = 0
    idle.restore(a)  # it was answered
    assert idle.longest() is a


def test_each_is_put_aside_once(crowd: Crowd) -> None:
    """However often somebody knocks."""
    idle, connections = crowd
    for connection in connections:
        wait(connection)
    assert idle.longest() is None
    assert [connection.aside for connection in connections] == [True] * 4
    assert idle.longest() is None
    idle.restore(connections[2])
    assert [connection.aside for connection in connections] == [True, True, False, True]
