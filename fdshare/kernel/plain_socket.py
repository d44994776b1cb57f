"""Socket objects that do not take the program's `socket.setdefaulttimeout()`.

With a default timeout, `socket.socket(fileno=...)` and `socket.socketpair()` set O_NONBLOCK. That
is a flag of the open file description, so that every process that shares it gets EAGAIN where it
waited.
"""

from __future__ import annotations

import os
import socket
from typing import Final

from fdshare.kernel import system

__all__ = ["WITHOUT_TIMEOUT", "socket_of", "stream_pair", "view_of"]

# A socket object with this in its type has a timeout of 0, whatever the default is, and is made
# without a system call for it (init_sockobject, Modules/socketmodule.c). It takes the description
# as it is: what blocks there blocks. macOS has none.
WITHOUT_TIMEOUT: Final = system.SOCK_NONBLOCK


def view_of(fd: int) -> socket.socket:
    """A socket object on *fd* that leaves the open file description as it is.

    It owns *fd*: who only borrows that calls `detach`. Raises: OSError (ENOTSOCK, EBADF).
    """
    if socket.getdefaulttimeout() is None:
        return socket.socket(fileno=fd)
    blocks = os.get_blocking(fd)
    probe = socket.socket(-1, socket.SOCK_STREAM | WITHOUT_TIMEOUT, 0, fd)
    try:
        kind = probe.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
    finally:
        probe.detach()
    sock = socket.socket(-1, kind | WITHOUT_TIMEOUT, -1, fd)
    if not WITHOUT_TIMEOUT:
        sock.setblocking(blocks)
    return sock


def socket_of(fd: int) -> socket.socket:
    """As `view_of`, and without a timeout if the description blocks."""
    sock = view_of(fd)
    if sock.gettimeout() is not None:
        try:
            if os.get_blocking(fd):
                sock.settimeout(None)
        except BaseException:
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
