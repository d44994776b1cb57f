"""The asynchronous programs of examples/ run as real processes, and do what they say."""

from __future__ import annotations

import importlib.util
import os
import re
import select
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from nursery import Manager

from examples.conftest import Start, Started

SERVERS = pytest.mark.parametrize("program", ["aio_server.py", "trio_server.py"])


@pytest.fixture
def rendezvous() -> Iterator[Manager]:
    with Manager(keeper=False) as manager:
        yield manager


def line(process: Started) -> str:
    """The next line it says."""
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], 60)[0]
    return process.stdout.readline().rstrip("\n")


def serving(process: Started) -> tuple[int, int]:
    """(its pid, its port), once it serves."""
    said = line(process)
    found = re.fullmatch(r"pid (\d+) serves 127\.0\.0\.1:(\d+)", said)
    assert found, said + "\n" + (process.stdout.read() if process.stdout else "")
    return int(found[1]), int(found[2])


def ended(process: Started) -> str:
    """What it still says after SIGTERM, which must end it well."""
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    return out


def dial(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=60)


@SERVERS
def test_a_server_of_which_there_are_two(start: Start, rendezvous: Manager, program: str) -> None:
    options = (rendezvous.address, "--address", "tcp://127.0.0.1:0")
    first, second = start(program, *options), start(program, *options)
    (pid, port), (other_pid, other_port) = serving(first), serving(second)
    assert port == other_port
    assert pid != other_pid
    assert rendezvous.names() == ["web"]
    for _ in range(10):
        with dial(port) as connection:
            connection.sendall(b"hello\n")
            assert connection.recv(100) == b"HELLO\n"
    assert ended(first) == ""
    with dial(port) as connection:
        connection.sendall(b"still\n")
        assert connection.recv(100) == b"STILL\n"
    assert ended(second) == ""
    with dial(port) as connection:  # nobody serves; it waits in the queue of the listener
        connection.sendall(b"later\n")
        third = start(program, *options)
        serving(third)
        assert connection.recv(100) == b"LATER\n"
    assert ended(third) == ""


@SERVERS
def test_what_is_accepted_is_answered_to_its_end(
    start: Start, rendezvous: Manager, program: str
) -> None:
    server = start(program, rendezvous.address, "--address", "tcp://127.0.0.1:0")
    _, port = serving(server)
    with dial(port) as connection:
        connection.sendall(b"one\n")
        assert connection.recv(100) == b"ONE\n"
        server.send_signal(signal.SIGTERM)
        connection.sendall(b"two\n")
        assert connection.recv(100) == b"TWO\n"
        assert server.poll() is None
    out, _ = server.communicate(timeout=60)
    assert (server.returncode, out) == (0, "")


def test_servers_reload_what_is_published(start: Start, rendezvous: Manager) -> None:
    def publish(text: str) -> str:
        process = start("watch_and_reload.py", rendezvous.address, "publish", text)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0, out
        return out.strip()

    def greeting(port: int) -> bytes:
        with dial(port) as connection:
            return connection.makefile("rb").read()

    options = (rendezvous.address, "serve", "--address", "tcp://127.0.0.1:0")
    servers = [start("watch_and_reload.py", *options) for _ in range(2)]
    ports = {serving(server)[1] for server in servers}
    (port,) = ports
    assert greeting(port) == b"not configured\n"
    for text in ("hello", "good morning", "good night"):
        said = publish(f'{{"greeting": "{text}"}}')
        generation = re.fullmatch(r"published generation (\d+)", said)
        assert generation, said
        for server in servers:
            assert line(server) == f'generation {generation[1]}: {{"greeting": "{text}"}}'
        assert greeting(port) == text.encode() + b"\n"

    bad = start("watch_and_reload.py", rendezvous.address, "publish", "no json")
    assert bad.wait(60) == 1
    rendezvous.unregister("config")  # what was loaded last stays
    assert greeting(port) == b"good night\n"
    for server in servers:
        assert ended(server) == ""


def test_a_server_that_reloads_lives_with_a_new_rendezvous_server(
    start: Start, folder: Path
) -> None:
    """It is killed, and all it held is gone; the next one is watched as the first was."""
    with Manager(folder / "s", keeper=False) as first:
        options = (first.address, "serve", "--address", "tcp://127.0.0.1:0")
        server = start("watch_and_reload.py", *options)
        serving(server)
        os.kill(first.stats().server_pid, signal.SIGKILL)
        first.join(60)
        with Manager(folder / "s", keeper=False) as second:
            publisher = start("watch_and_reload.py", second.address, "publish", '{"a": 1}')
            assert publisher.wait(60) == 0
            assert line(server) == 'generation 1: {"a": 1}'
            assert ended(server) == ""


@pytest.mark.skipif(
    importlib.util.find_spec("distributed") is None,
    reason="Dask's distributed is not installed (the extra fdshare[cluster])",
)
def test_a_dask_cluster_shares_by_reference(start: Start) -> None:
    process = start("cluster_dask.py")
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0, out
    # Where the machine is slow, Dask says so between them.
    first, second = re.findall(r"^(?:4 tasks|each of) .*", out, re.MULTILINE)
    assert first == "4 tasks in 2 processes summed 1000000 numbers of one open file: 499999500000.0"
    assert re.fullmatch(r"each of 2 workers has accepted a connection on port \d+", second)
