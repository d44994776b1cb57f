"""probe: what is told of each type of descriptor, against descriptors made for it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdshare.protocol.messages import DescriptorInfo
from fdshare.server.loop.inspect import describe_descriptor, local_mounts

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's /proc")

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close sends RST


@pytest.fixture
def owned() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def own(stack: ExitStack, fd: int) -> int:
    stack.callback(os.close, fd)
    return fd


def tcp(host: str = "127.0.0.1", backlog: int = 5) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family, backlog=backlog)


# Sockets.


def test_a_tcp_listener() -> None:
    with tcp() as listener, socket.create_connection(listener.getsockname()):
        port = listener.getsockname()[1]
        assert describe_descriptor(listener.fileno()) == DescriptorInfo(
            "socket",
            access="rw",
            family="inet",
            socket_type="stream",
            local=f"127.0.0.1:{port}",
            listening=True,
            queue=1,
            backlog=5,
        )


def test_an_ipv6_listener_has_brackets() -> None:
    try:
        listener = tcp("::1")
    except OSError:
        pytest.skip("no IPv6 loopback here")
    with listener:
        info = describe_descriptor(listener.fileno())
        assert info.family == "inet6"
        assert info.local == f"[::1]:{listener.getsockname()[1]}"


def test_a_full_tcp_queue_is_unhealthy() -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(tcp(backlog=1))
        for _ in range(2):
            stack.enter_context(socket.create_connection(listener.getsockname()))
        info = describe_descriptor(listener.fileno())
        assert (info.queue, info.backlog) == (2, 1)
        assert "nobody accepts: 2 connections" in info.health
        listener.accept()[0].close()
        assert describe_descriptor(listener.fileno()).health == ""


def test_a_connection_knows_both_ends_and_when_the_peer_goes() -> None:
    with tcp() as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, peer = listener.accept()
        with accepted:
            info = describe_descriptor(accepted.fileno())
            assert info.local == f"127.0.0.1:{listener.getsockname()[1]}"
            assert info.peer == f"127.0.0.1:{peer[1]}"
            assert (info.listening, info.queue, info.health) == (False, None, "")
            client.close()
            assert accepted.recv(1) == b""
            assert describe_descriptor(accepted.fileno()).health == "the peer has closed its side"


def test_a_reset_connection() -> None:
    with tcp() as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            client.close()
            poller = select.poll()
            poller.register(accepted, select.POLLHUP)
            assert poller.poll(10_000)
            info = describe_descriptor(accepted.fileno())
            assert (info.peer, info.health) == ("", "the peer is gone")
            # SO_ERROR is still there for its owner.
            with pytest.raises(ConnectionResetError):
                accepted.recv(1)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_an_unused_socket_is_healthy(family: int) -> None:
    with socket.socket(family) as sock:
        info = describe_descriptor(sock.fileno())
        assert (info.local, info.peer, info.health) == ("", "", "")


def test_a_udp_socket_and_its_peer() -> None:
    kind = socket.SOCK_DGRAM
    with socket.socket(type=kind) as one, socket.socket(type=kind) as other:
        one.bind(("127.0.0.1", 0))
        other.connect(one.getsockname())
        info = describe_descriptor(other.fileno())
        assert info.socket_type == "dgram"
        assert info.peer == f"127.0.0.1:{one.getsockname()[1]}"
        assert info.queue is None


def test_a_unix_listener_on_its_path(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
        listener.listen(3)
        info = describe_descriptor(listener.fileno())
        assert info.family == "unix"
        assert info.local == str(folder / "s")
        assert info.listening
        assert info.health == ""


def test_a_unix_listener_whose_queue_is_full(folder: Path) -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(folder / "s"))
        listener.listen(1)
        for _ in range(2):
            stack.enter_context(socket.socket(socket.AF_UNIX)).connect(str(folder / "s"))
        info = describe_descriptor(listener.fileno())
        if info.queue is None:
            pytest.skip("this kernel has no unix_diag")
        assert (info.queue, info.backlog) == (2, 1)
        assert "nobody accepts" in info.health


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_unix_path_unlinked_and_replaced(folder: Path, kind: int) -> None:
    path = folder / "s"
    with socket.socket(socket.AF_UNIX, kind) as sock, socket.socket(socket.AF_UNIX, kind) as other:
        sock.bind(str(path))
        if kind == socket.SOCK_STREAM:
            sock.listen()
        path.rename(folder / "kept")  # so that its inode's number is not used again
        assert "nothing is at" in describe_descriptor(sock.fileno()).health
        other.bind(str(path))
        assert "something else is at" in describe_descriptor(sock.fileno()).health
        path.unlink()
        (folder / "kept").rename(path)
        assert describe_descriptor(sock.fileno()).health == ""


def test_an_accepted_unix_connection_does_not_need_its_path(folder: Path) -> None:
    path = folder / "s"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(path))
        listener.listen()
        client.connect(str(path))
        accepted, _ = listener.accept()
        with accepted:
            path.unlink()
            info = describe_descriptor(accepted.fileno())
            assert (info.local, info.peer, info.health) == (str(path), f"pid {os.getpid()}", "")
            client.close()
            assert describe_descriptor(accepted.fileno()).health == "the peer is gone"


def test_an_abstract_name() -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(b"\0fdshare-probe-%d" % os.getpid())
        listener.listen()
        info = describe_descriptor(listener.fileno())
        assert info.local == f"@fdshare-probe-{os.getpid()}"
        assert info.health == ""


def test_a_relative_path_is_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s")
        listener.listen()
        monkeypatch.chdir("/")
        info = describe_descriptor(listener.fileno())
        assert (info.local, info.health) == ("s", "")


def test_a_path_that_is_not_utf8_can_be_sent(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fsencode(folder) + b"/\xff")
        listener.listen()
        info = describe_descriptor(listener.fileno())
        assert info.local.endswith("/\\xff")
        msgspec.msgpack.encode(info)


def test_our_own_shutdown_is_not_the_peers(owned: ExitStack) -> None:
    with tcp() as listener:
        client = owned.enter_context(socket.create_connection(listener.getsockname()))
        owned.enter_context(listener.accept()[0])
        client.shutdown(socket.SHUT_RD)
        assert describe_descriptor(client.fileno()).health == "shut down for reading"


# Files, pipes and the rest.


def test_a_file_its_offset_and_its_end(folder: Path) -> None:
    path = folder / "log"
    path.write_bytes(b"x" * 100)
    with path.open("rb", buffering=0) as file:
        file.seek(42)
        info = describe_descriptor(file.fileno())
        assert info == DescriptorInfo("file", access="r", path=str(path), offset=42, size=100)
        path.unlink()
        info = describe_descriptor(file.fileno())
        assert (info.path, info.health) == (f"{path} (deleted)", "")


@pytest.mark.parametrize(
    ("flags", "access"),
    [(os.O_RDONLY, "r"), (os.O_WRONLY, "w"), (os.O_RDWR, "rw"), (os.O_PATH, "path")],
)
def test_access(folder: Path, owned: ExitStack, flags: int, access: str) -> None:
    (folder / "f").touch()
    fd = own(owned, os.open(folder / "f", flags))
    info = describe_descriptor(fd)
    assert (info.type, info.access, info.size) == ("file", access, 0)


def test_a_directory_a_device_and_a_terminal(folder: Path, owned: ExitStack) -> None:
    assert describe_descriptor(own(owned, os.open(folder, os.O_RDONLY))).type == "directory"
    assert describe_descriptor(own(owned, os.open("/dev/null", os.O_RDWR))).type == "device"
    for end in pty.openpty():
        assert describe_descriptor(own(owned, end)).type == "tty"


def test_the_mounts_are_those_that_are_given(folder: Path, owned: ExitStack) -> None:
    """Who describes many descriptors reads them once."""
    fd = own(owned, os.open(folder, os.O_RDWR | os.O_TMPFILE))
    assert describe_descriptor(fd, mounts=local_mounts).size == 0
    assert describe_descriptor(fd, mounts=frozenset).size is None


DETACHED = """
import os, subprocess, sys
from fdshare.server.loop.inspect import describe_descriptor
subprocess.run(["mount", "-t", "tmpfs", "none", sys.argv[1]], check=True)
with open(sys.argv[1] + "/f", "wb", buffering=0) as file:
    file.write(b"12345")
    print(describe_descriptor(file.fileno()).size)
    subprocess.run(["umount", "-l", sys.argv[1]], check=True)
    info = describe_descriptor(file.fileno())
    print(info.size, info.type, info.offset)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_file_system_we_do_not_know_is_not_asked(folder: Path) -> None:
    assert in_a_namespace(DETACHED, folder) == "5\nNone file 5\n"


def in_a_namespace(code: str, folder: Path) -> str:
    """What *code* prints in a mount namespace of its own."""
    command = ["unshare", "--mount", sys.executable, "-c", code, str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("no unshare(1)")
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return done.stdout


CHROOT = """
import os, subprocess, sys
from fdshare.server.loop.inspect import describe_descriptor
os.mkdir(sys.argv[1] + "/proc")
subprocess.run(["mount", "-t", "proc", "none", sys.argv[1] + "/proc"], check=True)
os.mkfifo(sys.argv[1] + "/p")
os.chroot(sys.argv[1])
info = describe_descriptor(os.open("/p", os.O_RDONLY | os.O_NONBLOCK))
print(info.type, info.path)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_fifo_in_a_chroot_whose_root_is_no_mount(folder: Path) -> None:
    """mountinfo has no mount that it would be on."""
    assert in_a_namespace(CHROOT, folder) == "pipe /p\n"


def test_pipes(owned: ExitStack) -> None:
    reader, writer = os.pipe()
    assert describe_descriptor(reader) == DescriptorInfo("pipe", access="r")
    assert describe_descriptor(writer) == DescriptorInfo("pipe", access="w")
    os.close(writer)
    assert describe_descriptor(reader).health == "no writer is left"
    os.close(reader)
    reader, writer = os.pipe()
    os.close(reader)
    assert describe_descriptor(own(owned, writer)).health == "no reader is left"


def test_a_fifo(folder: Path, owned: ExitStack) -> None:
    os.mkfifo(folder / "p")
    fd = own(owned, os.open(folder / "p", os.O_RDONLY | os.O_NONBLOCK))
    info = describe_descriptor(fd)
    assert (info.type, info.path) == ("pipe", str(folder / "p"))


def test_a_memfd_and_its_seals(owned: ExitStack) -> None:
    fd = own(owned, os.memfd_create("probe", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC))
    os.write(fd, b"x" * 4096)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    info = describe_descriptor(fd)
    assert (info.type, info.size, info.seals) == ("memfd", 4096, ["shrink", "grow"])
    assert info.path == "/memfd:probe (deleted)"


def test_a_pidfd_names_its_process_and_its_end(owned: ExitStack) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with child:
        fd = own(owned, os.pidfd_open(child.pid))
        info = describe_descriptor(fd)
        assert (info.type, info.peer, info.health) == ("pidfd", f"pid {child.pid}", "")
        child.kill()
        child.wait()
    info = describe_descriptor(fd)
    assert (info.type, info.peer, info.health) == ("pidfd", "", "the process has ended")


def test_what_has_no_type_of_its_own_is_called_what_proc_calls_it(owned: ExitStack) -> None:
    epoll = owned.enter_context(select.epoll())
    assert describe_descriptor(epoll.fileno()).type == "eventpoll"
    namespace = own(owned, os.open("/proc/self/ns/user", os.O_RDONLY))
    info = describe_descriptor(namespace)
    assert info.type == "namespace"
    assert info.path.startswith("user:[")


@pytest.mark.skipif(not hasattr(os, "eventfd"), reason="no eventfd")
def test_an_eventfd(owned: ExitStack) -> None:
    assert describe_descriptor(own(owned, os.eventfd(0))).type == "eventfd"


@given(st.integers())
def test_never_raises(number: int) -> None:
    fd = number if number not in range(1 << 20) else number + (1 << 20)
    info = describe_descriptor(fd)
    assert (info.type, info.health) == ("unknown", "the descriptor is not open")


def test_nothing_is_opened_closed_or_changed(owned: ExitStack) -> None:
    one, other = socket.socketpair()
    with one, other:
        one.setblocking(False)
        other.send(b"x")
        before = os.listdir("/proc/self/fd")
        describe_descriptor(one.fileno())
        assert os.listdir("/proc/self/fd") == before
        assert fcntl.fcntl(one, fcntl.F_GETFL) & os.O_NONBLOCK
        assert one.recv(2) == b"x"
