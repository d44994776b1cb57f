"""Parking at a server that somebody named: one entry for a pickle, and nothing where it fails."""

from __future__ import annotations

import multiprocessing.reduction
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nursery import Manager

import fdshare
from fdshare.errors import AlreadyTaken, ClosedDescriptor, NoServer, QuotaExceeded
from fdshare.parking.named import NamedServer

Pair = tuple[socket.socket, socket.socket]
KEY = b"k" * 18


def dumps(obj: Any) -> bytes:
    return bytes(multiprocessing.reduction.ForkingPickler.dumps(obj))


@pytest.fixture
def at_server(server: Any) -> Iterator[fdshare.Client]:
    """A client of the server at which everything is parked."""
    fdshare.install(server.address)
    with fdshare.connect(server.address) as client:
        yield client
    fdshare.uninstall()


def test_one_entry_one_request_for_all(at_server: fdshare.Client, pair: Pair) -> None:
    near, far = pair
    before = at_server.stats()
    message = dumps([near, {"far": far}, near])
    after = at_server.stats()
    assert after.counters["requests"] - before.counters["requests"] == 2  # with stats itself
    assert (after.names, after.descriptors) == (1, 2)
    first, second, third = pickle.loads(message)
    assert first is third
    assert at_server.names() == []
    with pytest.raises(AlreadyTaken):
        pickle.loads(message)
    first.close()
    second["far"].close()


def test_what_fails_to_pickle_leaves_nothing(at_server: fdshare.Client, pair: Pair) -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)):
        dumps([pair[0], lambda: None])
    assert at_server.names() == []


class Closer:
    """Closes a socket when it is pickled, and lets something else have its number."""

    def __init__(self, sock: socket.socket, reuse: bool) -> None:
        self.sock, self.reuse = sock, reuse
        self.file: Any = None

    def __reduce__(self) -> Any:
        number = self.sock.fileno()
        self.sock.close()
        if self.reuse:
            self.file = open("/dev/null")
            assert self.file.fileno() == number
        return int, ()


@pytest.mark.parametrize("reuse", [False, True])
def test_what_is_closed_meanwhile_is_not_sent(
    at_server: fdshare.Client, pair: Pair, reuse: bool
) -> None:
    closer = Closer(pair[0], reuse)
    with pytest.raises(ClosedDescriptor, match=r"fdshare\.hold"):
        dumps([pair[0], closer])
    assert at_server.names() == []
    if closer.file is not None:
        closer.file.close()


def test_more_than_an_entry_holds(at_server: fdshare.Client, pair: Pair) -> None:
    near, far = pair
    copies = [near.dup() for _ in range(260)]
    message = dumps(copies)
    assert at_server.stats().descriptors == 260
    arrived = pickle.loads(message)
    assert at_server.names() == []
    assert len(arrived) == 260
    for sock in arrived:
        sock.send(b"x")
    assert len(far.recv(1000)) == 260
    for sock in [*copies, *arrived]:
        sock.close()


def test_what_nobody_loads_goes_in_time(server: Any, pair: Pair) -> None:
    near, far = pair
    fdshare.install(server.address, ttl=0.05)
    message = dumps(near)
    near.close()
    assert far.recv(1) == b""  # the server's was the last one
    with pytest.raises(AlreadyTaken):
        pickle.loads(message)
    fdshare.uninstall()


def test_a_taker_that_dies_gives_its_use_back(server: Any, pair: Pair) -> None:
    named = NamedServer(server.address)
    named.put(KEY, [pair[0].fileno()], 60, 2)
    with fdshare.connect(server.address) as client:
        first, second = client.names()
        # What a taker has before it dies: the descriptors, and an unconfirmed lease.
        steps = fdshare.client.verbs.take_raw(first, 0)
        client._do(_half(steps))
    for _ in range(2):
        named.take(KEY)[0].close()
    with pytest.raises(AlreadyTaken):
        named.take(KEY)
    named.close()
    assert second


def _half(steps: Any) -> Any:
    """The first exchange of a take, and then nothing."""
    parts = yield next(steps)
    for descriptor in parts.descriptors:
        descriptor.close()
    steps.close()


def test_its_limits(pair: Pair) -> None:
    with Manager(keeper=False, limits={"max_descriptors": 3}) as manager:
        fdshare.install(manager.address)
        copies = [pair[0].dup() for _ in range(4)]
        with pytest.raises(QuotaExceeded, match="max_descriptors"):
            dumps(copies)
        for sock in pickle.loads(dumps(copies[:3])):
            sock.close()
        fdshare.uninstall()
        for sock in copies:
            sock.close()


def test_nobody_is_there_any_more(pair: Pair, folder: Path) -> None:
    with Manager(folder / "s", keeper=False) as manager:
        fdshare.install(manager.address)
        message = dumps(pair[0])
    with pytest.raises((NoServer, ConnectionError)):
        pickle.loads(message)
    fdshare.uninstall()
