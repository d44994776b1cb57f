"""send_fds and recv_fds: data and descriptors for any program, with every error named.

They are built on ancillary.py, which makes the system calls, and has the facts of the kernel.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import select
import socket
from collections.abc import Iterable, Sequence

from fdshare.errors import (
    AccessDenied,
    ClosedDescriptor,
    DescriptorLimit,
    DescriptorRefused,
    InvalidArgument,
    MagicMismatch,
    ServerGone,
    TooManyDescriptors,
)
from fdshare.kernel import credentials as creds
from fdshare.kernel import system
from fdshare.kernel.ancillary import (
    MAX_DESCRIPTORS,
    Bytes,
    Received,
    discard_all,
    receive,
    send_control,
)
from fdshare.kernel.credentials import Credentials
from fdshare.kernel.descriptor import HasFileno, borrow
from fdshare.kernel.descriptor_limit import descriptor_limit

__all__ = ["peer_name", "recv_fds", "send_fds"]


def send_fds(
    sock: socket.socket,
    fds: Iterable[HasFileno | int],
    data: Bytes = b"\0",
    *,
    credentials: bool | Credentials | None = None,
    address: str | bytes | None = None,
) -> None:
    """Send *data* whole, with copies of *fds* (at most 253) and the sender's credentials.

    *credentials* may be True (pid, effective uid and gid of this process) or, for privileged
    senders, those to claim. *address* is the destination, on a datagram socket that is not
    connected. The descriptors go with the first byte; the rest of a long stream message follows in
    further writes, for which this waits even on a non-blocking socket. *fds* are borrowed for the
    call: it is safe to close them after it.

    Raises:
        InvalidArgument: no data; a claimed pid that does not exist.
        ClosedDescriptor, UnsupportedKind, TooManyDescriptors: *fds*; nothing was sent.
        DescriptorLimit: ETOOMANYREFS, too many in flight; nothing was sent.
        AccessDenied: credentials that are not the sender's, or a receiver that takes none.
        UnsupportedPlatform: credentials, where the system has none; OSError of sendmsg(2).

    >>> one, other = s_pipe()
    >>> with one, other, open(os.devnull) as file:
    ...     send_fds(one, [file, file], b"two")
    ...     with recv_fds(other, 100, 2) as got:
    ...         got.data, len(got.descriptors)
    (b'two', 2)
    """
    numbers = [borrow(fd) for fd in fds]
    if not data:
        raise InvalidArgument("data", "it is empty; descriptors are delivered with a byte only")
    if len(numbers) > MAX_DESCRIPTORS:
        raise TooManyDescriptors(len(numbers), MAX_DESCRIPTORS)
    control: list[tuple[int, int, Bytes | array.array[int]]] = []
    claimed = credentials if isinstance(credentials, Credentials) else None
    if credentials is not None and credentials is not False:
        control.append(creds.control_message(claimed))
    if numbers:
        control.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", numbers)))
    try:
        sent = send_control(sock, data, control, address)
    except OSError as error:
        raise _send_failure(error, numbers, claimed) from None
    _send_rest(sock, memoryview(data).cast("B")[sent:])


def _send_rest(sock: socket.socket, rest: memoryview) -> None:
    """What a short write left over, of a message whose descriptors have gone."""
    while rest:
        try:
            rest = rest[sock.send(rest, system.NOSIGNAL) :]
        except BlockingIOError:
            ready = select.poll()
            ready.register(sock, select.POLLOUT)
            ready.poll()


def _send_failure(error: OSError, fds: Sequence[int], claimed: Credentials | None) -> OSError:
    """The error to raise for *error* of sendmsg(2): a FdshareError where one fits."""
    if error.errno == errno.ETOOMANYREFS:
        return descriptor_limit(error.errno, "sender")
    if error.errno == errno.EPERM and claimed is not None:
        return creds.refused(claimed)
    if error.errno == errno.EPERM and fds:
        return AccessDenied(
            "send", "descriptors", os.geteuid(), "the receiving socket refuses them (SO_PASSRIGHTS)"
        )
    if error.errno == errno.ESRCH and claimed is not None:
        raise InvalidArgument("credentials", f"no process has the pid {claimed.pid}") from None
    if error.errno == errno.EINVAL and claimed is not None:
        raise InvalidArgument("credentials", "no such uid or gid in this user namespace") from None
    if error.errno == errno.EBADF:
        for fd in fds:
            if not _is_open(fd):
                raise ClosedDescriptor(f"descriptor {fd} is not open") from None
    return error


def _is_open(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def recv_fds(
    sock: socket.socket,
    max_bytes: int,
    max_fds: int,
    *,
    expect: bytes | None = None,
    lossless: bool = True,
) -> Received:
    """The next at most *max_bytes* of *sock* and the at most *max_fds* descriptors with them.

    With *expect*, the data must begin with it. With *lossless* it peeks before it reads, so that at
    the limit of open descriptors nothing is lost: that costs one system call more, and no other
    thread or process may read from the socket. Without it the message is lost when DescriptorLimit
    is raised. The caller owns the result.

    Raises:
        DescriptorLimit: this process has no descriptors free; the message is still there.
        DescriptorRefused: a security module does not let this process have one; the message is
        gone, and the descriptors were closed.
        TooManyDescriptors: more than *max_fds* came, and all were closed; `count` says how many.
        MagicMismatch: the data do not begin with *expect*; the descriptors were closed.
        ServerGone: the stream ended before *expect*.
        ProtocolError: credentials that cannot be read. OSError of recvmsg(2), TimeoutError,
        BlockingIOError.

    >>> one, other = s_pipe()
    >>> with one, other:
    ...     send_fds(one, [0], b"x")
    ...     recv_fds(other, 1, 1, expect=b"y")
    Traceback (most recent call last):
    fdshare.errors.MagicMismatch: expected the data b'y', received b'x'; the descriptors ...
    """
    if max_bytes < 1:
        raise InvalidArgument("max_bytes", "descriptors come with data; at least 1 is needed")
    got = _receive_looking(sock, max_bytes) if lossless else receive(sock, max_bytes)
    try:
        if len(got.descriptors) > max_fds:
            raise TooManyDescriptors(len(got.descriptors), max_fds)
        if expect is not None and not got.data.startswith(expect):
            if not got.data and sock.type != socket.SOCK_DGRAM:
                raise ServerGone(peer_name(sock), f"it closed the connection before {expect!r}")
            raise MagicMismatch(expect, got.data)
    except BaseException:
        discard_all((got,))
        raise
    return got


def _receive_looking(sock: socket.socket, max_bytes: int) -> Received:
    """As `receive`, but where no descriptor is free the message stays unread."""
    try:
        seen = receive(sock, max_bytes + 1, socket.MSG_PEEK)
    except DescriptorRefused as refused:  # for ever: it is read, if it was not one beyond max_bytes
        try:
            return receive(sock, max_bytes)
        except DescriptorLimit:
            raise refused from None
    stream = sock.type == socket.SOCK_STREAM
    if len(seen.data) > max_bytes and stream:
        # Descriptors of this peek may belong to the bytes beyond max_bytes. So many were free a
        # moment ago, so the real read will have enough.
        discard_all((seen,))
        return receive(sock, max_bytes)
    try:
        # Without a control buffer: the kernel drops its references, the copies are ours.
        if seen.data or not stream:
            sock.recv(max(1, min(len(seen.data), max_bytes)))
    except BaseException:
        discard_all((seen,))
        raise
    if len(seen.data) > max_bytes:
        return seen._replace(data=seen.data[:max_bytes], flags=seen.flags | socket.MSG_TRUNC)
    return seen


def peer_name(sock: socket.socket) -> str:
    """The address of the other end, for messages."""
    try:
        name = sock.getpeername() or sock.getsockname()
    except OSError:
        name = ""
    text = os.fsdecode(name) if isinstance(name, (str, bytes)) else str(name)
    return text.replace("\0", "@", 1) or "the other end"
