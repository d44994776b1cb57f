"""Bytes and descriptors in one message: the only caller of sendmsg(2) and recvmsg(2) in fdshare.

What the kernel does, and what every function here therefore does (unix(7), cmsg(3),
net/unix/af_unix.c, net/core/scm.c; measured on Linux 6.18):

1.  `socket.recv_fds` ignores its flags, so a descriptor it receives survives exec. We call recvmsg
    with MSG_CMSG_CLOEXEC.
2.  Truncated control data still installs the descriptors that fitted. Every int is owned by a
    Descriptor before any check can raise; whatever fails then closes what came.
3.  CMSG_SPACE for one int has room for two: more may arrive than were asked for, and are closed.
4.  253 descriptors a message (SCM_MAX_FD); 254 is EINVAL. Without a byte of data a stream delivers
    no descriptors. After a short send they have gone with the first byte.
5.  At the receiver's RLIMIT_NOFILE the kernel delivers the bytes, drops the descriptors and sets
    MSG_CTRUNC. `peek_descriptors` therefore looks first: a truncated peek leaves the message.
6.  Descriptors in flight are counted against the *sender's user* and limit (ETOOMANYREFS).
7.  With SO_PASSCRED on, credentials come first and take room: leave it.
"""

from __future__ import annotations

import array
import errno
import resource
import socket
from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

from fdshare.errors import DescriptorLimit, FdshareError, TooManyDescriptors, TruncatedControl
from fdshare.kernel.descriptor import Descriptor

__all__ = ["MAX_DESCRIPTORS", "close_all", "peek_descriptors", "receive_into", "send_message"]

Bytes: TypeAlias = bytes | bytearray | memoryview

MAX_DESCRIPTORS: Final = 253  # SCM_MAX_FD, include/net/scm.h
_INT: Final = array.array("i").itemsize
_ROOM: Final = socket.CMSG_SPACE(MAX_DESCRIPTORS * _INT)
_CLOEXEC: Final = getattr(socket, "MSG_CMSG_CLOEXEC", 0)  # macOS has none


def close_all(descriptors: Iterable[Descriptor]) -> None:
    """Close each; the first error is raised after the last was tried."""
    failure: OSError | None = None
    for descriptor in descriptors:
        try:
            descriptor.close()
        except OSError as error:
            failure = failure or error
    if failure is not None:
        raise failure


def send_message(
    sock: socket.socket, buffers: Sequence[Bytes], fds: Sequence[int] = (), flags: int = 0
) -> int:
    """The number of bytes that one sendmsg(2) took: perhaps fewer than given.

    The descriptors *fds* (at most 253) are borrowed for the call and have all gone when it returns.
    Raises: TooManyDescriptors; DescriptorLimit with errno ETOOMANYREFS, nothing sent; any OSError
    of sendmsg(2), BlockingIOError among them.
    """
    if not fds:
        return sock.sendmsg(buffers, (), flags)
    if len(fds) > MAX_DESCRIPTORS:
        raise TooManyDescriptors(len(fds), MAX_DESCRIPTORS)
    control = ((socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds)),)
    try:
        return sock.sendmsg(buffers, control, flags)
    except OSError as error:
        if error.errno == errno.ETOOMANYREFS:
            raise in_flight_limit() from None
        raise


def receive_into(
    sock: socket.socket, buffer: bytearray | memoryview, flags: int = 0
) -> tuple[int, list[Descriptor], FdshareError | None]:
    """(bytes read, descriptors, why some are missing) of one recvmsg(2) with room for 253.

    0 bytes is the end of the stream. The third is None, or the error to raise (DescriptorLimit,
    TruncatedControl) where the kernel dropped descriptors: then the list is empty, what had fitted
    is closed, and the bytes in *buffer* are good. The caller owns the descriptors.
    """
    count, control, got, _ = sock.recvmsg_into((buffer,), _ROOM, flags | _CLOEXEC)
    if not control and not got & socket.MSG_CTRUNC:
        return count, [], None
    descriptors = own(control)
    if got & socket.MSG_CTRUNC:
        return count, [], _dropped(descriptors, MAX_DESCRIPTORS)
    return count, descriptors, None


def peek_descriptors(sock: socket.socket, count: int) -> list[Descriptor]:
    """Copies of the *count* descriptors (at most 253) that come with the next byte, which stays.

    Blocks as recvmsg(2) does until that byte is there. Consume the bytes afterwards with a plain
    recv(): without a control buffer the kernel drops its own references. Only for a message whose
    header, already read, announced descriptors: a peek of one without looks past it, into a later
    one. The caller owns the result; an end of stream gives an empty list.

    Raises: DescriptorLimit (EMFILE): nothing is consumed, peek again when descriptors are free.
    """
    _, control, got, _ = sock.recvmsg(1, _ROOM, socket.MSG_PEEK | _CLOEXEC)
    descriptors = own(control)
    if got & socket.MSG_CTRUNC:
        raise _dropped(descriptors, MAX_DESCRIPTORS)
    if len(descriptors) > count:
        close_all(descriptors)
        raise TooManyDescriptors(len(descriptors), count)
    return descriptors


def own(control: Sequence[tuple[int, int, bytes]]) -> list[Descriptor]:
    """A Descriptor for every int of every SCM_RIGHTS message in *control*. Cannot raise."""
    owned: list[Descriptor] = []
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            # A truncated message may end in the middle of an int.
            numbers = array.array("i", data[: len(data) - len(data) % _INT])
            owned += map(Descriptor, numbers)
    return owned


def _dropped(descriptors: list[Descriptor], room: int) -> FdshareError:
    """Closes what fitted; the error that says why the rest did not."""
    received = len(descriptors)
    close_all(descriptors)
    if received >= room:
        return TruncatedControl(received, room)
    # There was room for more: the descriptor table was full (scm_detach_fds stops at -EMFILE).
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return DescriptorLimit(errno.EMFILE, "RLIMIT_NOFILE", limit, None, "receiver")


def in_flight_limit() -> DescriptorLimit:
    """The error for ETOOMANYREFS (too_many_unix_fds, net/unix/af_unix.c)."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return DescriptorLimit(
        errno.ETOOMANYREFS,
        "RLIMIT_NOFILE",
        limit,
        None,
        "sender",
        "that many descriptors of this user are in flight, sent and not yet received: "
        "let the receivers read, or raise it (ulimit -n)",
    )
