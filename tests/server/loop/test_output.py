"""output: what a client can leave unread, and how connections end."""

from __future__ import annotations

import fcntl
import gc
import socket
import sys
import termios
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from barepeer import Peer
from breaking import Wire, leave_unread, lingering_pair, reset
from conftest import Watched, census

from fdshare.client.blocking.client import Client
from fdshare.manager import Manager
from fdshare.protocol import messages as m
from fdshare.protocol.framing import Frame, header
from fdshare.server.core.ports import Session
from fdshare.server.loop.connection import Connection
from fdshare.server.loop.server import Server
from fdshare.server.settings import Settings


def test_nobody_waits_for_the_close_of_what_was_not_read(server: Watched) -> None:
    """A descriptor that lies unread in the socket of a client is closed with that socket."""
    sock, peer = lingering_pair(60)
    try:
        with Client(server.address, timeout=10) as client:
            leave_unread(server.address, server.pid, sock)
            client.ping()
    finally:
        reset(peer)


KIND = m.Kind("descriptor", msgspec.Raw(b"\xc0"))


def test_requests_whose_answers_are_not_read_wait(server: Any, peer: Peer, null: int) -> None:
    """... and are served when they are: none is forgotten, none twice."""
    with Client(server.address) as client:
        for number in range(50):
            client.register(f"{number:03}" + "x" * 200, null)
        count = 300  # answers of 10 KB each: more than any buffer holds
        peer.write(b"".join(peer.frame(m.Names()) for _ in range(count)))
        client.ping()
        for number in range(1, count + 1):
            id, reply, _ = peer.receive()
            assert id == number
            assert len(reply.names) == 50


@pytest.mark.parametrize("verb", ["replace", "unregister"])
def test_an_answer_that_is_out_of_date_is_not_kept(
    serve: Callable[..., Manager], until: Callable[..., Any], verb: str
) -> None:
    """Its client does not read, and would keep the descriptors of what is gone open."""
    manager = serve(limits={"in_flight_per_connection": 100})
    with (
        Client(manager.address) as client,
        Peer(manager.address) as deaf,
        Wire(manager.address) as wire,
    ):
        wire.ask(1, m.Register("x", KIND), [0] * 60)
        for _ in range(2):  # the second answer has to wait until the first one was read
            deaf.send(m.Fetch("x"))
        wire.ask(2, m.Ping())
        held = len(census(client.stats().server_pid))
        if verb == "replace":
            wire.ask(3, m.Register("x", KIND, replace=True), [0])
        else:
            wire.ask(3, m.Unregister("x"))
        left = verb == "replace"
        # Its connection is closed, too.
        until(lambda: len(census(client.stats().server_pid)) == held - 60 - 1 + left)


def test_an_answer_longer_than_the_output_limit(serve: Callable[..., Manager], null: int) -> None:
    """What a client asked for and reads is sent, however long it is."""
    manager = serve(limits={"max_output": 100_000})
    with Client(manager.address) as client:
        for number in range(4000):
            client.register(f"{number:04}" + "x" * 200, null)
        assert len(client.names()) == 4000
        assert len(client.infos()) == 4000


def test_a_half_sent_request_and_an_unread_answer_time_out(
    serve: Callable[..., Manager], null: int, until: Callable[..., Any]
) -> None:
    manager = serve(limits={"request_timeout": 0.3})
    with (
        Client(manager.address) as client,
        Peer(manager.address) as idle,
        Peer(manager.address) as half,
        Peer(manager.address) as deaf,
        Peer(manager.address, hello=False) as silent,
        Peer(manager.address) as waiting,
    ):
        for number in range(50):
            client.register(f"{number:03}" + "x" * 200, null)
        half.write(half.frame(m.Register("half", KIND), 1)[:20], [null])
        waiting.send(m.Fetch("later", wait=60))
        deaf.write(b"".join(deaf.frame(m.Names()) for _ in range(200)))
        until(lambda: client.stats().connections == 3, "three of six to be dropped")
        for slow in (half, silent):
            with pytest.raises((EOFError, ConnectionResetError)):
                slow.receive()
        assert type(idle.ask(m.Ping())) is m.Done
        client.register("later", null)
        _, reply, (descriptor,) = waiting.receive()
        descriptor.close()
        assert type(reply) is m.Given


def test_a_slow_reader_of_descriptors_harms_nobody(
    serve: Callable[..., Manager], null: int, until: Callable[..., Any]
) -> None:
    """Never more than the budget is in flight, and all arrives in the end."""
    manager = serve(limits={"in_flight_per_connection": 20, "in_flight": 50})
    with Client(manager.address) as client, Peer(manager.address) as slow:
        client.register("x", null)
        # In one piece: a hundred would not all find room while the server does not read.
        slow.write(b"".join(slow.frame(m.Fetch("x")) for _ in range(100)))
        until(lambda: client.stats().in_flight >= 20, "the budget to be used")
        for _ in range(100):
            client.fetch("x").close()
            assert client.stats().in_flight <= 21
        for number in range(1, 101):
            id, reply, (descriptor,) = slow.receive()
            descriptor.close()
            assert (id, type(reply)) == (number, m.Given)
        assert type(slow.ask(m.Ping())) is m.Done


def unread(sock: socket.socket) -> int:
    """How many bytes of a socket can be read."""
    count = bytearray(4)
    fcntl.ioctl(sock, termios.FIONREAD, count)
    return int.from_bytes(count, sys.byteorder)


def test_who_was_idle_for_long_has_his_time_to_read(
    serve: Callable[..., Manager], null: int, until: Callable[..., Any]
) -> None:
    """The clock of a slow reader starts when he is sent more than fits, not when he last asked."""
    manager = serve(limits={"request_timeout": 3.0})
    with Client(manager.address) as client, Peer(manager.address) as idle:
        idle.send(m.Watch("*"))
        assert type(idle.receive()[1]) is m.SnapshotPart
        client.register("x", null, ttl=3.2)
        until(lambda: "x" not in client.names())
        name = "y" * 255
        held = -1
        while unread(idle.sock) > held:  # until it holds no more
            held = unread(idle.sock)
            for _ in range(20):
                client.register(name, null, replace=True)
        last = client.register("z", null).generation
        while getattr(event := idle.receive()[1], "generation", None) != last:
            assert type(event) is m.Event


def test_the_budget_of_all(serve: Callable[..., Manager], null: int) -> None:
    """Slow readers together cannot stop a quick one for longer than they may be slow, and it is
    not taken for one of them."""
    limits = {"in_flight_per_connection": 20, "in_flight": 50, "request_timeout": 0.5}
    manager = serve(limits=limits)
    with Client(manager.address) as client:
        client.register("x", null)
        slow = [Peer(manager.address) for _ in range(4)]
        try:
            for peer in slow:
                peer.write(b"".join(peer.frame(m.Fetch("x")) for _ in range(30)))
            quick = slow[0]
            for _ in range(30):
                _, _, (descriptor,) = quick.receive()
                descriptor.close()
            assert type(quick.ask(m.Ping())) is m.Done
            client.fetch("x").close()
        finally:
            for peer in slow:
                peer.close()


def test_entries_larger_than_the_budget(serve: Callable[..., Manager], null: int) -> None:
    manager = serve(limits={"in_flight_per_connection": 10, "in_flight": 20})
    with Peer(manager.address) as peer:
        peer.ask(m.Register("big", KIND), [null] * 100)
        for _ in range(3):
            peer.send(m.Fetch("big"))
        for _ in range(3):
            _, _, descriptors = peer.receive()
            assert len(descriptors) == 100
            for descriptor in descriptors:
                descriptor.close()


def test_what_a_dropped_client_left_is_free_at_once(folder: Path) -> None:
    """Without a garbage collection: nothing of a connection refers to itself."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "s"))
    listener.listen()
    server = Server(listener, Settings(path=str(folder / "s"), keeper=False, log_level="CRITICAL"))
    half = header(100_000, 0, 1) + bytes(90_000)
    leave: list[Callable[[Peer], None]] = [
        lambda peer: peer.write(half),
        lambda peer: peer.write(b"garbage that is no header"),
        lambda peer: peer.write(peer.frame(m.Ping()) + half),
        lambda peer: peer.write(peer.frame(b"no request")),
        lambda peer: peer.write(peer.frame(m.Fetch("")) + peer.frame(m.Fetch("absent", 60.0))),
        lambda peer: peer.write(peer.frame(m.Watch()) + peer.frame(m.Unregister("absent"))),
        lambda peer: peer.write(b"".join(peer.frame(m.Stats()) for _ in range(1000))),
    ]

    def attack() -> None:
        for greeted in (False, True):
            for leave_behind in leave:
                with Peer(str(folder / "s"), hello=greeted) as peer, suppress(OSError):
                    leave_behind(peer)
        server.loop.post(server.stop)

    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        thread = threading.Thread(target=attack)
        thread.start()
        server.run()
        thread.join()
        gc.collect()
        kept = [each for each in gc.garbage if isinstance(each, Connection | Session | Frame)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
        server.shut_down()
        listener.close()
    assert server.loop.acceptor.accepted == 14
    assert kept == []
