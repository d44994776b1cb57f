"""No descriptors left, on each side, and too many in flight: errors, and nothing is lost."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from barepeer import Peer
from conftest import wait_until
from nursery import Manager

from fdshare.client.blocking.client import Client
from fdshare.errors import (
    DescriptorLimit,
    NameNotFound,
)
from fdshare.protocol import messages as m
from server.full import fill_gaps, limited, server_pid

KIND = m.Kind("descriptor", msgspec.Raw(b"\xc0"))
Serve = Callable[..., Manager]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")


# No descriptors left: in the server


def test_the_server_cannot_receive(serve: Serve, null: int) -> None:
    """The client is told whose limit it is; nothing is changed, nothing is lost, nothing leaks."""
    manager = serve()
    with Client(manager.address) as client, Peer(manager.address) as peer:
        client.register("x", null)
        with limited(server_pid(manager), 2):
            with pytest.raises(DescriptorLimit) as caught:
                peer_register(peer, "many", [null] * 5)
            assert caught.value.whose == "server"
            assert caught.value.what == "RLIMIT_NOFILE"
            assert caught.value.errno == errno.EMFILE
            client.fetch("x").close()
            assert client.names() == ["x"]
            # What came with the refused request is closed soon; until then it takes its place.
            wait_until(lambda: registered(client, "one", null))
        peer_register(peer, "many", [null] * 5)
        assert client.names() == ["many", "one", "x"]


def registered(client: Client, name: str, fd: int) -> bool:
    try:
        client.register(name, fd)
    except DescriptorLimit:
        return False
    return True


def peer_register(peer: Peer, name: str, fds: list[int]) -> None:
    reply = peer.ask(m.Register(name, KIND), fds)
    if type(reply) is m.Refused:
        raise m.refusal_error(reply)


def test_the_server_cannot_make_a_lease_or_a_pidfd(serve: Serve, null: int) -> None:
    manager = serve()
    with Client(manager.address) as client:
        client.register("x", null)
        client.ping()
        with limited(server_pid(manager), 1):
            with pytest.raises(DescriptorLimit) as caught:
                client.take("x")
            assert caught.value.whose == "server"
            with pytest.raises(DescriptorLimit) as caught:
                client.register("y", null, lifetime="process")
            assert caught.value.whose == "server"
            with pytest.raises(DescriptorLimit) as caught:
                client.bind("z", "tcp://127.0.0.1:0").close()
                client.bind("zz", "tcp://127.0.0.1:0")
            assert caught.value.whose == "server"
        client.take("x").close()


def test_no_lease_for_one_who_waits(serve: Serve, null: int) -> None:
    """The one who registers does not suffer, nor the entry."""
    manager = serve()
    with ExitStack() as stack, Peer(manager.address) as peer, Peer(manager.address) as waiting:
        waiting.send(m.Take("x", wait=60))
        waiting.ask(m.Ping())
        fill_gaps(manager, stack)
        with limited(server_pid(manager), 2):
            peer_register(peer, "x", [null])
            assert waiting.receive()[1].code == "descriptor_limit"
        peer.send(m.Fetch("x"))
        _, reply, (descriptor,) = peer.receive()
        descriptor.close()
        assert type(reply) is m.Given


# ... in the client


@contextmanager
def few_descriptors(spare: int) -> Iterator[None]:
    """This process has only so many free descriptors."""
    with limited(os.getpid(), spare):
        yield


def test_the_client_cannot_receive(client: Client, null: int) -> None:
    client.register("x", null)
    client.ping()
    with few_descriptors(0), pytest.raises(DescriptorLimit) as caught:
        client.fetch("x")
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == errno.EMFILE
    assert caught.value.whose == "receiver"
    assert caught.value.what == "RLIMIT_NOFILE"
    assert str(caught.value.limit) in str(caught.value)
    client.fetch("x").close()


def test_the_client_cannot_take(client: Client, null: int) -> None:
    """What it could not receive it has not taken."""
    for spare in (0, 1):
        client.register("x", null)
        client.ping()
        with few_descriptors(spare), pytest.raises(DescriptorLimit):
            client.take("x")
        client.take("x", timeout=20).close()
        with pytest.raises(NameNotFound):
            client.take("x")


def test_the_client_cannot_receive_many(client: Client, null: int) -> None:
    names = [f"{n}" for n in range(20)]
    for name in names:
        client.register(name, null)
    with few_descriptors(10), pytest.raises(DescriptorLimit):
        client.fetch_many(names)
    for fetched in client.fetch_many(names).values():
        fetched.close()


def test_the_client_cannot_connect(server: Any) -> None:
    with Client(server.address) as client:
        with few_descriptors(0), pytest.raises(DescriptorLimit) as caught:
            client.ping()
        assert (caught.value.errno, caught.value.whose) == (errno.EMFILE, "client")
        client.ping()


def test_the_client_cannot_make_a_lifeline(client: Client, null: int) -> None:
    client.ping()
    with few_descriptors(1), pytest.raises(DescriptorLimit) as caught:
        client.register("x", null, lifetime="connection")
    assert (caught.value.errno, caught.value.whose) == (errno.EMFILE, "client")
    client.register("x", null, lifetime="connection")


# ... and in flight


@needs_root
def test_a_server_that_may_have_few_in_flight(
    folder: Path, child: Any, null: int, until: Callable[..., Any]
) -> None:
    """As an ordinary user with a limit of 64, and readers that do not read: another server of the
    same user keeps the kernel's count high (ETOOMANYREFS). All arrives in the end."""
    folder.chmod(0o777)
    address = str(folder / "x.sock")
    process = child(
        """
        import os, resource, signal, socket, sys
        import fdshare.kinds, fdshare.manager
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        os.setgid(12345); os.setuid(12345)
        server = fdshare.manager.Manager(
            sys.argv[1], keeper=False, limits={"in_flight": 1000, "in_flight_per_connection": 1000}
        ).get_server()
        signal.signal(signal.SIGTERM, lambda *args: server.stop())
        print("serving", flush=True)
        server.serve_forever()
        print("ended", flush=True)
        """,
        address,
    )
    assert process.stdout.readline() == "serving\n"
    with Client(address, trust=[12345]) as client, Peer(address) as slow:
        client.register("x", null)
        slow.write(b"".join(slow.frame(m.Fetch("x")) for _ in range(200)))
        until(lambda: client.stats().in_flight >= 60, "the kernel's limit")
        client.ping()
        for _ in range(200):
            _, reply, descriptors = slow.receive()
            assert type(reply) is m.Given
            for descriptor in descriptors:
                descriptor.close()
        client.fetch("x").close()
        client.shutdown()
    assert process.stdout.readline() == "ended\n"


@needs_root
def test_a_client_that_may_have_few_in_flight(serve: Serve, folder: Path, child: Any) -> None:
    """Its own limit is named, and whose it is; then it goes on."""
    folder.chmod(0o755)
    policy = folder / "policy.toml"
    policy.write_text('[[rule]]\nusers = ["*"]\nnames = ["*"]\nverbs = ["*"]\nallow = true\n')
    process = child(
        """
        import array, os, resource, socket, sys
        from barepeer import Peer
        from fdshare.client.blocking.client import Client
        from fdshare.errors import AccessDenied, DescriptorLimit
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        os.setgid(12346); os.setuid(12346)
        a, b = socket.socketpair()
        sent = 0
        try:
            while True:
                socket.send_fds(a, [b"x"], [0] * 8)
                sent += 8
        except OSError as error:
            print(error.errno, flush=True)
        with Client(sys.argv[1]) as client:
            try:
                client.register("x", 0)
            except DescriptorLimit as error:
                print(error.errno, error.whose, error.limit, flush=True)
            for fd in socket.recv_fds(b, 1 << 16, 253)[1]:
                os.close(fd)
            for _ in range(20):
                for fd in socket.recv_fds(b, 1 << 16, 253)[1]:
                    os.close(fd)
                try:
                    client.register("x", 0)
                except AccessDenied as error:
                    print("reached", flush=True)
                    break
                except DescriptorLimit:
                    continue
        """,
        serve(mode=0o666).address,
    )
    assert process.stdout.read().split("\n")[:3] == [
        str(errno.ETOOMANYREFS),
        f"{errno.ETOOMANYREFS} sender 64",
        "reached",
    ]
