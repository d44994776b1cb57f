"""Every limit: at it, one below, one above; and no descriptors left, on each of the three sides."""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from barepeer import Peer
from nursery import Manager

from fdshare.client.blocking.client import Client
from fdshare.errors import (
    DescriptorLimit,
    InvalidArgument,
    NameNotFound,
    QuotaExceeded,
    ServerGone,
)
from fdshare.protocol import messages as m
from fdshare.server.limits import RESERVE, Limits

KIND = m.Kind("descriptor", msgspec.Raw(b"\xc0"))
Serve = Callable[..., Manager]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")


# What follows from RLIMIT_NOFILE


@pytest.mark.parametrize("nofile", [20, 64, 256, 1024, 20_000, 1 << 20])
def test_limits_fit_into_the_process(nofile: int) -> None:
    limits = Limits.for_rlimit(nofile)
    if nofile > 2 * RESERVE:
        assert limits.max_descriptors + limits.max_connections + RESERVE <= nofile
        assert limits.in_flight < nofile / 2
    assert limits.max_names_per_uid <= limits.max_names
    assert limits.in_flight_per_connection <= max(limits.in_flight, 8)
    for number in msgspec.structs.astuple(limits):
        assert number > 0


def test_limits_by_name() -> None:
    limits = Limits.for_rlimit(1024, max_names=7, lease_timeout=0.5)
    assert (limits.max_names, limits.lease_timeout) == (7, 0.5)
    with pytest.raises(InvalidArgument) as caught:
        Limits.for_rlimit(1024, max_nmaes=7)
    assert "max_nmaes" in str(caught.value)


def test_a_limit_that_there_is_not(folder: Path) -> None:
    manager = Manager(folder / "x.sock", keeper=False, limits={"max_fun": 1})
    with pytest.raises(InvalidArgument) as caught:
        manager.start()
    assert "max_fun" in str(caught.value)


# Quotas


def test_max_names(serve: Serve, null: int) -> None:
    with Client(serve(limits={"max_names": 3}).address) as client:
        for name in "abc":
            client.register(name, null)
        for _ in range(2):
            with pytest.raises(QuotaExceeded) as caught:
                client.register("d", null)
            assert caught.value.fields == {"what": "max_names", "limit": 3, "used": 3}
            assert caught.value.errno == errno.EDQUOT
            assert "max_names" in str(caught.value)
        client.register("a", null, replace=True)
        client.rename("a", "e")
        client.unregister("b")
        client.register("d", null)
        with pytest.raises(QuotaExceeded):
            client.bind("f", "tcp://127.0.0.1:0")
        assert client.names() == ["c", "d", "e"]


def test_max_descriptors(serve: Serve, null: int) -> None:
    manager = serve(limits={"max_descriptors": 10})
    with Client(manager.address) as client, Peer(manager.address) as peer:
        peer.ask(m.Register("a", KIND), [null] * 4)
        peer.ask(m.Register("b", KIND), [null] * 5)
        reply = peer.ask(m.Register("c", KIND), [null] * 2)
        assert reply.fields == {"what": "max_descriptors", "limit": 10, "used": 9}
        peer.ask(m.Register("c", KIND), [null])
        assert client.stats().descriptors == 10
        with pytest.raises(QuotaExceeded):
            client.register("d", null)
        assert type(peer.ask(m.Register("a", KIND, replace=True), [null] * 4)) is m.Registered
        assert peer.ask(m.Register("a", KIND, replace=True), [null] * 5).code == "quota_exceeded"
        client.unregister("c")
        with pytest.raises(QuotaExceeded):  # the lifeline, and the pidfd, are descriptors too
            client.register("d", null, lifetime="connection")
        with pytest.raises(QuotaExceeded):
            client.register("d", null, lifetime="process")
        client.register("d", null)
        for descriptor in client.take_raw("b"):  # a full server can be emptied
            descriptor.close()
        client.register("e", null, lifetime="process")


def test_at_the_limit_everything_else_goes_on(serve: Serve, null: int) -> None:
    with Client(serve(limits={"max_names": 2}).address) as client:
        client.register("a", null)
        client.register("b", null)
        assert client.names() == ["a", "b"]
        assert len(client.infos()) == 2
        client.fetch("a").close()
        client.rename("a", "c")
        client.take("c").close()
        client.unregister("b")
        client.ping()


# The door


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


def test_nobody_to_send_away(serve: Serve, null: int) -> None:
    """Those who have not read their answers are not idle."""
    manager = serve(limits={"max_connections": 2, "in_flight_per_connection": 1})
    with Peer(manager.address) as one, Peer(manager.address) as two:
        one.ask(m.Register("x", KIND), [null])
        for busy in (one, two):
            busy.write(b"".join(busy.frame(m.Fetch("x")) for _ in range(5)))
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


# No descriptors left: in the server


def numbers(pid: int) -> set[int]:
    """The descriptors of *pid*, without the one that is open for this listing."""
    listed = os.listdir(f"/proc/{pid}/fd")
    return {int(number) for number in listed if os.path.lexists(f"/proc/{pid}/fd/{number}")}


@contextmanager
def limited(pid: int, spare: int) -> Iterator[None]:
    """*pid* has only so many free descriptors."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = numbers(pid)
    fitting = range(max(used) + spare + 2)
    limit = max(n for n in fitting if n - len([u for u in used if u < n]) == spare)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def fill_gaps(manager: Manager, stack: ExitStack) -> list[Peer]:
    """Connections until no number is free below the highest: one that is freed above a limit is of
    no use."""
    peers = []
    while True:
        used = numbers(server_pid(manager))
        if len(used) > max(used):
            return peers
        peers.append(stack.enter_context(Peer(manager.address)))


def server_pid(manager: Manager) -> int:
    assert manager._process is not None
    return manager._process.pid


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
            client.register("one", null)
        peer_register(peer, "many", [null] * 5)
        assert client.names() == ["many", "one", "x"]


def peer_register(peer: Peer, name: str, fds: list[int]) -> None:
    reply = peer.ask(m.Register(name, KIND), fds)
    if type(reply) is m.Refused:
        raise m.refusal_error(reply)


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
