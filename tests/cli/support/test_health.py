"""Whether a new version answers: who has accepted is asked of /proc."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ending import is_running

from fdshare.cli.support.health import CheckCommand, HealthProbe, Target
from fdshare.kernel.descriptor import Descriptor

ANSWER = """
import socket, sys
listener = socket.socket(fileno=int(sys.argv[1]))
print(flush=True)
while True:
    sock = listener.accept()[0]
    request = sock.recv(4096)
    if request:
        sock.sendall(sys.argv[2].encode() + b" " + request.split(b"\\r\\n")[0])
    sock.close()
"""


@contextmanager
def version(listener: socket.socket, answer: str) -> Iterator[int]:
    """A process that leads a session and accepts from *listener*; its pid."""
    with subprocess.Popen(
        [sys.executable, "-c", ANSWER, str(listener.fileno()), answer],
        pass_fds=[listener.fileno()],
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


FAMILIES = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::1")]


@pytest.mark.parametrize(("family", "host"), FAMILIES)
def test_an_answer_of_the_version(family: socket.AddressFamily, host: str) -> None:
    with socket.create_server((host, 0), family=family) as listener:
        descriptor = Descriptor.dup_of(listener)
        with descriptor, version(listener, "HTTP/1.1 200 OK") as pid:
            assert HealthProbe(Target(""), descriptor, pid)() == ""
            assert HealthProbe(Target("/healthz"), descriptor, pid)() == ""
            port = listener.getsockname()[1]
            if host == "127.0.0.1":
                assert HealthProbe(Target("/x", host, port), descriptor, pid)() == ""
            # The same answer of another version is none.
            wrong = HealthProbe(Target("/healthz"), descriptor, os.getpid())()
            assert wrong == "no process of it accepted a connection"


def test_a_listener_of_both_families_is_asked_by_either() -> None:
    """What accepts a connection of IPv4 there is a socket of IPv6; it was not found."""
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        descriptor = Descriptor.dup_of(listener)
        port = listener.getsockname()[1]
        with descriptor, version(listener, "HTTP/1.1 200 OK") as pid:
            for host in ("127.0.0.1", "::1"):
                assert HealthProbe(Target("/", host, port), descriptor, pid)() == ""


def test_an_answer_that_says_no() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        descriptor = Descriptor.dup_of(listener)
        with descriptor, version(listener, "HTTP/1.1 503 Busy") as pid:
            probe = HealthProbe(Target("/healthz"), descriptor, pid)
            assert probe() == "GET /healthz: 503 Busy GET /healthz HTTP/1.1"
        with descriptor, version(listener, "hello") as pid:
            pass


def test_nobody_accepts_and_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, Descriptor.dup_of(listener) as held:
        probe = HealthProbe(Target(""), held, os.getpid())
        assert probe() == "no process of it accepted a connection"
    assert "refused" in probe()


def test_a_unix_socket(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
        listener.listen()
        descriptor = Descriptor.dup_of(listener)
        with descriptor, version(listener, "HTTP/1.1 302 Found") as pid:
            assert HealthProbe(Target("/"), descriptor, pid)() == ""
            wrong = HealthProbe(Target("/"), descriptor, os.getpid())()
            assert wrong == "no process of it accepted a connection"


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("tcp", Target("")),
        ("/healthz?x=1", Target("/healthz?x=1")),
        ("http://localhost", Target("/", "localhost", 80)),
        ("http://[::1]:8080/x?y", Target("/x?y", "::1", 8080)),
    ],
)
def test_what_is_asked(text: str, target: Target) -> None:
    assert Target.parse(text) == target


@pytest.mark.parametrize(
    "text", ["", "https://x/", "udp", "http://h:99999/", "http://h:http/", "http://[::1/"]
)
def test_what_cannot_be_asked(text: str) -> None:
    with pytest.raises(ValueError):
        Target.parse(text)


def test_a_command(until) -> None:
    with CheckCommand("test $FDSHARE_DEPLOY_PID = 17", 17) as check:
        until(lambda: check() == "", "the command succeeds")
    with CheckCommand("exit 4", 17) as check:
        until(lambda: check() == "--check ended with status 4", "the command fails")


def test_a_command_that_hangs_ends_with_what_it_started(folder: Path, until) -> None:
    """It has the time that the caller waits, and not 5 seconds."""
    with CheckCommand(f"sleep 1000 & echo $! > {folder}/pid; wait", 17) as check:
        until(lambda: check() and (folder / "pid").exists(), "it runs")
        pid = int(until((folder / "pid").read_text, "it has a child"))
        assert check() == "--check has not ended"
        assert is_running(pid)
    until(lambda: not is_running(pid), "it ends with the command")
