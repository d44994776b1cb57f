"""How long entries live, and what becomes of those that somebody takes; over real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from barepeer import Peer

from fdshare.client.blocking.client import Client
from fdshare.errors import FetchTimeout, GenerationMismatch, NameNotFound, NameTaken
from fdshare.manager import Manager
from fdshare.protocol import messages as m

Child = Callable[..., "subprocess.Popen[str]"]
KIND = m.Kind("descriptor", msgspec.Raw(b"\xc0"))

REGISTER = """
    import os, sys
    from fdshare.client.blocking.client import Client
    client = Client(sys.argv[1])
    reading, writing = os.pipe()
    client.register(sys.argv[2], reading, lifetime=sys.argv[3], grace=float(sys.argv[4]))
    print("registered", flush=True)
    if sys.stdin.readline() == "close\\n":
        client.close()
        print("closed", flush=True)
        sys.stdin.readline()
"""


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    with socket.socket() as sock:
        yield sock


def registered(child: Child, server: Any, name: str, lifetime: str, grace: float = 0.0) -> Any:
    process = child(REGISTER, server.address, name, lifetime, grace)
    assert process.stdout.readline() == "registered\n"
    return process


# Lifetimes


def test_server_outlives_the_registrant(server: Any, client: Client, child: Child) -> None:
    registered(child, server, "x", "server").kill()
    client.fetch("x").close()


@pytest.mark.parametrize("lifetime", ["connection", "process"])
def test_the_process_dies(
    server: Any, client: Client, child: Child, until: Callable[..., Any], lifetime: str
) -> None:
    process = registered(child, server, "x", lifetime)
    assert client.names() == ["x"]
    process.kill()
    until(lambda: client.names() == [], "the entry to go")


def test_a_zombie_is_dead(
    server: Any, client: Client, child: Child, until: Callable[..., Any]
) -> None:
    process = registered(child, server, "x", "process")
    os.kill(process.pid, signal.SIGKILL)  # and not waited for
    until(lambda: client.names() == [], "the entry to go")


def test_a_closed_client(
    server: Any, client: Client, child: Child, until: Callable[..., Any]
) -> None:
    """ends the connection's entries, not the process's."""
    ends = registered(child, server, "connection", "connection")
    stays = registered(child, server, "process", "process")
    for process in (ends, stays):
        process.stdin.write("close\n")
        process.stdin.flush()
        assert process.stdout.readline() == "closed\n"
    until(lambda: client.names() == ["process"], "the connection's entry to go")


def test_a_connection_that_is_lost_is_not_the_client_s_end(
    server: Any, client: Client, sock: socket.socket
) -> None:
    """The lifeline is another socket: the idle connections come and go."""
    with Client(server.address) as owner:
        owner.register("x", sock, lifetime="connection")
        for channel in owner._idle:
            channel.close()
        client.ping()
        assert client.names() == ["x"]
        owner.ping()


def test_a_forked_child_is_not_its_parent(
    server: Any, client: Client, sock: socket.socket, until: Callable[..., Any]
) -> None:
    """A child that lives longer does not keep the parent's entries, nor end them by ending."""
    reading, writing = os.pipe()
    with Client(server.address) as owner:
        owner.register("x", sock, lifetime="connection")
        ends = os.fork()
        if not ends:
            os._exit(0)
        os.waitpid(ends, 0)
        lives = os.fork()
        if not lives:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
        assert client.names() == ["x"]
    until(lambda: client.names() == [], "the entry to go")
    os.close(writing)
    os.waitpid(lives, 0)
    os.close(reading)


@pytest.mark.parametrize("lifetime", ["connection", "process"])
def test_grace(
    server: Any, client: Client, child: Child, until: Callable[..., Any], lifetime: str
) -> None:
    process = registered(child, server, "x", lifetime, 0.3)
    assert client.info("x").ttl is None
    process.kill()
    ended = time.monotonic()
    until(lambda: client.names() == [], "the entry to go")
    assert time.monotonic() - ended >= 0.3


def test_a_successor_within_the_grace(
    server: Any, client: Client, child: Child, sock: socket.socket, until: Callable[..., Any]
) -> None:
    process = registered(child, server, "x", "process", 1000)
    process.kill()
    until(lambda: client.info("x").ttl is not None, "the grace to begin")
    client.fetch("x").close()
    client.register("x", sock, replace=True)
    assert client.info("x").ttl is None


def test_ttl(client: Client, sock: socket.socket, until: Callable[..., Any]) -> None:
    start = time.monotonic()
    for name in ("a", "b", "c"):
        client.register(name, sock, ttl=0.2)
    client.register("stays", sock, ttl=1e9)
    until(lambda: client.names() == ["stays"], "three entries to expire")
    assert time.monotonic() - start >= 0.2
    with pytest.raises(NameNotFound):
        client.fetch("a")
    assert client.stats().counters["expired"] >= 3


def test_a_replacement_has_its_own_ttl(
    client: Client, sock: socket.socket, until: Callable[..., Any]
) -> None:
    client.register("x", sock, ttl=0.05)
    client.register("x", sock, replace=True)
    client.register("y", sock, ttl=0.1)
    until(lambda: client.names() == ["x"], "the other to expire")


# Hanging up


def test_drop_on_hangup(client: Client, until: Callable[..., Any]) -> None:
    here, there = socket.socketpair()
    reading, writing = os.pipe()
    with here, there:
        client.register("sock", here, drop_on_hangup=True)
        client.register("stays", here)
        client.register("pipe", reading, drop_on_hangup=True)
        os.close(reading)
        there.send(b"data are no hang-up")
        os.write(writing, b"nor are they in a pipe")
        client.ping()
        assert client.names() == ["pipe", "sock", "stays"]
        os.close(writing)
        until(lambda: client.names() == ["sock", "stays"], "the pipe to go")
        there.close()
        until(lambda: client.names() == ["stays"], "the socket to go")


def test_drop_on_hangup_of_a_pidfd(client: Client, child: Child, until: Callable[..., Any]) -> None:
    process = child("input()")
    pidfd = os.pidfd_open(process.pid)
    client.register("pidfd", pidfd, drop_on_hangup=True)
    os.close(pidfd)
    assert client.names() == ["pidfd"]
    process.kill()
    until(lambda: client.names() == [], "the pidfd to go")


def test_drop_on_hangup_of_what_cannot(client: Client, folder: Any) -> None:
    with open(folder / "file", "w") as file, open(os.devnull) as null:
        client.register("file", file, drop_on_hangup=True)
        client.register("null", null, drop_on_hangup=True)
    assert client.names() == ["file", "null"]
    client.fetch("file").close()


def test_hung_up_before_it_is_registered(client: Client, until: Callable[..., Any]) -> None:
    here, there = socket.socketpair()
    there.close()
    with here:
        client.register("x", here, drop_on_hangup=True)
    until(lambda: client.names() == [], "the entry to go")


# Leases


def leased(peer: Peer, name: str = "x") -> Any:
    """Takes *name* and says nothing: (the entry's descriptor, the lease)."""
    peer.send(m.Take(name))
    _, reply, (mine, lease) = peer.receive()
    assert reply.lease
    return mine, lease


def test_a_leased_entry_is_hidden(peer: Peer, client: Client, sock: socket.socket) -> None:
    generation = client.register("x", sock).generation
    mine, lease = leased(peer)
    with mine, lease:
        assert client.names() == []
        assert "x" not in client
        assert client.info("x").leased
        assert client.stats().leases == 1
        for verb in (client.fetch, client.take):
            with pytest.raises(NameNotFound):
                verb("x")
            with pytest.raises(FetchTimeout):
                verb("x", timeout=0.01)
        with pytest.raises(NameNotFound):
            client.fetch_many(["x"])
        with pytest.raises(NameNotFound):
            client.rename("x", "y")
        with pytest.raises(NameTaken):
            client.register("x", sock)
        with pytest.raises(GenerationMismatch):
            client.register("x", sock, if_generation=0)
        with pytest.raises(NameTaken):
            client.bind("x", "tcp://127.0.0.1:0")
    client.fetch("x").close()
    assert client.info("x").generation == generation


def test_a_taker_that_is_killed_gives_back(
    server: Any, client: Client, sock: socket.socket, child: Child
) -> None:
    """Between the answer and the confirmation, by kill -9; the entry is as it was."""
    client.register("x", sock, metadata={"a": "b"})
    before = client.info("x")
    process = child(
        """
        import sys
        from barepeer import Peer
        from fdshare.protocol import messages as m
        peer = Peer(sys.argv[1])
        peer.send(m.Take("x"))
        taken = peer.receive()
        print("taken", flush=True)
        input()
        """,
        server.address,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    assert client.names() == []
    process.kill()
    process.wait()
    client.fetch("x", timeout=20).close()
    after = client.info("x")
    assert (after.generation, after.metadata) == (before.generation, before.metadata)


def test_a_confirmed_take_never_comes_back(peer: Peer, client: Client, sock: socket.socket) -> None:
    client.register("x", sock)
    mine, lease = leased(peer)
    with mine, lease:
        os.write(lease.fileno(), b"\1")
    peer.close()
    assert client.names() == []
    client.register("x", sock)


def test_a_waiter_gets_what_is_given_back(
    server: Any, peer: Peer, client: Client, sock: socket.socket
) -> None:
    client.register("x", sock)
    mine, lease = leased(peer)
    with Peer(server.address) as waiting:
        waiting.send(m.Take("x", wait=60))
        waiting.ask(m.Ping())
        mine.close()
        lease.close()
        _, reply, descriptors = waiting.receive()
        assert reply.lease
        for descriptor in descriptors:
            descriptor.close()
    client.take("x", timeout=20).close()


@pytest.mark.parametrize("change", ["replace", "unregister", "if_generation"])
def test_a_revoked_lease_cannot_be_confirmed(
    peer: Peer, client: Client, sock: socket.socket, change: str
) -> None:
    generation = client.register("x", sock).generation
    mine, lease = leased(peer)
    with mine, lease:
        if change == "replace":
            client.register("x", sock, replace=True)
        elif change == "unregister":
            client.unregister("x")
        else:
            client.register("x", sock, if_generation=generation)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            os.write(lease.fileno(), b"\1")
    assert client.names() == ([] if change == "unregister" else ["x"])


@pytest.mark.parametrize("change", ["replace", "unregister"])
def test_confirmed_before_it_could_be_revoked(
    peer: Peer, client: Client, sock: socket.socket, change: str
) -> None:
    """The byte was written, nobody has looked yet: it is the taker's."""
    client.register("x", sock)
    mine, lease = leased(peer)
    with mine, lease:
        os.write(lease.fileno(), b"\1")
        if change == "replace":
            client.register("x", sock)  # the name is free
            assert client.names() == ["x"]
        else:
            with pytest.raises(NameNotFound):
                client.unregister("x")


def test_a_lease_held_too_long_ends(
    serve: Callable[..., Manager], sock: socket.socket, until: Callable[..., Any]
) -> None:
    manager = serve(limits={"lease_timeout": 0.1})
    with Client(manager.address) as client, Peer(manager.address) as peer:
        client.register("x", sock)
        mine, lease = leased(peer)
        with mine, lease:
            until(lambda: client.names() == ["x"], "the entry to be back")
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                os.write(lease.fileno(), b"\1")


def test_the_blocking_client_takes_again_what_was_revoked(
    server: Any, client: Client, sock: socket.socket
) -> None:
    """Many takers and one that replaces at the same time: whoever returns has the entry alone."""
    client.register("x", sock)
    for _ in range(50):
        with client.take("x", timeout=20):
            client.register("x", sock)
    assert client.names() == ["x"]


def test_a_lease_and_a_dying_owner(
    server: Any, peer: Peer, client: Client, child: Child, until: Callable[..., Any]
) -> None:
    """The owner's end revokes the lease; with a grace it does not."""
    for grace in (0.0, 1000.0):
        process = registered(child, server, "x", "process", grace)
        mine, lease = leased(peer)
        with mine, lease:
            process.kill()
            if grace:
                until(lambda: client.info("x").ttl is not None, "the grace to begin")
                os.write(lease.fileno(), b"\1")
            else:
                until(lambda: client.infos() == [], "the entry to go")
                with pytest.raises((BrokenPipeError, ConnectionResetError)):
                    os.write(lease.fileno(), b"\1")
        assert client.names() == []
