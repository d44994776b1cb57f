"""The socket of NAME=ADDRESS: every way in which what is held can differ."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commandline import FDSHARE, Shell

from fdshare import Client, Descriptor, connect

WHERE = """
import json, socket, sys
s = socket.socket(fileno=3)
name = s.getsockname()
print(json.dumps([s.family.name, s.type.name, name.decode() if type(name) is bytes else name]))
"""


@pytest.fixture
def client(fdshare: Shell) -> Iterator[Client]:
    with connect(fdshare.path) as client:
        yield client


def where(shell: Shell, *words: str) -> list[object]:
    """Family, type and address of the socket that a program gets; `run` may say something."""
    done = shell.run("run", *words, "--", sys.executable, "-c", WHERE)
    assert done.returncode == 0, done
    found: list[object] = json.loads(done.stdout)
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def reaches(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


def test_another_address_is_refused_kept_or_bound(fdshare: Shell, folder: Path) -> None:
    one, two = free_port(), free_port()
    path = folder / "a.sock"
    fdshare("run", f"web=tcp://127.0.0.1:{one}", "--", "true")
    others = {
        f"web=tcp://127.0.0.1:{two}": ["AF_INET", "SOCK_STREAM", ["127.0.0.1", two]],
        f"web=udp://127.0.0.1:{one}": ["AF_INET", "SOCK_DGRAM", ["127.0.0.1", one]],
        f"web=unix://{path}": ["AF_UNIX", "SOCK_STREAM", str(path)],
        "web=unix:@fdshare-test-rebind": ["AF_UNIX", "SOCK_STREAM", "\0fdshare-test-rebind"],
    }
    before: list[object] = ["AF_INET", "SOCK_STREAM", ["127.0.0.1", one]]
    for words, after in others.items():
        assert "--rebind replaces it" in fdshare.fails("run", words, "--", "true")
        assert where(fdshare, "--keep", words) == before
        assert where(fdshare, "--rebind", words) == after
        assert where(fdshare, words) == after
        before = after
    assert [entry["name"] for entry in fdshare.json("ls")] == ["web"]


def test_a_port_the_kernel_chose_is_any(fdshare: Shell) -> None:
    port = free_port()
    fdshare("run", f"web=tcp://127.0.0.1:{port}", "--", "true")
    assert where(fdshare, "web=tcp://127.0.0.1:0")[2] == ["127.0.0.1", port]
    assert "not at tcp://0.0.0.0:0" in fdshare.fails("run", "web=tcp://0.0.0.0:0", "--", "true")


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_an_ipv6_address_is_itself(fdshare: Shell) -> None:
    fdshare("run", "web=tcp://[::1]:0", "--", "true")
    assert where(fdshare, "web=tcp://[::1]:0")[0] == "AF_INET6"
    assert "inet6/stream" in fdshare.fails("run", "web=tcp://127.0.0.1:0", "--", "true")


def test_who_has_the_old_socket_keeps_it(fdshare: Shell, client: Client) -> None:
    old = client.bind("web", "tcp://127.0.0.1:0")
    with old:
        where(fdshare, "--rebind", f"web=tcp://127.0.0.1:{free_port()}")
        with socket.create_connection(old.getsockname(), timeout=30):
            old.accept()[0].close()


def test_what_is_no_socket_is_never_passed_as_one(fdshare: Shell, client: Client) -> None:
    reads, writes = map(Descriptor, os.pipe())
    near, far = socket.socketpair()
    with reads, writes, near, far, open("/proc/version") as file:
        client.register("pipe", reads)
        client.register("file", file)
        client.register("connection", near)
    for name, what in {
        "pipe": "it is a pipe, not a socket",
        "file": "it is a file, not a socket",
        "connection": "it is a socket unix/stream, not tcp",
    }.items():
        line = fdshare.fails("run", f"{name}=tcp://127.0.0.1:0", "--", "true")
        assert what in line
    line = fdshare.fails("run", "connection=unix:@fdshare-test-none", "--", "true")
    assert "it does not listen" in line
    assert where(fdshare, "--rebind", "file=tcp://127.0.0.1:0")[0] == "AF_INET"


def test_a_listener_that_somebody_shut_down(fdshare: Shell, client: Client, folder: Path) -> None:
    path = folder / "a.sock"
    addresses = {"web": f"tcp://127.0.0.1:{free_port()}", "app": f"unix://{path}"}
    for name, address in addresses.items():
        with client.bind(name, address) as sock:
            sock.shutdown(socket.SHUT_RDWR)
    line = fdshare.fails("run", f"web={addresses['web']}", "--", "true")
    assert "somebody has shut it down" in line
    line = fdshare.fails("run", f"app={addresses['app']}", "--", "true")
    assert "it is shut down, nobody can connect" in line
    assert "nobody can connect" in fdshare.run("run", "app", "--", "true").stderr
    for name, address in addresses.items():
        where(fdshare, "--rebind", f"{name}={address}")
    assert reaches(path)


def test_a_path_that_is_gone_is_bound_anew(fdshare: Shell, folder: Path) -> None:
    """As asyncio of Python 3.13 leaves it: it unlinks the path when the old version stops."""
    path = folder / "a.sock"
    fdshare("run", f"app=unix://{path}?mode=0666", "--", "true")
    path.unlink()
    assert "nothing is at" in fdshare.run("run", "app", "--", "true").stderr
    assert "nothing is at" in fdshare.fails("fetch", "--check", "app")
    done = fdshare.run("run", f"app=unix://{path}?mode=0666", "--", "true")
    assert done.returncode == 0
    assert done.stderr == f"fdshare: app is bound anew, at unix://{path}?mode=0666\n"
    assert reaches(path)
    assert path.stat().st_mode & 0o777 == 0o666
    fdshare("fetch", "--check", "app")


def test_another_socket_on_the_path_is_refused(fdshare: Shell, folder: Path) -> None:
    path = folder / "a.sock"
    fdshare("run", f"app=unix://{path}", "--", "true")
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        line = fdshare.fails("run", f"app=unix://{path}", "--", "true")
        assert "something else is at" in line
        assert "in use" in fdshare.fails("run", "--rebind", f"app=unix://{path}", "--", "true")


def test_another_mode_is_refused_or_set(fdshare: Shell, folder: Path) -> None:
    path = folder / "a.sock"
    fdshare("run", f"app=unix://{path}", "--", "true")
    line = fdshare.fails("run", f"app=unix://{path}?mode=0666", "--", "true")
    assert "the mode of its file is 0600" in line
    fdshare("run", "--rebind", f"app=unix://{path}?mode=0666", "--", "true")
    assert path.stat().st_mode & 0o777 == 0o666
    fdshare("run", f"app=unix://{path}", "--", "true")


BIND = """
import fdshare, sys
with fdshare.connect() as client, client.bind("app", sys.argv[1]) as sock:
    print(sock.getsockname())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_a_path_that_is_there_for_the_server_is_not_gone(fdshare: Shell, folder: Path) -> None:
    """A container has a mount namespace of its own, and sees the path of the rendezvous alone."""
    inner = folder / "inner"
    inner.mkdir()
    address = f"unix://{inner}/a.sock"
    fdshare("run", f"app={address}", "--", "true")
    generation = fdshare.json("info", "app")["generation"]
    hidden = f'mount -t tmpfs tmpfs {inner} && exec "$@"'
    for words in (
        [*FDSHARE, "run", f"app={address}", "--", sys.executable, "-c", WHERE],
        [sys.executable, "-c", BIND, address],
    ):
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", hidden, "sh", *words],
            env=fdshare.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if "unshare failed" in done.stderr:
            pytest.skip("no mount namespace here")
        assert done.returncode == 0, done.stderr
        assert f"{inner}/a.sock" in done.stdout
        assert done.stderr == ""
    assert fdshare.json("info", "app")["generation"] == generation
    assert reaches(inner / "a.sock")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a file to any group")
def test_another_group_is_refused_or_set(fdshare: Shell, folder: Path) -> None:
    path = folder / "a.sock"
    fdshare("run", f"app=unix://{path}", "--", "true")
    words = f"app=unix://{path}?mode=0660&group=12345"
    assert "the mode of its file is 0600" in fdshare.fails("run", words, "--", "true")
    path.chmod(0o660)
    assert "the group of its file is 0" in fdshare.fails("run", words, "--", "true")
    fdshare("run", "--rebind", words, "--", "true")
    info = path.stat()
    assert (info.st_mode & 0o777, info.st_gid) == (0o660, 12345)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_ipv6_alone_is_not_both(fdshare: Shell) -> None:
    fdshare("run", "web=tcp://[::]:0", "--", "true")
    assert "not at tcp://*:0" in fdshare.fails("run", "web=tcp://*:0", "--", "true")
    assert where(fdshare, "--rebind", "web=tcp://*:0")[0] == "AF_INET6"
    assert where(fdshare, "web=tcp://*:0")[0] == "AF_INET6"


def test_a_long_path_is_itself(fdshare: Shell, folder: Path) -> None:
    path = folder / ("d" * 60) / ("e" * 60) / "a.sock"
    path.parent.mkdir(parents=True)
    fdshare("run", f"app=unix://{path}?mode=0660", "--", "true")
    fdshare("run", f"app=unix://{path}", "--", "true")
    line = fdshare.fails("run", f"app=unix://{path.with_name('b.sock')}", "--", "true")
    assert "not at unix://" in line
    assert f"unix {path} listening" in fdshare("ls")
    assert fdshare.json("info", "app")["descriptors"][0]["local"] == str(path)
    path.unlink()
    assert f"nothing is at {path} any more" in fdshare("ls")
    # The kernel tells the last part alone: it could be well, in another folder.
    other = path.parent.parent / "a.sock"
    assert "--rebind replaces it" in fdshare.fails("run", f"app=unix://{other}", "--", "true")
    assert "--rebind replaces it" in fdshare.fails("run", f"app=unix://{path}", "--", "true")
    where(fdshare, "--rebind", f"app=unix://{path}")
    fdshare("fetch", "--check", "app")
