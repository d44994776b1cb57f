"""run_queue: nobody waits for all the connections of somebody else."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from fdshare.kernel.endpoint import connect, listen
from fdshare.protocol import messages as m
from fdshare.protocol.framing import header
from fdshare.server.core.policy import Subject
from fdshare.server.core.ports import Session
from fdshare.server.core.users import User
from fdshare.server.loop import input, loop
from fdshare.server.loop.connection import Connection
from fdshare.server.loop.poller import FEW
from fdshare.server.loop.run_queue import RunQueue
from fdshare.server.loop.server import Server
from fdshare.server.settings import Settings

COUNT = 100  # more than the poller reports in several waits, where there is no crowd
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be other users")


@pytest.fixture
def connection() -> Iterator[Callable[[User], Connection]]:
    """Makes connections of a user."""
    near, far = socket.socketpair()

    def make(user: User) -> Connection:
        return Connection(near, Session(Subject(user.uid, user.uid), 1, user), 0.0)

    with near, far:
        yield make


def served(queue: RunQueue, seconds: float = 1.0) -> Connection | None:
    """The next one, for which the loop works so long."""
    connection = queue.next()
    if connection is not None:
        queue.served(connection, seconds)
    return connection


def test_users_are_served_in_turn(connection: Callable[[User], Connection]) -> None:
    many, one, two = User(1, False), User(2, False), User(3, True)
    crowd = [connection(many) for _ in range(4)]
    lonely, pair = connection(one), [connection(two) for _ in range(2)]
    queue = RunQueue()
    for each in (*crowd, lonely, *pair, crowd[0]):  # the last one is there already
        queue.put(each)
    assert [served(queue) for _ in range(4)] == [crowd[0], lonely, pair[0], crowd[1]]
    assert [served(queue) for _ in range(3)] == [pair[1], crowd[2], crowd[3]]
    assert not queue
    assert served(queue) is None


def test_users_get_the_same_time(connection: Callable[[User], Connection]) -> None:
    """And not the same number of turns."""
    slow, quick = User(1, False), User(2, False)
    long, short = [[connection(user) for _ in range(8)] for user in (slow, quick)]
    queue = RunQueue()
    for each in (*long, *short):
        queue.put(each)
    first = []
    for _ in range(8):
        first.append(queue.next())
        assert first[-1] is not None
        queue.served(first[-1], 4.0 if first[-1] in long else 1.0)
    assert first == [long[0], *short[:4], long[1], *short[4:6]]


def test_who_asks_for_little_is_served_at_once(connection: Callable[[User], Connection]) -> None:
    """Also if what the loop did for it took long: that was not its own."""
    one, many = User(1, False), User(2, False)
    lonely, crowd = connection(one), [connection(many) for _ in range(4)]
    queue = RunQueue()
    for each in (crowd[0], lonely):
        queue.put(each)
    assert served(queue, 0.001) is crowd[0]
    assert served(queue, 0.0001) is lonely
    for each in crowd[1:]:
        queue.put(each)
    for each in crowd[1:]:
        assert served(queue, 0.001) is each
        queue.put(lonely)
        assert served(queue, 100.0) is lonely


def test_nobody_is_put_off_by_those_who_come_again(
    connection: Callable[[User], Connection],
) -> None:
    """However often: what the loop does for them counts."""
    one = User(1, False)
    patient, behind = connection(one), connection(one)
    first, second = [connection(User(uid, False)) for uid in (2, 3)]
    queue = RunQueue()
    for each in (patient, behind, first, second):
        queue.put(each)
    assert served(queue, 0.001) is patient
    turns: list[Connection | None] = []
    while behind not in turns:
        turns.append(served(queue, 0.001))
        assert turns[-1] is not None
        queue.put(turns[-1])
        assert len(turns) < 10


def test_nobody_saves_time(connection: Callable[[User], Connection]) -> None:
    many, idle = User(1, False), User(2, False)
    queue = RunQueue()
    for each in [connection(many) for _ in range(12)]:
        queue.put(each)
    for _ in range(9):
        served(queue, 1.0)
    for each in [connection(idle) for _ in range(9)]:
        queue.put(each)
    users = [each.session.user for _ in range(6) if (each := served(queue, 1.0)) is not None]
    assert users.count(many) == 3


def test_who_is_put_back_while_it_is_served_waits_for_the_others(
    connection: Callable[[User], Connection],
) -> None:
    busy, other = connection(User(1, False)), connection(User(2, False))
    queue = RunQueue()
    queue.put(busy)
    assert queue.next() is busy
    queue.put(busy)
    queue.put(other)
    queue.served(busy, 1.0)
    assert served(queue) is other
    assert served(queue) is busy


def test_who_is_closed_is_served_no_more(connection: Callable[[User], Connection]) -> None:
    user = User(1, False)
    first, second = connection(user), connection(user)
    queue = RunQueue()
    queue.put(first)
    queue.put(second)
    queue.forget(first)
    queue.forget(first)
    assert served(queue) is second
    queue.put(first)
    queue.forget(first)
    assert not queue
    queue.forget(first)
    assert queue.next() is None
    queue.put(second)
    assert served(queue) is second
    queue.put(first)
    assert queue.next() is first
    queue.put(second)
    queue.forget(second)  # the end of the one is a reason to close the other
    queue.served(first, 1.0)
    assert queue.next() is None


class Crowded:
    """A server in which COUNT connections of one user and one of another have said Hello."""

    def __init__(self, path: str, listener: socket.socket) -> None:
        self.server = Server(listener, Settings(path=path, mode=0o666, keeper=False))
        self.crowd = [connected(path, 1501) for _ in range(COUNT)]
        self.other = connected(path, 1502)
        self.say(m.Hello(m.MAGIC, m.VERSION, ""), *self.crowd, self.other)
        for sock in (*self.crowd, self.other):
            self.turns_until_answered(sock)
            sock.recv(1 << 16)

    def say(self, request: m.AnyRequest, *socks: socket.socket) -> None:
        body = m.encode(request)
        for sock in socks:
            sock.sendall(header(len(body), 0, 0) + body)

    def turns_until_answered(self, sock: socket.socket) -> int:
        turns = 0
        while not is_answered(sock):
            assert turns < 1000
            self.server.loop.turn()
            turns += 1
        return turns

    def close(self) -> None:
        for sock in (*self.crowd, self.other):
            sock.close()
        self.server.stop()
        assert not self.server.run()
        self.server.shut_down()


def connected(path: str, uid: int) -> socket.socket:
    """A connection of *uid*. SO_PEERCRED is of the moment of connect(2)."""
    os.seteuid(uid)
    try:
        sock = connect(path)
    finally:
        os.seteuid(0)
    sock.setblocking(False)
    return sock


def is_answered(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


@pytest.fixture
def crowded(folder: Path) -> Iterator[Crowded]:
    folder.chmod(0o755)
    path = str(folder / "s")
    with listen(path, mode=0o666) as listener, closing(Crowded(path, listener.socket)) as crowded:
        yield crowded


@needs_root
def test_a_turn_ends_and_the_next_is_fair(
    crowded: Crowded, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (input, loop):  # there is time for one connection in a turn
        monkeypatch.setattr(module, "SLICE", 0.0)
    crowded.say(m.Ping(), *crowded.crowd)
    for _ in range(3):
        crowded.server.loop.turn()
    # What waits is not reported again, so that what is new is found at once.
    assert crowded.server.loop.poller.wait(0) == []
    assert crowded.server.loop.users[1501].time > 0  # what it took of the loop counts
    crowded.say(m.Ping(), crowded.other)
    assert crowded.turns_until_answered(crowded.other) <= 2
    # And none of them is forgotten.
    assert sum(map(crowded.turns_until_answered, crowded.crowd)) <= COUNT - 3
    for _ in range(2):  # each is reported again
        crowded.other.recv(1 << 16)
        crowded.say(m.Ping(), crowded.other)
        crowded.turns_until_answered(crowded.other)


@needs_root
def test_who_asks_with_a_crowd_is_found_at_once(
    crowded: Crowded, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (input, loop):
        monkeypatch.setattr(module, "SLICE", 0.0)
    assert COUNT > 3 * FEW
    crowded.say(m.Ping(), *crowded.crowd, crowded.other)
    assert crowded.turns_until_answered(crowded.other) <= 2


@needs_root
def test_who_goes_while_it_waits(crowded: Crowded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SLICE", 0.0)
    crowded.say(m.Ping(), *crowded.crowd)
    crowded.server.loop.turn()
    first = list(crowded.server.loop.connections)[:40]  # accepted in their order
    crowded.server.loop.drop(next(c for c in first if c.reported))
    for sock in crowded.crowd[:40]:
        sock.close()
    while crowded.server.loop.queue:
        crowded.server.loop.turn()
    assert all(map(is_answered, crowded.crowd[40:]))
    assert len(crowded.server.loop.connections) == COUNT - 39


@needs_root
def test_requests_that_are_left_wait_for_the_turn_of_their_user(
    crowded: Crowded, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (input, loop):  # there is time for one request in a turn
        monkeypatch.setattr(module, "SLICE", 0.0)
    first = crowded.crowd[0]
    crowded.say(m.Ping(), *[first] * 50)
    crowded.server.loop.turn()
    crowded.say(m.Ping(), crowded.other)
    assert crowded.turns_until_answered(crowded.other) <= 2
    length = len(header(0, 0, 0) + m.encode(m.Done()))
    while len(first.recv(1 << 16, socket.MSG_PEEK)) < 50 * length:
        assert crowded.server.loop.queue
        crowded.server.loop.turn()
