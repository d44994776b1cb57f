"""sockets: what arrives is a socket with the same timeout, or KindMismatch."""

from __future__ import annotations

import importlib.util
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable

import msgspec
import pytest

from fdshare.errors import ClosedDescriptor, KindMismatch, UnsupportedKind
from fdshare.kernel.descriptor import Descriptor
from fdshare.kinds import Kind, describe, rebuild
from kinds.common import same_file, through

SOCKETS: dict[str, Callable[[], socket.socket]] = {
    "tcp": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
    "tcp6": lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM),
    "udp": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    "unix": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
    "unix-datagram": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
    "unix-seqpacket": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET),
    "listener": lambda: socket.create_server(("127.0.0.1", 0)),
}


@pytest.mark.parametrize("timeout", [None, 0.0, 2.5])
@pytest.mark.parametrize("make", SOCKETS.values(), ids=SOCKETS)
def test_a_socket_of_any_family_and_type(
    make: Callable[[], socket.socket], timeout: float | None
) -> None:
    with make() as sock:
        sock.settimeout(timeout)
        with through(sock) as other:
            assert type(other) is socket.socket
            assert same_file(sock, other)
            assert (other.family, other.type) == (sock.family, sock.type)
            assert other.gettimeout() == timeout
            assert os.get_blocking(other.fileno()) is (timeout is None)
            assert not os.get_inheritable(other.fileno())


def test_a_socket_ignores_the_default_timeout_of_the_receiver() -> None:
    with socket.socket() as sock:
        kind, fds = describe(sock)
        socket.setdefaulttimeout(7)
        try:
            with rebuild(kind, [Descriptor.dup_of(fds[0])]) as other:
                assert other.gettimeout() is None
                assert os.get_blocking(sock.fileno())
        finally:
            socket.setdefaulttimeout(None)


def test_a_socket_subclass_becomes_a_socket() -> None:
    class Mine(socket.socket):
        pass

    with Mine() as sock, through(sock) as other:
        assert type(other) is socket.socket


def test_a_tls_socket_is_refused() -> None:
    context = ssl.create_default_context()
    with socket.socket() as sock:
        tls = context.wrap_socket(sock, server_hostname="x", do_handshake_on_connect=False)
        with tls, pytest.raises(UnsupportedKind, match="before wrapping"):
            describe(tls)


def test_a_closed_socket_is_an_error() -> None:
    sock = socket.socket()
    sock.close()
    with pytest.raises(ClosedDescriptor):
        describe(sock)


@pytest.mark.parametrize(
    ("proto", "timeout"), [(1 << 40, None), (0, -1.0), (0, 1e300), (0, float("nan"))]
)
def test_numbers_that_no_socket_has(proto: int, timeout: float | None) -> None:
    with socket.socket() as sock:
        spec = [int(sock.family), int(sock.type), proto, timeout]
        copy = Descriptor.dup_of(sock)
        fd = copy.fileno()
        with pytest.raises(KindMismatch) as caught:
            rebuild(Kind("socket", msgspec.Raw(msgspec.msgpack.encode(spec))), [copy])
        assert f"protocol {proto} and a timeout of {timeout}" in str(caught.value)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


GREEN = """
import sys
if sys.argv[2] == "later":
    import fdshare, fdshare.kinds
if sys.argv[1] == "gevent":
    from gevent import monkey
    monkey.patch_all()
else:
    import eventlet
    left = dict.fromkeys(("os", "select", "socket", "thread"), False)
    eventlet.monkey_patch(**left if sys.argv[2] == "but channels" else {})
import os, socket
import fdshare, fdshare.kinds
def child(connection):
    got = connection.recv()
    connection.send((type(got) is socket.socket, os.fstat(got.fileno()).st_ino, got))
near, far = socket.socketpair()
near.settimeout(2.5)
assert fdshare.kinds.describe(near)[0].tag == "socket"
if sys.argv[2] == "later":  # which these libraries advise against: pipes may be in its way
    sys.exit(print("done"))
ctx = fdshare.get_context("fork")
ours, theirs = ctx.Pipe()
process = ctx.Process(target=child, args=(theirs,))
process.start()
ours.send(near)
patched, inode, back = ours.recv()
assert patched and inode == os.fstat(near.fileno()).st_ino
assert type(back) is socket.socket and back.gettimeout() == 2.5
back.sendall(b"x")
assert far.recv(1) == b"x"
process.join()
with ctx.Pool(1) as pool:
    assert pool.apply(socket.socket.gettimeout, (near,)) == 2.5
print("done")
"""


# docs/compat.md says which part of eventlet's patch is in the way of channels.
@pytest.mark.parametrize(
    ("library", "when"),
    [
        ("gevent", "first"),
        ("gevent", "later"),
        ("eventlet", "later"),
        ("eventlet", "but channels"),
    ],
)
def test_sockets_that_a_library_has_put_in_their_place(library: str, when: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    command = [sys.executable, "-W", "ignore", "-c", GREEN, library, when]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "done\n", done.stderr
