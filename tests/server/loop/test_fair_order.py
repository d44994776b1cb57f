"""fair_order: nobody waits for all the connections of somebody else."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fdshare.kernel.endpoint import connect, listen
from fdshare.protocol import messages as m
from fdshare.protocol.framing import header
from fdshare.server.core.policy import Subject
from fdshare.server.core.ports import Session
from fdshare.server.core.users import User
from fdshare.server.loop import loop
from fdshare.server.loop.connection import Connection
from fdshare.server.loop.fair_order import fair_order
from fdshare.server.loop.poller import READ
from fdshare.server.loop.server import Server
from fdshare.server.settings import Settings

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be other users")


@pytest.fixture
def connection() -> Iterator[Callable[[User, float], Connection]]:
    """Makes connections of a user, last served then."""
    near, far = socket.socketpair()

    def make(user: User, served: float) -> Connection:
        return Connection(near, Session(Subject(user.uid, user.uid), 1, user), served)

    with near, far:
        yield make


def test_users_are_served_in_turn(connection: Callable[[User, float], Connection]) -> None:
    many, one, two = User(1, False), User(2, False), User(3, True)
    many.served, one.served, two.served = 3.0, 2.0, 1.0
    crowd = [connection(many, 5.0 - number) for number in range(4)]
    lonely = connection(one, 9.0)
    pair = [connection(two, 3.0), connection(two, 3.0)]
    ready = [(key, READ) for key in (*crowd, lonely, "listener", *pair)]
    order = [key for key, _ in fair_order(ready)]
    # Who was served longest ago is first, and epoll's order decides where that is the same.
    assert order == [
        "listener",
        *(pair[0], lonely, crowd[3]),
        *(pair[1], crowd[2]),
        *(crowd[1], crowd[0]),
    ]


def hello(path: str, uid: int) -> socket.socket:
    """A connection of *uid* that has said Hello. SO_PEERCRED is of the moment of connect(2)."""
    os.seteuid(uid)
    try:
        sock = connect(path)
    finally:
        os.seteuid(0)
    body = m.encode(m.Hello(m.MAGIC, m.VERSION, ""))
    sock.sendall(header(len(body), 0, 0) + body)
    sock.setblocking(False)
    return sock


def is_answered(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


@needs_root
def test_a_turn_ends_and_the_next_is_fair(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SLICE", 0.0)  # there is time for one connection in a turn
    folder.chmod(0o755)
    settings = Settings(path=str(folder / "s"), mode=0o666, keeper=False)
    with listen(settings.path, mode=0o666) as listener:
        server = Server(listener.socket, settings)
        crowd = [hello(settings.path, 1501) for _ in range(60)]
        other = hello(settings.path, 1502)
        while len(server.loop.connections) < 61:
            server.loop.turn()
        turns = 0
        while not is_answered(other):
            server.loop.turn()
            turns += 1
        assert turns <= 3
        while not all(map(is_answered, crowd)):  # and none of them is forgotten
            server.loop.turn()
            turns += 1
        assert turns <= 62
        server.stop()
        assert not server.run()
        server.shut_down()
        for sock in (*crowd, other):
            sock.close()
