"""A borrowed socket says what a socket object does."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from fdshare.kernel import borrowed_socket as module
from fdshare.kernel import system
from fdshare.kernel.borrowed_socket import (
    BorrowedSocket,
    borrowed_socket,
    can_be_asked,
    has_connections,
)

STREAM, DATAGRAM, PACKETS = socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET
FAMILIES = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
on_linux = pytest.mark.skipif(not system.LINUX, reason="the fields of sockets are Linux's")


@pytest.fixture(params=["with ctypes", "without"])
def with_ctypes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    module.import_ctypes()
    if request.param == "without":
        monkeypatch.setattr(module, "_libc", None)


@pytest.fixture
def file() -> Iterator[int]:
    fd = os.open(os.devnull, os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.mark.usefixtures("with_ctypes")
@pytest.mark.parametrize(("family", "host"), FAMILIES)
def test_names(family: int, host: str) -> None:
    with socket.create_server((host, 0), family=family) as listener:
        borrowed = borrowed_socket(listener.fileno())
        assert borrowed.getsockname() == listener.getsockname()
        with pytest.raises(OSError) as caught:
            borrowed.getpeername()
        assert caught.value.errno == errno.ENOTCONN
        borrowed.detach()
        with socket.create_connection(listener.getsockname()[:2]) as near:
            far, _ = listener.accept()
            borrowed = borrowed_socket(near.fileno())
            assert borrowed.getpeername() == far.getsockname()
            assert (borrowed.family, borrowed.type) == (near.family, near.type)
            assert borrowed.fileno() == borrowed.detach() == near.fileno()
            far.close()


@on_linux
def test_a_name_with_a_scope() -> None:
    raw = struct.pack("=HHI16sI", socket.AF_INET6, 0, 0, socket.inet_pton(10, "fe80::1"), 7)

    def call(fd: int, buffer: object, length: object) -> int:
        ctypes.memmove(buffer, raw, len(raw))
        return 0

    with socket.socket(socket.AF_INET6) as sock:
        assert BorrowedSocket(sock.fileno(), sock.family)._name(call) == ("fe80::1", 0, 0, 7)


@pytest.mark.usefixtures("with_ctypes")
def test_options() -> None:
    linger = struct.pack("@ii", 1, 30)
    with socket.socket() as sock:
        borrowed = borrowed_socket(sock.fileno())
        borrowed.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        assert borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == linger
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == linger
        assert borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == STREAM
        with pytest.raises(OSError) as caught:
            borrowed.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"")
        assert caught.value.errno == errno.EINVAL
        borrowed.detach()


@pytest.mark.usefixtures("with_ctypes")
def test_what_is_no_socket(file: int) -> None:
    with pytest.raises(OSError) as caught:
        borrowed_socket(file)
    assert caught.value.errno == errno.ENOTSOCK
    assert can_be_asked(file)
    assert not has_connections(file)
    os.fstat(file)


@pytest.mark.usefixtures("with_ctypes")
@pytest.mark.parametrize(
    ("family", "kind", "unix", "connections"),
    [
        (socket.AF_UNIX, STREAM, True, True),
        (socket.AF_UNIX, PACKETS, True, True),
        (socket.AF_UNIX, DATAGRAM, True, False),
        (socket.AF_INET, STREAM, False, True),
        (socket.AF_INET6, STREAM, False, True),
        (socket.AF_INET, DATAGRAM, False, False),
        (socket.AF_INET6, DATAGRAM, False, False),
    ],
)
def test_what_can_be_asked_and_polled(
    family: int, kind: int, unix: bool, connections: bool
) -> None:
    with socket.socket(family, kind) as sock:
        assert can_be_asked(sock.fileno()) is unix
        assert has_connections(sock.fileno()) is connections


@on_linux
@pytest.mark.parametrize(
    ("family", "protocol", "connections"),
    # IPPROTO_MPTCP, IPPROTO_SCTP; AF_VSOCK, whose poll(2) waits for its lock.
    [(socket.AF_INET, 262, True), (socket.AF_INET, 132, False), (40, 0, False)],
)
def test_other_streams(family: int, protocol: int, connections: bool) -> None:
    try:
        sock = socket.socket(family, STREAM, protocol)
    except OSError:
        pytest.skip("this kernel has none")
    with sock:
        assert not can_be_asked(sock.fileno())
        assert has_connections(sock.fileno()) is connections


@on_linux
def test_a_family_and_a_type_without_a_word() -> None:
    assert module._known(socket.AddressFamily, 1) is socket.AF_UNIX
    assert module._known(socket.AddressFamily, 4711) == 4711
