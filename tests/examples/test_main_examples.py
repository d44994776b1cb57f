"""The programs of examples/ run as real processes, and do what their docstrings show."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ending import terminated
from nursery import Manager

import fdshare

PROGRAMS = Path(__file__).parents[2] / "examples"
Started = subprocess.Popen[str]
Start = Callable[..., Started]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a program of examples/."""
    started: list[Started] = []

    def start(name: str, *arguments: object) -> Started:
        process = subprocess.Popen(
            [sys.executable, str(PROGRAMS / name), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def rendezvous() -> Iterator[Manager]:
    with Manager() as manager:
        yield manager


def line(process: Started) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def stop(process: Started) -> str:
    """What it says after SIGTERM, which must end it well."""
    out, _ = terminated(process)
    assert process.returncode == 0, out
    return out


def get(port: int, path: str = "/") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
        text: str = answer.read().decode()
        return text


def test_register_listener_and_serve_by_name(start: Start, rendezvous: Manager) -> None:
    waiting = start("serve_by_name.py", rendezvous.address)  # before there is a listener
    binder = start("register_listener.py", rendezvous.address, "--port", 0)
    said = line(binder)
    match = re.fullmatch(r"127\.0\.0\.1:(\d+) is registered as 'web'; this .* more", said)
    assert match, said
    assert binder.wait(20) == 0
    port = int(match[1])
    assert line(waiting) == f"pid {waiting.pid} serves 127.0.0.1:{port}"
    assert get(port) == f"hello from pid {waiting.pid}\n"

    another = start("serve_by_name.py", rendezvous.address)
    assert line(another) == f"pid {another.pid} serves 127.0.0.1:{port}"
    assert stop(waiting) == ""
    assert get(port) == f"hello from pid {another.pid}\n"
    assert stop(another) == ""
    # Nobody serves: a client that comes now waits in the queue of the listener.
    with socket.create_connection(("127.0.0.1", port), timeout=20) as early:
        early.sendall(b"GET / HTTP/1.0\r\n\r\n")
        third = start("serve_by_name.py", rendezvous.address)
        with early.makefile() as answer:
            assert answer.read().endswith(f"hello from pid {third.pid}\n")


def test_pool_of_connections(start: Start) -> None:
    program = start("pool_of_connections.py", "--port", 0, "--workers", 2)
    match = re.fullmatch(
        r"127\.0\.0\.1:(\d+): one process accepts, 2 workers answer", line(program)
    )
    assert match
    for number in range(4):
        answer = get(int(match[1]), f"/{number}")
        found = re.fullmatch(rf"/{number} was answered by worker (\d+)\n", answer)
        assert found, answer
        assert int(found[1]) != program.pid
    assert stop(program) == ""


def test_log_through_queue(start: Start, folder: Path) -> None:
    log = folder / "app.log"
    program = start("log_through_queue.py", log)
    out, _ = program.communicate(timeout=60)
    assert program.returncode == 0, out
    *workers, summary = out.splitlines()
    assert len(set(workers)) == 3
    assert summary == f"{log}.1 has 9 lines, {log} has none: it is a new file"
    written = re.findall(r"worker (\d+): line \d", (folder / "app.log.1").read_text())
    assert sorted({f"{pid} wrote its lines" for pid in written}) == sorted(workers)


def test_handover(start: Start, rendezvous: Manager) -> None:
    old = start("handover.py", rendezvous.address, "--port", 0)
    match = re.fullmatch(rf"version 1 \(pid {old.pid}\) bound 127\.0\.0\.1:(\d+)", line(old))
    assert match
    port = int(match[1])
    answers: list[str] = []
    enough = threading.Event()

    def ask() -> None:
        while not enough.is_set():
            answers.append(get(port))

    clients = [threading.Thread(target=ask) for _ in range(3)]
    for client in clients:
        client.start()
    try:
        new = start("handover.py", rendezvous.address, "--version", 2)
        said = line(new)
        assert said == f"version 2 (pid {new.pid}) took 127.0.0.1:{port} over"
        rest, _ = old.communicate(timeout=30)
        assert rest == f"version 1 (pid {old.pid}) has drained and ends\n"
        assert old.returncode == 0
    finally:
        enough.set()
        for client in clients:
            client.join()
    # A refused or broken connection would have ended its thread with an exception, which pytest
    # reports as a warning, and a warning is an error.
    assert set(answers) <= {"version 1\n", "version 2\n"}
    assert get(port) == "version 2\n"
    with fdshare.connect(rendezvous.address) as client:
        assert client.names() == ["handover/listener", "handover/turn"]
