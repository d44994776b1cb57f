"""Sockets that other processes may be using, asked in a way that keeps no other thread waiting.

A send(2) of somebody else on the same TCP socket may wait for a page of memory, for ever, and holds
the socket's lock meanwhile (lock_sock() in tcp_sendmsg(), net/ipv4/tcp.c). getsockname(2), most of
setsockopt(2) and some of getsockopt(2) wait for that lock, in a state that not even SIGKILL ends.
The socket module makes these calls with the interpreter's lock held, getsockname(2) for every
object that is made of a number: no thread runs any more. ctypes makes them without.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from contextlib import suppress
from enum import IntEnum
from typing import Any, Final, TypeAlias, overload

from fdshare.kernel import system
from fdshare.kernel.plain_socket import view_of

__all__ = [
    "AnySocket",
    "BorrowedSocket",
    "borrowed_socket",
    "can_be_asked",
    "has_connections",
    "import_ctypes",
]

# See `import_ctypes`. None: sockets are asked as a process asks its own.
_ctypes: Any = None
_libc: Any = None
_libc_at_once: Any = None  # its calls keep the interpreter's lock: for those that never wait

_INT: Final = struct.Struct("@i")
_ADDRESS: Final = 128  # sizeof(struct sockaddr_storage)
_TCP: Final = frozenset((socket.IPPROTO_TCP, 262))  # and IPPROTO_MPTCP, <linux/in.h>


def import_ctypes() -> None:
    """For a process that serves, before it does. On Linux: elsewhere the calls have other numbers.

    Not at import: a process that has imported ctypes has one descriptor more, libffi's own file
    (libffi 3.5 and newer).
    """
    global _ctypes, _libc, _libc_at_once
    if _libc is not None or not system.LINUX:
        return
    with suppress(ImportError, OSError):  # this Python has none
        import ctypes

        _ctypes, _libc = ctypes, ctypes.CDLL(None, use_errno=True)
        _libc_at_once = ctypes.PyDLL(None, use_errno=True)


class BorrowedSocket:
    """What the kernel knows of the socket *fd*, in the words of `socket.socket`: `getsockname` and
    the rest may wait, without the interpreter's lock. `family`, `type`, `proto` and SO_LINGER never
    wait."""

    def __init__(self, fd: int, family: int) -> None:
        """*fd* is borrowed for as long as this is used."""
        self._fd = fd
        self.family = _known(socket.AddressFamily, family)

    @property
    def type(self) -> int:
        return _known(socket.SocketKind, _said_at_once(self._fd, socket.SO_TYPE))

    @property
    def proto(self) -> int:
        return _said_at_once(self._fd, system.SO_PROTOCOL)

    def fileno(self) -> int:
        return self._fd

    def detach(self) -> int:
        """Nothing: it owns nothing."""
        return self._fd

    @overload
    def getsockopt(self, level: int, option: int, /) -> int: ...
    @overload
    def getsockopt(self, level: int, option: int, size: int, /) -> bytes: ...
    def getsockopt(self, level: int, option: int, size: int = 0, /) -> int | bytes:
        """An int, or with *size* at most so many bytes."""
        if not size:
            return _number(_libc, self._fd, level, option)
        buffer = _ctypes.create_string_buffer(size)
        length = _ctypes.c_uint(size)
        _checked(_libc.getsockopt(self._fd, level, option, buffer, _ctypes.byref(length)))
        return bytes(buffer.raw[: length.value])

    def setsockopt(self, level: int, option: int, value: bytes, /) -> None:
        _checked(_libc.setsockopt(self._fd, level, option, value, len(value)))

    def getsockname(self) -> tuple[Any, ...]:
        """As `socket.socket` has it, of IPv4 and IPv6; empty for others."""
        return self._name(_libc.getsockname)

    def getpeername(self) -> tuple[Any, ...]:
        """As `getsockname`. Raises: OSError ENOTCONN."""
        return self._name(_libc.getpeername)

    def _name(self, call: Any) -> tuple[Any, ...]:
        buffer = _ctypes.create_string_buffer(_ADDRESS)
        length = _ctypes.c_uint(_ADDRESS)
        _checked(call(self._fd, buffer, _ctypes.byref(length)))
        raw = buffer.raw
        (port,) = struct.unpack_from("!H", raw, 2)  # <linux/in.h>, <linux/in6.h>
        if self.family == socket.AF_INET:
            return socket.inet_ntop(socket.AF_INET, raw[4:8]), port
        if self.family == socket.AF_INET6:
            flow, host = struct.unpack_from("!I16s", raw, 4)
            return socket.inet_ntop(socket.AF_INET6, host), port, flow, _INT.unpack_from(raw, 24)[0]
        return ()


AnySocket: TypeAlias = socket.socket | BorrowedSocket


def borrowed_socket(fd: int) -> AnySocket:
    """A view of *fd*, to be detached when it is not needed any more: it owns nothing.

    A socket object for a UNIX socket, which has no such lock (unix_getname(), net/unix/af_unix.c),
    and where ctypes was not imported. *fd* is borrowed until then.

    Raises: OSError (ENOTSOCK, EBADF).
    """
    if _libc is None:
        return view_of(fd)
    family = _said_at_once(fd, system.SO_DOMAIN)
    return view_of(fd) if family == socket.AF_UNIX else BorrowedSocket(fd, family)


def can_be_asked(fd: int) -> bool:
    """False for a socket of which some question may wait: all but those of UNIX. Never waits
    itself. *fd* is borrowed for the call."""
    try:
        sock = borrowed_socket(fd)
    except OSError:
        return True
    sock.detach()
    return sock.family == socket.AF_UNIX


def has_connections(fd: int) -> bool:
    """True for a stream of UNIX or TCP, whose hang-up is that of its peer, and can be polled.

    What epoll reports of a datagram socket is an error of one datagram, such as an ICMP message:
    the socket is as good as before. To poll a stream of another family may wait for the lock, in
    epoll_ctl(2) and epoll_wait(2) (vsock_poll(), net/vmw_vsock/af_vsock.c). Never waits. *fd* is
    borrowed for the call.
    """
    try:
        sock = borrowed_socket(fd)
    except OSError:
        return False
    try:
        if sock.type not in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
            return False
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            if not system.LINUX:
                return True
            return sock.proto in _TCP
        return sock.family == socket.AF_UNIX
    finally:
        sock.detach()


def _said_at_once(fd: int, option: int) -> int:
    """What the socket was made with: options of SOL_SOCKET for which the kernel takes no lock
    (sk_getsockopt(), net/core/sock.c). A thread that gave up the interpreter's lock for it would
    wait for its next turn, and close a descriptor in twice the time. Raises: OSError."""
    return _number(_libc_at_once, fd, socket.SOL_SOCKET, option)


def _number(libc: Any, fd: int, level: int, option: int) -> int:
    """getsockopt(2) of an int. Raises: OSError."""
    value = _ctypes.c_int()
    length = _ctypes.c_uint(_INT.size)
    _checked(libc.getsockopt(fd, level, option, _ctypes.byref(value), _ctypes.byref(length)))
    return int(value.value)


def _known(enum: type[IntEnum], value: int) -> int:
    """*value* as a member of *enum*, if it is one."""
    try:
        return enum(value)
    except ValueError:
        return value


def _checked(result: int) -> None:
    if result:
        code = _ctypes.get_errno() or errno.EIO
        raise OSError(code, os.strerror(code))
