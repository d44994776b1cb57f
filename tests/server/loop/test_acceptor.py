"""acceptor: who is let in, with which greeting, when the server is full, and when it has no
descriptor left."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from barepeer import Peer
from breaking import Wire
from nursery import Manager
from users import ANYBODY

from fdshare.client.blocking.client import Client
from fdshare.errors import (
    QuotaExceeded,
    ServerGone,
)
from fdshare.kernel.endpoint import connect, listen
from fdshare.protocol import messages as m
from fdshare.protocol.framing import header
from fdshare.server.loop import acceptor, closing, lanes
from fdshare.server.loop.poller import READ
from fdshare.server.loop.server import Server
from fdshare.server.settings import Settings
from server.full import fill_gaps, limited, server_pid

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be other users")


@contextmanager
def user(uid: int) -> Iterator[None]:
    """Who connects meanwhile is *uid* to the server: SO_PEERCRED is of the moment of connect(2)."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


def waiting(path: str, uid: int) -> Wire:
    """A client of *uid* that waits for a name, and so is not idle."""
    with user(uid):
        wire = Wire(path, f"{uid}")
    wire.send(1, m.Fetch("never", 60.0))
    return wire


@needs_root
def test_the_last_place_is_for_an_administrator(folder: Path) -> None:
    folder.chmod(0o755)
    limits = {"max_connections": 4, "max_connections_per_uid": 3}
    policy = folder / "policy"
    policy.write_text('[[rule]]\neffect = "allow"\nverbs = ["fetch"]\n')
    with Manager(folder / "s", mode=0o666, policy=policy, limits=limits) as manager:
        crowd = [waiting(manager.address, uid) for uid in (1501, 1502, 1503)]
        with user(1504):
            refused = Wire(manager.address, greet=False)
        said = refused.receive().reply
        assert isinstance(said, m.Refused)
        assert repr(m.refusal_error(said)) == repr(QuotaExceeded("max_connections", 4, 3))
        assert manager.stats().connections == 4
        for wire in (*crowd, refused):
            wire.close()


@needs_root
def test_who_has_all_that_it_may_have_open_gets_a_connection_for_an_idle_one(
    folder: Path, null: int
) -> None:
    """Its first one it gets in any case: with that it can remove something."""
    folder.chmod(0o755)
    (folder / "policy").write_text(ANYBODY)
    options = {"mode": 0o666, "policy": folder / "policy", "limits": {"max_open_per_uid": 6}}
    with Manager(folder / "s", **options) as manager:
        manager.ping()
        with user(1501), Client(manager.address) as first:
            for number in range(5):
                first.register(f"{number}", null)
            with Client(manager.address) as second:
                assert second.stats().connections == 2  # the manager's, and one of this user's
                assert first.names() == second.names()


def refused(reply: Any, code: str) -> m.Refused:
    assert type(reply) is m.Refused, reply
    assert reply.code == code, reply
    return reply


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (m.Ping(), "protocol_error"),
        (m.Hello("ftp", m.VERSION, ""), "protocol_error"),
        (m.Hello(m.MAGIC, m.VERSION + 1, ""), "version_mismatch"),
        (m.Prove(b"x"), "protocol_error"),
    ],
    ids=["none", "magic", "version", "prove"],
)
def test_greetings_that_are_none(server: Any, said: Any, code: str) -> None:
    with Peer(server.address, hello=False) as peer:
        peer.send(said)
        assert peer.expelled().code == code


def test_a_greeting_of_a_newer_version_says_which(server: Any) -> None:
    with Peer(server.address, hello=False) as peer:
        peer.send(m.Hello(m.MAGIC, m.VERSION + 1, ""))
        assert peer.expelled().fields == {"theirs": m.VERSION + 1, "ours": m.VERSION}


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x80", m.encode(m.Done())], ids=str)
def test_a_greeting_that_cannot_be_read(server: Any, body: bytes) -> None:
    with Peer(server.address, hello=False) as peer:
        peer.write(header(len(body), 0, 0) + body)
        assert peer.expelled() is not None or peer.ask(m.Ping())


def test_a_second_greeting(peer: Peer) -> None:
    refused(peer.ask(m.Hello(m.MAGIC, m.VERSION, "again")), "invalid_argument")
    assert type(peer.ask(m.Ping())) is m.Done


Serve = Callable[..., Manager]


KIND = m.Kind("descriptor", msgspec.Raw(b"\xc0"))


def test_a_full_door(serve: Serve) -> None:
    """The longest idle one goes, and does not even notice."""
    manager = serve(limits={"max_connections": 4})
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(manager.address)) for _ in range(10)]
        for client in clients:
            client.ping()
        for client in clients:
            client.ping()
        stats = clients[0].stats()
        assert stats.connections <= 4
        assert stats.counters["evicted"] >= 10


def test_who_waits_goes_last(serve: Serve, null: int) -> None:
    manager = serve(limits={"max_connections": 4})
    with Peer(manager.address) as waiting, Peer(manager.address) as watching:
        waiting.send(m.Fetch("x", wait=60))
        watching.send(m.Watch())
        assert type(watching.receive()[1]) is m.SnapshotPart
        for _ in range(20):
            with Peer(manager.address) as passing:
                passing.ask(m.Ping())
                with Client(manager.address) as client:
                    client.ping()
        with Client(manager.address) as client:
            client.register("x", null)
            _, _, (descriptor,) = waiting.receive()
            descriptor.close()
            assert watching.receive()[1].event == "registered"


def test_an_evicted_client_repeats(serve: Serve, null: int) -> None:
    """Two that wait and one that knocks, at a door for two: all get what they want in the end."""
    manager = serve(limits={"max_connections": 3})
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(manager.address, reconnect=20)) for _ in range(6)]
        for number, client in enumerate(clients):
            client.register(f"{number}", null)
        for number, client in enumerate(clients):
            client.take(f"{number}").close()
        assert clients[0].names() == []


@pytest.mark.parametrize("evicts", [True, False])
def test_an_answer_that_waits_for_a_close_is_not_forgotten(
    folder: Path, monkeypatch: pytest.MonkeyPatch, evicts: bool
) -> None:
    """Its client is not idle, and where it goes by itself, it may repeat the request."""
    for module, seconds in ((lanes, "_STUCK"), (closing, "_PATIENCE")):
        monkeypatch.setattr(module, seconds, 600.0)  # it waits as long as the test has it wait
    path = str(folder / "s")
    with listen(path) as listener, ExitStack() as stack:
        limits = {"max_connections": 2}
        server = Server(listener.socket, Settings(path=path, keeper=False, limits=limits))
        stack.callback(server.shut_down)
        stack.callback(server.run)
        stack.callback(server.stop)

        def join(session: str) -> Wire:
            wire = stack.enter_context(Wire(path, greet=False))
            wire.send(0, m.Hello(m.MAGIC, m.VERSION, session))
            return wire

        file, held = stack.enter_context(open(__file__)), threading.Event()
        stack.callback(held.set)
        other, wire = join("other"), join("wire")
        other.send(1, m.Watch())
        wire.send(1, m.Register("x", KIND), [file.fileno()])
        while "x" not in server.table.entries:
            server.loop.turn()
        server.lanes.put(os.geteuid(), held.wait)  # the close comes after that
        wire.send(2, m.Unregister("x"))
        while "x" in server.table.entries:
            server.loop.turn()
        if evicts:
            join("late")
            while server.loop.acceptor.accepted < 3:
                server.loop.turn()
            held.set()
            while any(each.session.owed for each in server.loop.connections):
                server.loop.turn()
            assert [wire.receive().id for _ in range(3)] == [0, 1, 2]
        wire.close()
        while any(each.session.name == "wire" for each in server.loop.connections):
            server.loop.turn()
        assert list(server.table.answers) == ([] if evicts else ["wire"])


def test_nobody_to_send_away(serve: Serve, null: int) -> None:
    """Those who have not read their answers are not idle."""
    manager = serve(limits={"max_connections": 2, "in_flight_per_connection": 1})
    with Peer(manager.address) as one, Peer(manager.address) as two:
        one.ask(m.Register("x", KIND), [null])
        for busy in (one, two):
            busy.write(b"".join(busy.frame(m.Fetch("x")) for _ in range(5)))
            assert select.select([busy.sock], [], [], 20)[0]  # so the server has read that
        with Client(manager.address, reconnect=0.1) as client:
            with pytest.raises((QuotaExceeded, ServerGone)) as caught:
                client.ping()
            if isinstance(caught.value, QuotaExceeded):
                assert caught.value.fields == {"what": "max_connections", "limit": 2, "used": 2}
        for busy in (one, two):
            for _ in range(5):
                _, _, (descriptor,) = busy.receive()
                descriptor.close()
        with Client(manager.address) as client:
            client.ping()


def test_the_server_cannot_accept(serve: Serve, null: int, until: Callable[..., Any]) -> None:
    """It goes on for those who are there, sends an idle one away, and accepts again; it holds what
    it held."""
    manager = serve()
    with Client(manager.address) as client, ExitStack() as stack:
        client.register("x", null)
        peers = fill_gaps(manager, stack)
        for peer in peers:
            peer.send(m.Fetch("later", wait=60))
            peer.ask(m.Ping())
        with limited(server_pid(manager), 0):
            client.fetch("x").close()
            with Client(manager.address, timeout=20) as late:
                late.ping()  # in the place of an idle one: the first client
            client.fetch("x").close()
            client.ping()
        client.register("later", null)
        for peer in peers:
            _, reply, descriptors = peer.receive()
            for descriptor in descriptors:
                descriptor.close()
            assert type(reply) is m.Given


def test_the_server_cannot_accept_and_nobody_is_idle(
    serve: Serve, null: int, until: Callable[..., Any]
) -> None:
    manager = serve()
    with ExitStack() as stack, Peer(manager.address) as one, Client(manager.address) as client:
        client.ping()
        for peer in (one, *fill_gaps(manager, stack)):
            peer.send(m.Fetch("x", wait=60))
            assert type(peer.ask(m.Ping())) is m.Done
        with limited(server_pid(manager), 0):
            late = socket.socket(socket.AF_UNIX)
            late.connect(manager.address)
            client.ping()
            client.ping()
        late.close()
        with Client(manager.address) as other:
            other.register("x", null)
        _, _, (descriptor,) = one.receive()
        descriptor.close()


def test_many_that_connect_are_accepted_in_many_turns(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptor, "SLICE", 0.0)  # there is time for one in a turn
    path = str(folder / "s")
    with listen(path) as listener, ExitStack() as stack:
        server = Server(listener.socket, Settings(path=path, keeper=False))
        for _ in range(10):
            stack.enter_context(connect(path))
        for count in range(1, 11):
            server.loop.turn()
            assert len(server.loop.connections) == count
        stack.enter_context(connect(path))
        ready, waker = os.pipe()
        os.write(waker, b"x")
        seen: list[int] = []

        def look(events: int, now: float) -> None:
            seen.append(len(server.loop.connections))

        server.loop.poller.register(ready, READ, look)
        server.loop.turn()
        assert seen == [10]  # first comes who is there already
        assert len(server.loop.connections) == 11
        server.loop.poller.unregister(ready)
        os.close(ready)
        os.close(waker)
        server.stop()
        assert not server.run()
        server.shut_down()
