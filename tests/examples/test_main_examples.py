"""The programs of examples/ run as real processes, and do what their docstrings show."""

from __future__ import annotations

import re
import signal
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import wait_until
from ending import terminated
from nursery import Manager

import fdshare
from examples.conftest import Start, Started


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


def interrupt(process: Started) -> str:
    """What it says after Ctrl-C, which must end it as well."""
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert "Traceback" not in out
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


LINE = re.compile(r"pid (\d+) line (\d+)")


def test_log_rotation(start: Start, rendezvous: Manager, folder: Path) -> None:
    log = folder / "app.log"

    def rotate() -> str:
        process = start("log_rotation.py", rendezvous.address, "rotate", log)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0, out
        return out

    assert rotate() == f"generation 1 is {log}\n"
    writers = [start("log_rotation.py", rendezvous.address, "write") for _ in range(2)]
    assert [line(writer) for writer in writers] == [f"pid {w.pid} writes" for w in writers]
    pids = {str(writer.pid) for writer in writers}

    def writes_here() -> bool:
        return {pid for pid, _ in LINE.findall(log.read_text())} == pids

    finished = []
    for number in (1, 2, 3):
        wait_until(writes_here, "lines of both")
        assert rotate() == f"generation {number + 1} is {log}, the one before is {log}.{number}\n"
        wait_until(writes_here, "lines of both in the new file")
        finished.append((folder / f"app.log.{number}").read_text())
    said = [stop(writers[0]), interrupt(writers[1])]
    # No line went into a file after its writer had begun the next one.
    assert finished == [(folder / f"app.log.{number}").read_text() for number in (1, 2, 3)]
    written = LINE.findall("".join([*finished, log.read_text()]))
    for writer, last in zip(writers, said, strict=True):
        lines = [int(number) for pid, number in written if pid == str(writer.pid)]
        assert lines == list(range(1, len(lines) + 1))
        assert last == f"pid {writer.pid} wrote {len(lines)} lines to 4 files\n"


def test_hot_dataset(start: Start, rendezvous: Manager) -> None:
    pytest.importorskip("numpy")

    def publish(version: int) -> None:
        process = start("hot_dataset.py", rendezvous.address, "publish", version)
        out, _ = process.communicate(timeout=60)
        assert out == f"version {version}: 1000000 numbers\n"

    publish(1)
    readers = [start("hot_dataset.py", rendezvous.address, "read") for _ in range(2)]
    assert [line(reader) for reader in readers] == ["version 1"] * 2
    for version in (2, 3):
        publish(version)
        assert [line(reader) for reader in readers] == [f"version {version}"] * 2
    for said in (stop(readers[0]), interrupt(readers[1])):
        assert re.fullmatch(r"\d+ reads of 3 versions, 0 torn\n", said)
