"""A log that nobody reads, or that has no room: nobody waits for it, and what is lost is counted.

Standard error is a pipe that the test reads when it likes, or /dev/full.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from breaking import Halves
from conftest import wait_until
from hanging import WRITE, HangingFileSystem, needs_fuse
from nursery import Process
from users import needs_root

from fdshare.client.blocking.client import Client
from fdshare.errors import LogFull, NameNotFound
from server.conftest import answers

NAMES = [f"{number}/" + "x" * 200 for number in range(200)]
PIDFD_GETFD = 438  # the number of this system call is the same everywhere
ROUNDS = 200  # fetches of all names: their lines do not fit into memory


@contextmanager
def served(folder: Path, stderr: int, *options: str) -> Iterator[Client]:
    """A client of a server that logs to *stderr*, and ends in the end."""
    command = [sys.executable, "-m", "fdshare", "serve", str(folder / "s"), *options]
    process = Process(command, stdin=subprocess.DEVNULL, stderr=stderr)
    try:
        wait_until(lambda: answers(folder / "s"), "the server answers")
        with Client(folder / "s", timeout=10) as client:
            yield client
            client.shutdown()
        process.wait(20)
    finally:
        process.terminate()  # where the test has failed
        process.wait()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    yield read, write
    os.close(read)
    os.close(write)


def register_all(client: Client) -> None:
    for name in NAMES:
        client.register(name, 0)


def fetch_all(client: Client) -> None:
    for descriptor in client.fetch_many(NAMES).values():
        descriptor.close()


def use(client: Client) -> None:
    """Everything goes on, whichever half dies, and with new code."""
    register_all(client)
    for _ in range(ROUNDS):
        fetch_all(client)
    assert client.stats().log_dropped > 0
    halves = Halves(client)
    halves.kill("server")
    for _ in range(ROUNDS):
        fetch_all(client)
    halves.kill("keeper")
    halves.kill("server")
    client.register(NAMES[0], 0, replace=True)
    client.upgrade()
    halves.redundant()
    assert len(client.names()) == len(NAMES)


@needs_root
def test_a_keeper_that_fails_while_nobody_reads(folder: Path, pipe: tuple[int, int]) -> None:
    """Its end does not wait for what it has to say about it."""
    with served(folder, pipe[1]) as client:
        client.register("a", 0)
        os.set_blocking(pipe[1], False)
        with suppress(BlockingIOError):
            while os.write(pipe[1], b"x" * 4096):
                pass
        os.set_blocking(pipe[1], True)
        halves = Halves(client)
        halves.redundant()
        pids = halves.pids()
        with journal_of(pids["server"]) as journal:
            journal.send(b"what no code writes")
        wait_until(lambda: halves.pids()["keeper"] != pids["keeper"], "another keeper")
        halves.redundant()
        client.register("a", 0, replace=True)


def journal_of(server: int) -> socket.socket:
    """A copy of the server's end of its journal. The caller owns the result."""
    pidfd = os.pidfd_open(server)
    for number in os.listdir(f"/proc/{server}/fd"):
        if os.readlink(f"/proc/{server}/fd/{number}").startswith("socket:"):
            copy = ctypes.CDLL(None, use_errno=True).syscall(PIDFD_GETFD, pidfd, int(number), 0)
            assert copy >= 0, os.strerror(ctypes.get_errno())
            sock = socket.socket(fileno=copy)
            if sock.type == socket.SOCK_SEQPACKET:
                os.close(pidfd)
                return sock
            sock.close()
    raise AssertionError("it has no journal")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_nobody_reads_the_log(folder: Path, pipe: tuple[int, int], log_format: str) -> None:
    with served(folder, pipe[1], "--log-format", log_format) as client:
        use(client)


def test_the_log_has_no_room(folder: Path) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    with served(folder, full) as client:
        os.close(full)
        use(client)
        client.register("last", 0)
        notes = wait_until(lambda: client.stats().notes.get("log"))
        assert notes == "it cannot be written: No space left on device"


@needs_fuse
def test_the_file_system_of_the_log_hangs(folder: Path) -> None:
    """A process with a write that never returns cannot end. The others go on."""
    with HangingFileSystem(0) as files:
        files.hang(WRITE)
        log = f'exec "$@" 2>>{files.folder}/file'
        serve = [sys.executable, "-m", "fdshare", "serve", str(folder / "s")]
        words = ["sh", "-c", log, "sh", *serve]
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, preexec_fn=files.enter)
        wait_until(lambda: answers(folder / "s"), "the server answers")
        with Client(folder / "s", timeout=20) as client:
            client.register("a", 0)
            halves = Halves(client)
            halves.redundant()
            pids = halves.pids()
            os.kill(pids["server"], signal.SIGKILL)
        with Client(folder / "s", timeout=20) as client:
            halves = Halves(client)
            wait_until(lambda: halves.pids()["server"] != pids["server"], "another server")
            halves.redundant()
            client.register("b", 0)
            client.fetch_raw("a")[0].close()
            assert client.names() == ["a", "b"]
            client.shutdown()
        wait_until(lambda: not (folder / "s").exists(), "the path to be free")
    process.wait(20)


def test_a_line_says_how_many_are_lost(folder: Path, pipe: tuple[int, int]) -> None:
    got: list[bytes] = []
    with served(folder, pipe[1]) as client:
        register_all(client)
        for _ in range(ROUNDS):
            fetch_all(client)
        lost = client.stats().log_dropped
        assert lost > 0

        def read() -> None:
            while not got or b"stop" not in got[-1]:
                got.append(os.read(pipe[0], 1 << 16))

        reader = threading.Thread(target=read)
        reader.start()
        wait_until(lambda: b"lines of the log are lost" in b"".join(got))
        client.register("stop", 0)
        reader.join()
        assert client.stats().log_dropped == lost
    lines = b"".join(got).decode().splitlines()
    lines = [line for line in lines if "serving at" not in line]  # of the keeper
    (said,) = (line for line in lines if "are lost" in line)
    assert re.search(rf"WARNING: {lost} lines of the log are lost", said)
    assert len(lines) == len(NAMES) * (ROUNDS + 1) - lost + 2


def test_who_must_have_every_line(folder: Path, pipe: tuple[int, int]) -> None:
    """--audit-strict: what would not be noted is not done, and no line is lost."""
    with served(folder, pipe[1], "--audit-strict") as client:
        register_all(client)
        count = 0
        with pytest.raises(LogFull, match="the audit log is full"):
            for _ in range(ROUNDS):
                fetch_all(client)
                count += 1
        for refused in (
            lambda: client.fetch_raw(NAMES[0]),
            lambda: client.take_raw(NAMES[0]),
            lambda: client.register("more", 0),
            lambda: client.unregister(NAMES[0]),
        ):
            with pytest.raises(LogFull):
                refused()
        assert client.stats().names == len(client.names()) == len(NAMES)
        lines = 0
        while lines < len(NAMES) * (count + 1):
            lines += os.read(pipe[0], 1 << 16).count(b"\n")
        wait_until(lambda: noticed(client))
        with pytest.raises(NameNotFound):
            client.fetch_raw("missing", timeout=0)


def noticed(client: Client) -> bool:
    """Whether the server does again what it notes."""
    try:
        client.fetch_raw(NAMES[0])[0].close()
    except LogFull:
        return False
    return True
