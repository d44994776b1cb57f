"""A take is a lease: removed only when the receiver has confirmed, and back if it never does."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from breaking import Half, Halves, Wire, identity, kill
from conftest import wait_until
from nursery import Manager, Process

from fdshare.client.blocking.client import Client
from fdshare.errors import DescriptorLimit, NameNotFound, NameTaken
from fdshare.protocol import messages as m

death = pytest.mark.parametrize("death", [None, "server", "keeper"])


@pytest.fixture(scope="module")
def shared() -> Iterator[Manager]:
    with Manager(limits={"lease_timeout": 1.0}) as manager:
        yield manager


@pytest.fixture
def manager(shared: Manager) -> Iterator[Manager]:
    """A server with both halves, empty and accounted for after the test."""
    with Manager(shared.address).connect() as manager:  # connections of the test's own
        yield manager
        wait_until(lambda: manager.stats().leases == 0)
        for name in manager.names():
            manager.unregister(name)
        Halves(manager).redundant()
        Halves(manager).check_census()


@pytest.fixture
def halves(manager: Manager) -> Halves:
    return Halves(manager)


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("leased")
    yield fd
    os.close(fd)


class Taker:
    """Has taken *name*, and has not said so yet."""

    def __init__(self, address: str, name: str) -> None:
        self.wire = Wire(address, "taker")
        said = self.wire.ask(1, m.Take(name))
        assert said.reply.lease
        self.generation = said.reply.generation
        *self.descriptors, self.lease = said.descriptors

    def confirm(self) -> None:
        """Raises: OSError EPIPE: it was revoked."""
        with self.lease.socket() as lease:
            lease.send(b"\1", 0)

    def close(self) -> None:
        self.wire.close()
        for descriptor in (*self.descriptors, self.lease):
            descriptor.close()

    def __enter__(self) -> Taker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def events(watch: Any, last: str) -> list[str]:
    """What happens up to *last*."""
    seen: list[str] = []
    while last not in seen:
        seen.append(next(watch).event)
    return seen


# Back.


@death
def test_an_unconfirmed_take_is_back(
    manager: Manager, halves: Halves, fd: int, death: Half | None
) -> None:
    generation = manager.register("a", fd).generation
    with Taker(manager.address, "a") as taker:
        assert identity(taker.descriptors[0]) == identity(fd)
        if death:
            halves.kill(death)
        assert manager.names() == []
        assert manager.stats().leases == 1
    wait_until(lambda: manager.names() == ["a"])
    assert manager.info("a").generation == generation
    with manager.fetch_raw("a")[0] as descriptor:
        assert identity(descriptor) == identity(fd)


def test_watchers_are_told(manager: Manager, fd: int) -> None:
    manager.register("a", fd)
    with Client(manager.address) as client, client.watch(timeout=20) as watch:
        next(watch)
        with Taker(manager.address, "a") as taker:
            assert events(watch, "taken") == ["taken"]
            assert watch.held == {}
        assert events(watch, "returned") == ["returned"]
        assert watch.held == {"a": taker.generation}


def test_a_taker_that_never_reads_its_answer(manager: Manager, fd: int) -> None:
    for _ in range(20):
        manager.register("a", fd)
        with Wire(manager.address, "gone") as wire:
            wire.send(1, m.Take("a"))
        wait_until(lambda: manager.stats().leases == 0)
        assert manager.names() == ["a"]
        manager.unregister("a")


def test_a_taker_that_is_gone_before_it_is_its_turn(manager: Manager, fd: int) -> None:
    with Wire(manager.address, "gone") as wire:
        wire.send(1, m.Take("a", 60.0))
        wait_until(lambda: manager.stats().counters["requests"])
    manager.register("a", fd)
    wait_until(lambda: manager.stats().leases == 0)
    assert manager.names() == ["a"]


KILLED = """
import sys
sys.path.insert(0, sys.argv[2])
from breaking import Wire
from fdshare.protocol import messages as m

with Wire(sys.argv[1], "killed") as wire:
    said = wire.ask(1, m.Take("a"))
    print("taken", flush=True)
    sys.stdin.read()
"""


def run(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    here = os.path.dirname(os.path.dirname(__file__))
    return Process(
        [sys.executable, "-c", code, *arguments, here],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


@death
def test_a_taker_that_is_killed(
    manager: Manager, halves: Halves, fd: int, death: Half | None
) -> None:
    manager.register("a", fd)
    process = run(KILLED, manager.address)
    assert process.stdout is not None
    assert process.stdout.readline() == b"taken\n"
    if death:
        halves.kill(death)
    assert manager.names() == []
    process.kill()
    process.communicate()
    wait_until(lambda: manager.names() == ["a"])


AT_ITS_LIMIT = """
import os, resource, sys
from fdshare.client.blocking.client import Client
from fdshare.errors import DescriptorLimit

with Client(sys.argv[1]) as client:
    client.ping()
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, 4096))
    for verb in (client.take_raw, client.take, client.fetch_raw):
        try:
            verb("a")
        except DescriptorLimit as error:
            assert error.whose == "receiver", error
            print(error.limit, flush=True)
"""


def test_a_taker_without_a_free_descriptor(manager: Manager, fd: int) -> None:
    generation = manager.register("a", fd).generation
    process = run(AT_ITS_LIMIT, manager.address)
    said, _ = process.communicate()
    assert process.returncode == 0
    assert len(said.split()) == 3
    wait_until(lambda: manager.names() == ["a"])
    assert manager.info("a").generation == generation


def test_an_entry_without_room_for_all_of_it(manager: Manager) -> None:
    """Some of the descriptors fit at the receiver, and the lease does not."""
    fds = [os.eventfd(0) for _ in range(20)]
    with Wire(manager.address, "many") as wire:
        wire.ask(1, m.Register("a", m.Kind("fd", m.encode({}))), fds)
    for fd in fds:
        os.close(fd)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Client(manager.address) as client:
        client.ping()
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 7, hard))
        try:
            with pytest.raises(DescriptorLimit):
                client.take_raw("a")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    wait_until(lambda: manager.names() == ["a"])
    for descriptor in manager.take_raw("a"):
        descriptor.close()


@death
def test_a_lease_that_lasts_too_long(
    manager: Manager, halves: Halves, fd: int, death: Half | None
) -> None:
    manager.register("a", fd)
    with Taker(manager.address, "a") as taker:
        if death:
            halves.kill(death)
        wait_until(lambda: manager.names() == ["a"])
        with pytest.raises(BrokenPipeError):
            taker.confirm()


def test_the_next_taker_gets_it(manager: Manager, fd: int) -> None:
    manager.register("a", fd)
    with Taker(manager.address, "a"), Wire(manager.address, "next") as wire:
        wire.send(1, m.Take("a", 20.0))
        wait_until(lambda: manager.stats().connections == 3)
        manager.names()
    # Both are gone, and it is back.
    wait_until(lambda: manager.names() == ["a"])
    with Taker(manager.address, "a") as first, Wire(manager.address, "next") as wire:
        wire.send(1, m.Take("a", 20.0))
        first.close()
        said = wire.receive()
        assert isinstance(said.reply, m.Given)
        for descriptor in said.descriptors:
            descriptor.close()


# Gone.


@death
def test_a_confirmed_take_never_comes_back(
    manager: Manager, halves: Halves, fd: int, death: Half | None
) -> None:
    manager.register("a", fd)
    with Taker(manager.address, "a") as taker:
        if death:
            halves.kill(death)
        taker.confirm()
    assert manager.names() == []
    with pytest.raises(NameNotFound):
        manager.fetch("a")
    manager.register("a", fd)


def test_a_take_confirmed_to_a_server_that_then_dies(
    manager: Manager, halves: Halves, fd: int
) -> None:
    """It had no chance to look: the successor does."""
    manager.register("a", fd)
    with Taker(manager.address, "a") as taker:
        server = halves.pids()["server"]
        os.kill(server, signal.SIGSTOP)
        taker.confirm()
        kill(server)
    assert manager.names() == []
    assert manager.stats().leases == 0


def test_a_take_dropped_to_a_server_that_then_dies(
    manager: Manager, halves: Halves, fd: int
) -> None:
    manager.register("a", fd)
    taker = Taker(manager.address, "a")
    server = halves.pids()["server"]
    os.kill(server, signal.SIGSTOP)
    taker.close()
    kill(server)
    assert manager.names() == ["a"]


def test_a_server_that_dies_with_the_answer_unread(
    manager: Manager, halves: Halves, fd: int
) -> None:
    """The answer is in the taker's socket, the lease with it: it may still confirm."""
    manager.register("a", fd)
    with Wire(manager.address, "late") as wire:
        wire.send(1, m.Take("a"))
        wait_until(lambda: manager.stats().leases == 1)
        halves.kill("server")
        said = wire.receive()
        *descriptors, lease = said.descriptors
        with lease.socket() as sock:
            sock.send(b"\1")
        for descriptor in descriptors:
            descriptor.close()
    assert manager.names() == []


def test_what_was_taken_is_gone_at_once(manager: Manager, fd: int) -> None:
    """The confirmation takes no round trip, and yet nobody sees the name any more."""
    with Client(manager.address) as other:
        for _ in range(200):
            manager.register("a", fd)
            manager.take_raw("a")[0].close()
            assert other.names() == []
            other.register("a", fd)
            other.take_raw("a")[0].close()


# Meanwhile.


def test_a_leased_name_is_still_taken(manager: Manager, fd: int) -> None:
    manager.register("a", fd)
    manager.register("b", fd)
    with Taker(manager.address, "a"):
        with pytest.raises(NameTaken):
            manager.register("a", fd)
        with pytest.raises(NameTaken):
            manager.rename("b", "a")
        with pytest.raises(NameTaken):
            manager.bind("a", "tcp://127.0.0.1:0")
        with pytest.raises(NameNotFound):
            manager.fetch("a")
        with pytest.raises(NameNotFound):
            manager.rename("a", "c")
        assert manager.info("a").leased


@pytest.mark.parametrize("confirmed", [False, True])
def test_replacing_a_leased_entry_cancels_its_return(
    manager: Manager, fd: int, confirmed: bool
) -> None:
    read, write = os.pipe()
    manager.register("a", fd)
    with Taker(manager.address, "a") as taker:
        if confirmed:
            taker.confirm()
        manager.register("a", read, replace=True)
        if not confirmed:
            with pytest.raises(BrokenPipeError):
                taker.confirm()
    with manager.fetch_raw("a")[0] as descriptor:
        assert identity(descriptor) == identity(read)
    os.close(read)
    os.close(write)


def test_unregistering_a_leased_entry(manager: Manager, fd: int) -> None:
    manager.register("a", fd)
    with Taker(manager.address, "a") as taker:
        manager.unregister("a")
        with pytest.raises(BrokenPipeError):
            taker.confirm()
    assert manager.names() == []


def test_an_entry_that_expires_while_it_is_leased(manager: Manager, fd: int) -> None:
    manager.register("a", fd, ttl=0.2)
    with Taker(manager.address, "a") as taker:
        wait_until(lambda: manager.stats().leases == 0)
        with pytest.raises(BrokenPipeError):
            taker.confirm()
    assert manager.names() == []


def test_a_take_loses_to_a_replacement_and_tries_again(manager: Manager, fd: int) -> None:
    """The client's take goes on until it has what it confirmed."""
    manager.register("a", fd)
    with Client(manager.address) as client:
        for _ in range(100):
            with client.take_raw("a")[0] as descriptor:
                manager.register("a", fd)
                assert identity(descriptor) == identity(fd)


def test_a_lease_counts_among_the_descriptors(manager: Manager, halves: Halves, fd: int) -> None:
    manager.register("a", fd)
    with Taker(manager.address, "a"):
        assert manager.stats().descriptors == 2
        halves.check_census()
