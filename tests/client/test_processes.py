"""One client in many threads, in forked children, and in a pickle."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from mp.common import trackers  # noqa: F401

from fdshare.client.blocking.client import Client
from fdshare.errors import FdshareError, InvalidArgument, NameNotFound, NameTaken
from fdshare.manager import Manager


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    with socket.socket() as sock:
        yield sock


def run(*calls: Callable[[], None]) -> None:
    """Runs each in a thread of its own; raises what they raised."""
    errors: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    def guarded(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            errors.put(error)

    threads = [threading.Thread(target=guarded, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not errors.empty():
        raise errors.get()


# Threads


def test_many_threads_with_one_client(client: Client) -> None:
    """Each thread fetches what it registered, never another's."""

    def work(number: int) -> None:
        for turn in range(40):
            reading, writing = os.pipe()
            name = f"{number}/{turn}"
            client.register(name, reading)
            with client.fetch(name) as fetched:
                assert os.path.samestat(os.fstat(fetched.fileno()), os.fstat(reading))
            with client.take(name) as taken:
                assert os.path.samestat(os.fstat(taken.fileno()), os.fstat(reading))
            os.close(reading)
            os.close(writing)

    run(*(lambda number=number: work(number) for number in range(8)))
    assert client.names() == []


def test_a_wait_blocks_only_its_caller(client: Client, sock: socket.socket) -> None:
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(client.fetch("later", timeout=60)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for _ in range(50):
        client.ping()
    client.register("later", sock)
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for fetched in found:
        fetched.close()


def test_takers_in_many_threads(server: Any, client: Client, sock: socket.socket) -> None:
    """Of one entry, many times: one has it at a time, and it is never lost nor doubled."""
    client.register("token", sock)
    holders: list[int] = []

    def work(mine: Client) -> None:
        for _ in range(20):
            with mine.take("token", timeout=60) as token:
                holders.append(1)
                assert len(holders) == 1
                holders.pop()
                mine.register("token", token)

    with Client(server.address) as one, Client(server.address) as two:
        run(*(lambda mine=mine: work(mine) for mine in (one, one, two, two)))
    assert client.names() == ["token"]


def test_closing_under_a_call(server: Any, client: Client, until: Callable[..., Any]) -> None:
    """A call that is under way ends by itself; nothing is left open."""
    mine = Client(server.address)
    outcome: list[Any] = []

    def wait() -> None:
        try:
            mine.fetch("never", timeout=0.3)
        except FdshareError as error:
            outcome.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: client.stats().connections == 2, "the other to wait")
    mine.close()
    thread.join()
    assert len(outcome) == 1


# Fork


def in_child(work: Callable[[], Any]) -> None:
    """Runs *work* in a forked child; fails if it raises."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            work()
            status = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_forked_child_has_connections_of_its_own(client: Client, sock: socket.socket) -> None:
    client.register("x", sock)

    def child() -> None:
        with client.fetch("x") as fetched:
            assert os.path.samestat(os.fstat(fetched.fileno()), os.fstat(sock.fileno()))
        client.register("child", sock)
        assert client.info("child").registrant.pid == os.getpid()

    for _ in range(3):
        in_child(child)
        assert client.info("x").registrant.pid == os.getpid()
        client.unregister("child")


def test_parent_and_child_at_the_same_time(client: Client, sock: socket.socket) -> None:
    client.register("x", sock)

    def work() -> None:
        for _ in range(100):
            client.fetch("x").close()

    thread = threading.Thread(target=work)
    thread.start()
    in_child(work)
    thread.join()


def test_a_fork_while_other_threads_wait(client: Client, sock: socket.socket, until: Any) -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(client.fetch("later", timeout=60)))
    thread.start()
    until(lambda: client.stats().connections >= 2, "the thread to wait")

    def child() -> None:
        client.ping()
        with pytest.raises(NameNotFound):
            client.fetch("later")

    in_child(child)
    client.register("later", sock)
    thread.join()
    found[0].close()


def test_a_closed_client_stays_closed_in_the_child(server: Any) -> None:
    client = Client(server.address)
    client.close()

    def child() -> None:
        with pytest.raises(FdshareError):
            client.ping()

    in_child(child)


def test_a_child_that_closes_does_not_close_the_parents(
    client: Client, sock: socket.socket
) -> None:
    client.register("x", sock, lifetime="connection")
    in_child(client.close)
    client.ping()
    assert client.names() == ["x"]


# Pickles


def test_a_client_travels_as_its_address(server: Any) -> None:
    options = {"timeout": 7.5, "reconnect": 0.5, "trust": [0, os.geteuid(), 4711]}
    with Client(server.address, **options) as client:  # type: ignore[arg-type]
        client.ping()
        with pickle.loads(pickle.dumps(client)) as other:
            other.ping()
            assert type(other) is Client
            assert (other.address, other.timeout, other.reconnect) == (server.address, 7.5, 0.5)
            assert other._trust == frozenset((0, os.geteuid(), 4711))


def test_an_authkey_does_not_travel_in_plain_pickles(server: Any) -> None:
    with Client(server.address, authkey=b"secret") as client, pytest.raises(InvalidArgument):
        pickle.dumps(client)


def use(client: Client, results: Any) -> None:
    """In a child: fetches, registers, and closes what it was given."""
    with client:
        client.fetch("x").close()
        with socket.socket() as sock:
            client.register(f"child/{os.getpid()}", sock)
            try:
                client.register("x", sock)
            except NameTaken as error:
                results.put((os.getpid(), error.generation))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("authkey", [None, b"secret"])
def test_as_an_argument_of_a_process(
    serve: Callable[..., Manager], sock: socket.socket, method: str, authkey: bytes | None
) -> None:
    address = serve(authkey=authkey).address
    context = multiprocessing.get_context(method)
    results = context.SimpleQueue()
    with Client(address, authkey=authkey) as client:
        generation = client.register("x", sock).generation
        process = context.Process(target=use, args=(client, results))
        process.start()
        pid, seen = results.get()
        process.join()
        assert process.exitcode == 0
        assert seen == generation
        assert client.info(f"child/{pid}").registrant.pid == pid
    process.close()
    results.close()


def test_errors_travel_back_as_themselves(server: Any, folder: Path) -> None:
    with Client(server.address) as client, pytest.raises(NameNotFound) as caught:
        client.fetch("absent")
    other = pickle.loads(pickle.dumps(caught.value))
    assert type(other) is NameNotFound
    assert other.names == ["absent"]


def test_a_forked_child_keeps_no_connection_of_a_thread(
    server: Any, sock: socket.socket, until: Callable[..., Any]
) -> None:
    """... that was in the middle of a call: the thread is not there, its connection would be."""
    before = sockets()
    with Client(server.address) as client:
        asked = client.stats().counters["requests"]
        waiting = threading.Thread(target=lambda: client.fetch("late", timeout=30).close())
        waiting.start()
        asking = count(asked + 1)  # each question is a request itself
        until(lambda: client.stats().counters["requests"] > next(asking))
        pid = os.fork()
        if pid == 0:
            os._exit(bool(sockets() - before))
        _, status = os.waitpid(pid, 0)
        client.register("late", sock)
        waiting.join()
        client.unregister("late")
        assert os.waitstatus_to_exitcode(status) == 0


def sockets() -> set[str]:
    """The sockets that this process has open, by their inodes."""
    links = (os.path.join("/proc/self/fd", number) for number in os.listdir("/proc/self/fd"))
    targets = (os.readlink(link) for link in links if os.path.lexists(link))
    return {target for target in targets if target.startswith("socket:")}
