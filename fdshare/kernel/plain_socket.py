"""Socket objects that do not take the program's `socket.setdefaulttimeout()`.

With a default timeout, `socket.socket(fileno=...)` and `socket.socketpair()` set O_NONBLOCK. That
is a flag of the open file description, so that every process that shares it gets EAGAIN where it
waited.
"""

from __future__ import annotations

import fcntl
import os
import socket
from _socket import socket as _Socket
from typing import Final

from fdshare.kernel import system

__all__ = ["WITHOUT_TIMEOUT", "above_standard", "socket_of", "stream_pair", "view_of"]

# A socket object with this in its type has a timeout of 0, whatever the default is, and is made
# without a system call for it (init_sockobject, Modules/socketmodule.c). It takes the description
# as it is: what blocks there blocks. macOS has none.
WITHOUT_TIMEOUT: Final = system.SOCK_NONBLOCK


def view_of(fd: int) -> socket.socket:
    """A socket object on *fd* that leaves the open file description as it is.

    It owns *fd*: who only borrows that calls `detach`. Whatever is raised, *fd* is still open, and
    its caller's. Raises: OSError (ENOTSOCK, EBADF).
    """
    if socket.getdefaulttimeout() is None:
        return _made(fd, -1)
    blocks = os.get_blocking(fd)
    sock = _made(fd, _type_of(fd) | WITHOUT_TIMEOUT)
    if not WITHOUT_TIMEOUT:
        sock.setblocking(blocks)
    return sock


def socket_of(fd: int) -> socket.socket:
    """As `view_of`, and without a timeout if the description blocks."""
    sock = view_of(fd)
    try:
        if sock.gettimeout() is not None and os.get_blocking(fd):
            sock.settimeout(None)
    except BaseException:
        sock.detach()
        raise
    return sock


def above_standard(sock: socket.socket) -> socket.socket:
    """*sock*, or a duplicate in its place if it has the number of a standard stream, which is
    closed here.

    What is said there would go into the socket, and a child to whom it is passed has a stream of
    its own with that number. Takes *sock* over; the caller owns the result.
    """
    if sock.fileno() > 2:
        return sock
    with sock:
        return socket_of(fcntl.fcntl(sock, fcntl.F_DUPFD_CLOEXEC, 3))


def _type_of(fd: int) -> int:
    probe = _Socket.__new__(_Socket)  # in C: no handler comes into its methods
    try:
        _Socket.__init__(probe, -1, socket.SOCK_STREAM | WITHOUT_TIMEOUT, 0, fd)
        return probe.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
    finally:
        probe.detach()


def _made(fd: int, type: int, proto: int = -1) -> socket.socket:
    """A socket object on *fd*, which is its caller's if this raises: a signal's handler may raise
    after any call, and the object would close *fd* with its last reference."""
    cls = socket.socket
    sock = cls.__new__(cls)
    owns = False
    try:
        cls.__init__(sock, -1, type, proto, fd)
        owns = True
    except BaseException:
        if isinstance(sock, _Socket) or owns:  # those of gevent and eventlet can not, before it
            sock.detach()
        raise
    return sock


def stream_pair(kind: int = socket.SOCK_STREAM) -> tuple[socket.socket, socket.socket]:
    """Two connected AF_UNIX sockets that block. The caller owns the result."""
    pair = socket.socketpair(socket.AF_UNIX, kind)
    if socket.getdefaulttimeout() is not None:
        for sock in pair:
            sock.settimeout(None)
    return pair
