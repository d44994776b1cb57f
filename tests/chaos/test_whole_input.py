"""All that can come to a server: frames, half frames, bodies and descriptors of any sort, in any
order, on connections that end at any moment. Nothing of it makes a request fail in a way of its
own, and when the connections have ended nothing is left of them in any account.

The server runs in this process, a turn at a time, so its accounts can be read.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import census
from users import ANYBODY

from chaos.test_bad_peers import KIND, Fuzzer
from fdshare.errors import ProtocolError
from fdshare.kernel.ancillary import send_message
from fdshare.kernel.endpoint import connect, listen
from fdshare.protocol import messages as m
from fdshare.protocol.framing import Receiver, header
from fdshare.server.core.table import Usage, usage_of
from fdshare.server.loop.server import Server
from fdshare.server.settings import Settings

UIDS = [os.geteuid(), 1501] if os.geteuid() == 0 else [os.geteuid()]


class Peer:
    """A connection, and the rest of a frame that was sent in part."""

    def __init__(self, address: str, uid: int) -> None:
        mine = os.geteuid()
        os.seteuid(uid)  # SO_PEERCRED is of the moment of connect(2)
        try:
            self.sock = connect(address, timeout=10)
        finally:
            os.seteuid(mine)
        self.sock.setblocking(False)
        self.rest = b""

    def send(self, data: bytes, fds: list[int]) -> None:
        with suppress(OSError):  # full, or the server has hung up
            send_message(self.sock, (data,), fds)


class Input:
    """What the peers do, from a seed; *sent*: how much of each sort."""

    def __init__(self, seed: int) -> None:
        self.fuzzer = Fuzzer(seed)
        self.dice = self.fuzzer.random
        self.fds = [os.eventfd(0), os.memfd_create("input"), *os.pipe()]
        self.fds += [sock.detach() for sock in socket.socketpair()]
        self.sent: Counter[str] = Counter()

    def close(self) -> None:
        self.fuzzer.close()
        for fd in self.fds:
            os.close(fd)

    def descriptors(self) -> list[int]:
        count = self.dice.choice([0, 0, 0, 0, 1, 1, 2, 3, 9])
        return [self.dice.choice(self.fds) for _ in range(count)]

    def body(self) -> bytes:
        while not self.fuzzer.is_safe(body := self.fuzzer.body()):
            pass
        return body

    def act(self, peer: Peer) -> None:
        act = self.dice.choices(
            [self.frame, self.frames, self.half, self.lie, self.garbage, self.read, self.end],
            [60, 10, 12, 4, 2, 10, 2],
        )[0]
        self.sent[act.__name__] += 1
        act(peer)

    def frame(self, peer: Peer) -> None:
        fds, body = self.descriptors(), self.body()
        if self.dice.random() < 0.3:
            body = m.encode(m.Register(f"fuzz/{self.dice.randrange(4)}", KIND, replace=True))
        peer.send(header(len(body), len(fds), self.dice.randrange(1, 9)) + body, fds)

    def frames(self, peer: Peer) -> None:
        """Many in one read."""
        data = b""
        for _ in range(self.dice.randrange(2, 40)):
            body = self.body()
            data += header(len(body), 0, self.dice.randrange(1, 9)) + body
        peer.send(data, [])

    def half(self, peer: Peer) -> None:
        """Some bytes of a frame, with its descriptors, or some more of them."""
        fds: list[int] = []
        if not peer.rest:
            fds, body = self.descriptors(), self.body()
            peer.rest = header(len(body), len(fds), 1) + body
        cut = self.dice.randrange(1, len(peer.rest) + 1)
        peer.send(peer.rest[:cut], fds)
        peer.rest = peer.rest[cut:]

    def lie(self, peer: Peer) -> None:
        """Another count or length than what comes."""
        fds, body = self.descriptors(), self.body()
        length = len(body) + self.dice.choice([0, 0, -1, 1, 70_000, 1 << 20])
        count = len(fds) + self.dice.choice([-1, 1, 2, 250])
        peer.send(header(max(length, 0), max(count, 0), 1) + body, fds)

    def garbage(self, peer: Peer) -> None:
        peer.send(self.fuzzer.broken_frame(), self.descriptors())

    def read(self, peer: Peer) -> None:
        with suppress(OSError):
            # Descriptors that come are closed by the kernel: there is no room for them.
            peer.sock.recv(self.dice.choice([1, 100, 1 << 20]))

    def end(self, peer: Peer) -> None:
        if self.dice.random() < 0.5:
            with suppress(OSError):
                peer.sock.shutdown(self.dice.choice([socket.SHUT_RD, socket.SHUT_WR]))
        else:
            peer.sock.close()


class Errors(logging.Handler):
    """What the server says went wrong in it."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def errors() -> Iterator[list[str]]:
    handler, log = Errors(), logging.getLogger("fdshare.server")
    log.addHandler(handler)
    yield handler.lines
    log.removeHandler(handler)


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    folder.chmod(0o755)
    (folder / "policy").write_text(ANYBODY)
    settings = Settings(
        path=str(folder / "s"), keeper=False, mode=0o666, policy=str(folder / "policy")
    )
    with listen(settings.path, mode=0o666) as listener:
        server = Server(listener.socket, settings)
        yield server
        server.shut_down()


def turn(server: Server) -> None:
    """One turn of its loop, which does not wait."""
    server.loop.post(lambda: None)
    server.loop.turn()


def until(server: Server, condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        turn(server)


def asked(server: Server, peer: Peer, request: m.Request) -> Any:
    """The last part of the answer of the server that is turned meanwhile."""
    receiver: Receiver[int] = Receiver()
    body = m.encode(request)
    peer.send(header(len(body), 0, 77) + body, [])
    replies: list[Any] = []

    def answered() -> bool:
        with suppress(BlockingIOError):
            frames = receiver.feed(peer.sock.recv(1 << 16))
            replies.extend(m.decode_reply(frame.body) for frame in frames if frame.id == 77)
        if receiver.failure is not None:
            raise ProtocolError(receiver.failure.reason)
        return bool(replies) and not getattr(replies[-1], "more", False)

    until(server, answered, f"an answer to {request}")
    return replies[-1]


def check_accounts(server: Server) -> None:
    """Each account is the sum of what it counts."""
    loop, table = server.loop, server.table
    for user in loop.users.values():
        mine = [c for c in loop.connections if c.session.user is user]
        assert user.connections == len(mine)
        assert user.received == sum(c.received for c in mine)
        assert user.in_flight == sum(c.in_flight for c in mine)
        assert user.buffered == sum(c.buffered for c in mine)
        assert user.watches == sum(len(c.session.watches) for c in mine)
    assert loop.intake.received == sum(user.received for user in loop.users.values())
    assert loop.in_flight.total == sum(user.in_flight for user in loop.users.values())
    assert loop.buffers.total == sum(user.buffered for user in loop.users.values())
    assert table.descriptors == sum(len(e.all_handles()) for e in table.entries.values())
    for uid in UIDS:
        used = [usage_of(entry, uid) for entry in table.entries.values()]
        total = Usage(sum(u.names for u in used), sum(u.descriptors for u in used))
        assert table.usage(uid) == total


def check_nothing_is_left(server: Server) -> None:
    """Of connections that have ended."""
    loop, service = server.loop, server.service
    for kept in (loop.connections, loop.users, loop.idle, loop._slow, loop._throttled):
        assert not kept
    for waiting in (loop._stalled, loop.queue, service._waiting, server._inspections._open):
        assert not waiting
    assert not service._watchers.count
    assert loop.intake.received == loop.in_flight.total == loop.buffers.total == 0


@pytest.mark.timeout(600)
def test_any_input(
    server: Server,
    errors: list[str],
    seed: int,
    times: Callable[[int], int],
    counted: dict[str, Any],
) -> None:
    made, rounds = Input(seed), 0
    wanted = times(times(10_000))  # a million in the long run
    turn(server)
    before = census()
    try:
        while made.sent.total() < wanted:
            rounds += 1
            one_round(server, made)
            assert census() == before
    finally:
        made.close()
    counted.update({"inputs": made.sent.total(), "rounds": rounds, **made.sent})
    counted.update(server.service.counters)
    assert errors == []


def one_round(server: Server, made: Input) -> None:
    """Some connections from their beginnings to their ends, and then all is as before."""
    loop, closer = server.loop, server.loop.closer
    peers = [Peer(str(server.settings.path), made.dice.choice(UIDS)) for _ in range(4)]
    for peer in peers:
        if made.dice.random() < 0.9:
            hello = m.encode(m.Hello(m.MAGIC, m.VERSION, made.dice.choice(["", "one", "two"])))
            peer.send(header(len(hello), 0, 0) + hello, [])
    for _ in range(made.dice.randrange(10, 80)):
        made.act(made.dice.choice(peers))
        for _ in range(made.dice.randrange(3)):
            turn(server)
    check_accounts(server)
    for peer in peers:
        peer.sock.close()
    until(server, lambda: not loop.connections, "the end of the connections")
    good = Peer(str(server.settings.path), UIDS[0])
    hello = m.encode(m.Hello(m.MAGIC, m.VERSION, ""))
    good.send(header(len(hello), 0, 0) + hello, [])
    assert type(asked(server, good, m.Ping())) is m.Done
    for name in asked(server, good, m.Names()).names:
        assert type(asked(server, good, m.Unregister(name))) is m.Done
    good.sock.close()
    until(server, lambda: not loop.connections and not server._inspections._open, "its end")
    until(server, lambda: not closer.owners(), "what was let go of to be closed")
    check_nothing_is_left(server)
    assert not server.table.entries
    assert not server.table.leases
    assert not server.table._usage
