"""Peers written in C, from the man pages alone, talk to fdshare in both directions."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fdshare.errors import MagicMismatch, RemoteError
from fdshare.kernel import (
    Credentials,
    Descriptor,
    Listener,
    cli_conn,
    enable_credentials,
    listen,
    recv_fd,
    recv_fds,
    send_err,
    send_fd,
    send_fds,
)

SOURCES = Path(__file__).with_name("peers")
MAGIC = b"\xab"

Peer = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the compiled programs."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    built = tmp_path_factory.mktemp("peers")
    for source in SOURCES.glob("*.c"):
        command = [compiler, "-Wall", "-Wextra", "-o", built / source.stem, source]
        subprocess.run(command, check=True)
    return built


@pytest.fixture
def listener(folder: Path) -> Iterator[Listener]:
    with listen(folder / "s") as listener:
        listener.socket.settimeout(20)
        yield listener


@pytest.fixture
def peer(programs: Path, folder: Path) -> Iterator[Peer]:
    """Starts `program PATH arguments...`; all must have ended well when the test is over."""
    started: list[subprocess.Popen[str]] = []

    def start(program: str, *arguments: object) -> subprocess.Popen[str]:
        command = [programs / program, folder / "s", *map(str, arguments)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(child)
        return child

    yield start
    for child in started:
        child.communicate(timeout=20)
        assert child.returncode == 0, child.args


def accept(listener: Listener) -> socket.socket:
    conn, _ = listener.accept()
    conn.settimeout(20)
    return conn


def write_to(descriptor: Descriptor) -> None:
    with descriptor.open("w") as file:
        file.write("from Python\n")


def test_c_sends_rights(listener: Listener, peer: Peer, folder: Path) -> None:
    peer("rights", "send", folder / "file")
    with accept(listener) as conn, recv_fds(conn, 1, 1, expect=MAGIC) as got:
        write_to(got.descriptors[0])
    assert (folder / "file").read_text() == "from Python\n"


def test_c_sends_another_magic_than_expected(listener: Listener, peer: Peer, folder: Path) -> None:
    peer("rights", "send", folder / "file")
    with accept(listener) as conn, pytest.raises(MagicMismatch, match="xab"):
        recv_fds(conn, 1, 1, expect=b"\xcd")


def test_c_receives_rights(listener: Listener, peer: Peer, folder: Path) -> None:
    child = peer("rights", "recv")
    with accept(listener) as conn, open(folder / "file", "w") as file:
        send_fds(conn, [file], MAGIC)
    child.communicate(timeout=20)
    assert (folder / "file").read_text() == "from C\n"


@pytest.mark.parametrize("order", ["rights-first", "credentials-first"])
def test_c_sends_rights_and_credentials(
    listener: Listener, peer: Peer, folder: Path, order: str
) -> None:
    child = peer("credentials", order, folder / "file")
    with accept(listener) as conn:
        enable_credentials(conn)
        with recv_fds(conn, 1, 1, expect=MAGIC) as got:
            assert got.credentials == Credentials(child.pid, os.getuid(), os.getgid())
            write_to(got.descriptors[0])
    assert (folder / "file").read_text() == "from Python\n"


def test_c_receives_rights_and_credentials(listener: Listener, peer: Peer, folder: Path) -> None:
    child = peer("credentials", "recv")
    with accept(listener) as conn, open(folder / "file", "w") as file:
        send_fds(conn, [file], MAGIC, credentials=True)
    out, _ = child.communicate(timeout=20)
    assert out == f"{os.getpid()} {os.geteuid()} {os.getegid()}\n"
    assert (folder / "file").read_text() == "from C\n"


def test_c_speaks_the_convention(listener: Listener, peer: Peer, folder: Path) -> None:
    said: list[bytes] = []
    peer("convention", "send", folder / "file")
    with accept(listener) as conn:
        write_to(recv_fd(conn, said.append))
    assert b"".join(said) == b"here you are"
    assert (folder / "file").read_text() == "from Python\n"


def test_c_refuses(listener: Listener, peer: Peer) -> None:
    peer("convention", "refuse", 13)
    with accept(listener) as conn, pytest.raises(RemoteError, match="no, not that one") as caught:
        recv_fd(conn)
    assert caught.value.status == 13


def test_c_is_sent_a_descriptor(listener: Listener, peer: Peer, folder: Path) -> None:
    child = peer("convention", "recv")
    with accept(listener) as conn, open(folder / "file", "w") as file:
        send_fd(conn, file)
    assert child.communicate(timeout=20)[0] == ""
    assert (folder / "file").read_text() == "from C\n"


def test_c_is_refused(listener: Listener, peer: Peer) -> None:
    children = [peer("convention", "recv") for _ in range(2)]
    with accept(listener) as conn:
        send_err(conn, 42, "no, not that one")
    with accept(listener) as conn:
        send_err(conn, 42, PermissionError("not yours"))
    said = {child.communicate(timeout=20)[0] for child in children}
    assert said == {"status 42: no, not that one\n", "status 42: PermissionError: not yours\n"}


def test_c_is_the_server(peer: Peer, folder: Path) -> None:
    child = peer("convention", "serve", folder / "file")
    assert child.stdout is not None
    assert child.stdout.readline() == "listening\n"
    with cli_conn(folder / "s") as conn:
        conn.settimeout(20)
        write_to(recv_fd(conn))
    assert (folder / "file").read_text() == "from Python\n"
