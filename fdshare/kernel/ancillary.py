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
8.  A security module (SELinux, AppArmor, a BPF program) may refuse a descriptor as it arrives.
    It is dropped, and those behind it, with MSG_CTRUNC, as in 5; but a number is free then, and to
    look again does not help (receive_fd, fs/file.c; scm_detach_fds, net/core/scm.c).
9.  A peek that fills its buffer looks on, and brings descriptors of a later message. `recv_fds`
    (passing.py) peeks with one byte more than it wants, so that it knows.

A handler of the signal module may raise after any call, and what the call returned is lost then:
how much was sent, the number of a descriptor that came. So what receives, and `send_into` and
`look_into`, store it in the instruction that makes the call, or the next: no handler runs inside
map(), nor between unpacking (`x, = map(f, ...)`, where f is called) and storing. `for x in iter(f,
None): break` is the same where f is always called alike: the iterator is kept, which takes half the
time. In the place of None is something that f never returns, of the type of what it returns: that
is compared sooner.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import repeat, zip_longest
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

from fdshare.errors import (
    DescriptorRefused,
    FdshareError,
    TooManyDescriptors,
    TruncatedControl,
)
from fdshare.kernel import credentials as creds
from fdshare.kernel import system
from fdshare.kernel.credentials import Credentials
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.descriptor_limit import descriptor_limit

__all__ = [
    "MAX_DESCRIPTORS",
    "Look",
    "Received",
    "Rights",
    "close_all",
    "close_looks",
    "close_steps",
    "discard_all",
    "look_into",
    "looking",
    "numbers_in",
    "peek_descriptors",
    "read_to_descriptors",
    "receive",
    "receive_into",
    "receive_numbers",
    "rights",
    "send_all_into",
    "send_control",
    "send_into",
    "send_message",
    "send_rights",
    "truncation",
]

Bytes: TypeAlias = bytes | bytearray | memoryview
Control: TypeAlias = Sequence[tuple[int, int, bytes]]
# What recvmsg(2) gave: data, control messages, flags, address.
Look: TypeAlias = tuple[bytes, list[tuple[int, int, bytes]], int, object]
Rights: TypeAlias = tuple[()] | tuple[tuple[int, int, "bytes | array.array[int]"]]

MAX_DESCRIPTORS: Final = 253  # SCM_MAX_FD, include/net/scm.h
_ONE: Final = struct.Struct("@i")
_INT: Final = _ONE.size
# Room for the most descriptors, and beside them credentials, a pidfd and what else a socket option
# may add (a time stamp is 16 bytes): none of that may cost a descriptor.
_ROOM: Final = (
    socket.CMSG_SPACE(MAX_DESCRIPTORS * _INT)
    + socket.CMSG_SPACE(max(creds.UCRED.size, creds.HERE.attach_size))
    + socket.CMSG_SPACE(_INT)
    + 256
)
# As plain ints: an operation on the enum's members costs as much as the system call.
_ROOMS: Final = (_ROOM,)
_SOCKET: Final = int(socket.SOL_SOCKET)
_RIGHTS: Final = int(socket.SCM_RIGHTS)
_CTRUNC: Final = int(socket.MSG_CTRUNC)
_PEEK: Final = int(socket.MSG_PEEK)
_DONTWAIT: Final = int(socket.MSG_DONTWAIT)
_CLOEXEC: Final = system.CMSG_CLOEXEC
_LOOK: Final = _PEEK | _CLOEXEC
_AGAIN: Final = 8  # looks before a refusal is believed
_DUPLICATE: Final = fcntl.F_DUPFD_CLOEXEC
_unborn: Final = Descriptor.__new__


class _HasClose(Protocol):
    def close(self) -> object: ...


def close_all(descriptors: Iterable[Descriptor]) -> None:
    """Close each; the first error is raised after the last was tried.

    >>> close_all([Descriptor(os.open(os.devnull, os.O_RDONLY)) for _ in range(3)])
    """
    failure: OSError | None = None
    for descriptor in descriptors:
        try:
            descriptor.close()
        except OSError as error:
            failure = failure or error
    if failure is not None:
        raise failure


def discard_all(descriptors: Iterable[_HasClose]) -> None:
    """Closes each, which nobody gets. What close(2) says of one (EDQUOT, EIO of NFS or FUSE) is for
    who wrote to the file, and is not raised."""
    for descriptor in descriptors:
        try:
            descriptor.close()
        except OSError:
            pass


def close_steps(numbers: Sequence[int]) -> Iterator[None]:
    """Each step closes one of *numbers*, copies that nobody gets: `deque(steps, 0)` is one call for
    all of them. An error of os.close() would end the steps; closerange() raises none."""
    return map(os.closerange, numbers, [number + 1 for number in numbers])


def send_message(
    sock: socket.socket, buffers: Sequence[Bytes], fds: Sequence[int] = (), flags: int = 0
) -> int:
    """The number of bytes that one sendmsg(2) took: perhaps fewer than given.

    The descriptors *fds* (at most 253) are borrowed for the call and have all gone when it returns.
    Raises: TooManyDescriptors; DescriptorLimit with errno ETOOMANYREFS, nothing sent; any OSError
    of sendmsg(2), BlockingIOError among them.
    """
    return send_rights(sock, buffers, rights(fds), flags)


def rights(fds: Sequence[int]) -> Rights:
    """The control message that carries *fds* (at most 253); it can be sent several times.

    *fds* stay the caller's, and must be open whenever it is sent. Raises: TooManyDescriptors.
    """
    if not fds:
        return ()
    if len(fds) > MAX_DESCRIPTORS:
        raise TooManyDescriptors(len(fds), MAX_DESCRIPTORS)
    if len(fds) == 1:  # as nearly always: half the time of an array
        return ((_SOCKET, _RIGHTS, _ONE.pack(fds[0])),)
    return ((_SOCKET, _RIGHTS, array.array("i", fds)),)


def send_rights(
    sock: socket.socket, buffers: Sequence[Bytes], control: Rights, flags: int = 0
) -> int:
    """As `send_message`, with descriptors that `rights` has prepared."""
    try:
        return sock.sendmsg(buffers, control, flags | system.NOSIGNAL)
    except OSError as error:
        if error.errno == errno.ETOOMANYREFS:
            raise descriptor_limit(error.errno, "sender") from None
        raise


def send_control(
    sock: socket.socket,
    data: Bytes,
    control: Sequence[tuple[int, int, Bytes | array.array[int]]],
    address: str | bytes | None = None,
) -> int:
    """The number of bytes of *data* that one sendmsg(2) took, with any control messages.

    *address* is the destination, on a datagram socket that is not connected. Raises: OSError of
    sendmsg(2), as it is.
    """
    to = () if address is None else (address,)
    return sock.sendmsg([data], control, system.NOSIGNAL, *to)


def send_into(
    cell: list[Any], sock: socket.socket, buffers: Sequence[Bytes], control: Rights, flags: int = 0
) -> None:
    """As `send_rights`, with the number of bytes in ``cell[0]``, whatever is raised: where there is
    none, none was sent."""
    try:
        (cell[0],) = map(sock.sendmsg, (buffers,), (control,), (flags | system.NOSIGNAL,))
    except OSError as error:
        if error.errno == errno.ETOOMANYREFS:
            raise descriptor_limit(error.errno, "sender") from None
        raise


def send_all_into(
    counts: list[int],
    sock: socket.socket,
    messages: Sequence[Sequence[Bytes]],
    controls: Sequence[Rights],
    flags: Sequence[int],
) -> None:
    """As `send_into` for each of *messages*, with no handler in between; what each took is appended
    to *counts*."""
    try:
        counts.extend(map(sock.sendmsg, messages, controls, flags))
    except OSError as error:
        if error.errno == errno.ETOOMANYREFS:
            raise descriptor_limit(error.errno, "sender") from None
        raise


def receive_into(
    sock: socket.socket, buffer: bytearray | memoryview, flags: int = 0
) -> tuple[int, list[Descriptor], FdshareError | None]:
    """(bytes read, descriptors, why some are missing) of one recvmsg(2) with room for 253.

    0 bytes is the end of the stream. The third is None, or the error to raise (DescriptorLimit,
    DescriptorRefused, TruncatedControl) where the kernel dropped descriptors: then the list is
    empty, what had fitted is closed, and the bytes in *buffer* are good. The caller owns the
    descriptors.
    """
    got: tuple[int, Control, int, object] | None = None
    owners: list[Descriptor] = []
    try:
        (got,) = map(sock.recvmsg_into, ((buffer,),), _ROOMS, (flags | _CLOEXEC,))
        count, control, came, _ = got
        if control:
            _own(_numbers(control), owners)
        if not came & _CTRUNC:
            return count, owners, None
        lost = _why_dropped(sock, len(owners), control, _ROOM)
        discard_all(owners)
        return count, [], lost
    except BaseException:
        if got is not None:
            _close_lost(_split(got[1])[0], owners)
        raise


def receive_numbers(
    sock: socket.socket, buffer: bytearray | memoryview, flags: int = 0, most: int = MAX_DESCRIPTORS
) -> tuple[int, list[int], FdshareError | None]:
    """As `receive_into`, for a caller that owns descriptors in objects of its own, and must not
    wait for a close(2): bare numbers, to be owned at once. Even if some are missing, those that had
    fitted are returned; they are good for nothing but to be closed.

    There is room for *most* descriptors, or one more (CMSG_SPACE). If they are fewer than 253,
    there is room for nothing else.
    """
    room = _ROOM if most >= MAX_DESCRIPTORS else socket.CMSG_SPACE(most * _INT)
    count, control, got, _ = sock.recvmsg_into((buffer,), room, flags | _CLOEXEC)
    if not control and not got & _CTRUNC:
        return count, [], None
    numbers = _numbers(control)
    if not got & _CTRUNC:
        return count, numbers, None
    peeked = len(buffer) if flags & _PEEK else 0
    return count, numbers, _why_dropped(sock, len(numbers), control, room, peeked)


def look_into(
    looks: list[Look], sock: socket.socket, size: int, flags: int = 0
) -> FdshareError | None:
    """Appends at most *size* of the next bytes, which stay, to *looks*, whatever is raised, with
    copies of the first descriptors with them, or after them: a peek of bytes that bring none looks
    past them. What it returns is the error to raise where descriptors are missing: DescriptorLimit
    (EMFILE), DescriptorRefused.

    Blocks as recvmsg(2) does until there is a byte. Consume the bytes afterwards with a plain
    recv(): without a control buffer the kernel drops its own references. An end of stream gives no
    bytes and none. The descriptors in it (`numbers_in`) are the caller's, also where some are
    missing.
    """
    (look,) = map(sock.recvmsg, (size,), _ROOMS, (flags | _LOOK,))
    looks.append(look)  # no handler runs before
    return truncation(look, sock, size)


def looking(sock: socket.socket, size: int, flags: int = 0) -> Iterator[Look]:
    """Each step looks as `look_into`: `for look in looking(...)` stores what it saw at once."""
    return iter(partial(sock.recvmsg, size, _ROOM, _LOOK | flags), None)


def truncation(look: Look, sock: socket.socket, size: int) -> FdshareError | None:
    """The error to raise where descriptors are missing in *look*, at *size* bytes of *sock*:
    DescriptorLimit (EMFILE), DescriptorRefused."""
    if look[2] & _CTRUNC:
        return _why_dropped(sock, len(_numbers(look[1])), look[1], _ROOM, size)
    return None


def numbers_in(look: Look) -> list[int]:
    """The descriptors that came with *look*."""
    control = look[1]
    if len(control) == 1 and len(control[0][2]) == _INT and _CLOEXEC:
        level, kind, data = control[0]
        if kind == _RIGHTS and level == _SOCKET:
            return [*_ONE.unpack(data)]
    return _numbers(control) if control else []


def close_looks(looks: list[Look]) -> None:
    """Closes the descriptors of each of *looks*, and empties it; to be called again if a handler
    raises."""
    if looks:
        steps = close_steps([number for look in looks for number in numbers_in(look)])
        del looks[:]
        deque(steps, 0)  # one call, and none since they were forgotten


def peek_descriptors(sock: socket.socket, count: int) -> list[Descriptor]:
    """Copies of the *count* descriptors (at most 253) that come with the next byte, which stays.

    Only for a message whose header, already read, announced descriptors. Consume the byte with a
    plain recv(): without a control buffer the kernel drops its own references. The caller owns the
    descriptors.
    Raises: TooManyDescriptors; DescriptorLimit (EMFILE): nothing is consumed, peek again when
    descriptors are free; DescriptorRefused: nothing is consumed.
    """
    seen = receive(sock, 1, _PEEK)
    if len(seen.descriptors) > count:
        discard_all((seen,))
        raise TooManyDescriptors(len(seen.descriptors), count)
    if seen.pidfd is not None:
        seen.pidfd.close()
    return seen.descriptors


def read_to_descriptors(sock: socket.socket, buffer: bytearray) -> bool:
    """True if all was read that is unread in a UNIX socket, False where descriptors come next.

    The bytes are lost. Nothing is waited for, and no number is used: a peek without a control
    buffer says that there are descriptors (MSG_CTRUNC), and leaves them. Raises: OSError.
    """
    while True:
        try:
            count, _, flags, _ = sock.recvmsg_into((buffer,), 0, _PEEK | _DONTWAIT)
        except (BlockingIOError, ConnectionResetError):  # reported when there is nothing to read
            return True
        if flags & _CTRUNC:
            return False
        if not count:
            return True
        sock.recv_into(buffer, count)


def _own(numbers: Iterable[int], owners: list[Descriptor]) -> None:
    """Appends a Descriptor for each of *numbers*. If a signal's handler raises meanwhile, the last
    may own nothing yet: `_close_lost` closes all."""
    for number in numbers:
        owners.append(_unborn(Descriptor))
        owners[-1]._number = [number]  # one instruction, and no frame into which a handler comes


def _close_lost(numbers: Iterable[int], owners: Sequence[Descriptor]) -> None:
    """Closes all of *numbers*, of which *owners* may own the first."""
    for number, owner in zip_longest(numbers, owners):
        if hasattr(owner, "_number"):
            discard_all((owner,))
        else:
            os.closerange(number, number + 1)


def _numbers(control: Control) -> list[int]:
    """Every int of every SCM_RIGHTS message in *control*, close-on-exec.

    A pidfd that came with it (SO_PASSPIDFD) is closed: only `recv_fds` returns it.
    """
    if len(control) == 1 and _CLOEXEC:
        level, kind, data = control[0]
        if kind == _RIGHTS and level == _SOCKET:
            if len(data) == _INT:  # one, as nearly always: half the time of an array
                return [*_ONE.unpack(data)]
            if not len(data) % _INT:
                return array.array("i", data).tolist()
    numbers, pidfds = _split(control)
    for pidfd in pidfds:
        os.close(pidfd)
    return numbers


def _split(control: Control) -> tuple[list[int], list[int]]:
    """The descriptors of every SCM_RIGHTS message, and the pidfd of an SCM_PIDFD."""
    numbers: list[int] = []
    pidfds: list[int] = []
    for level, kind, data in control:
        if level != _SOCKET:
            continue
        # A truncated message may end in the middle of an int.
        whole = array.array("i", data[: len(data) - len(data) % _INT])
        if kind == _RIGHTS:
            numbers += whole
        elif kind == creds.HERE.scm_pidfd:
            pidfds += whole
    if not _CLOEXEC:
        for number in numbers:
            os.set_inheritable(number, False)
    return numbers, pidfds


def _why_dropped(
    sock: socket.socket, received: int, control: Control, room: int, peeked: int = 0
) -> FdshareError:
    """The error that says why no more than *received* descriptors came in *control*; they are still
    open. It was a peek at *peeked* bytes, if that is not 0."""
    if not _has_room(received, control, room):
        return TruncatedControl(received, received)
    # There was room for more: scm_detach_fds stops at -EMFILE, or at what a module refuses.
    if _is_refused(sock, received, room, peeked):
        return DescriptorRefused("receiver")
    return descriptor_limit(errno.EMFILE, "receiver")


def _has_room(received: int, control: Control, room: int) -> bool:
    """Whether *room* was enough for one descriptor more than the *received* in *control*."""
    sizes = [len(data) for _, _, data in control]
    if received:  # the next one would have needed a place after the last
        needed = sum(map(socket.CMSG_SPACE, sizes[:-1])) + socket.CMSG_LEN(sizes[-1] + _INT)
    else:
        needed = sum(map(socket.CMSG_SPACE, sizes)) + socket.CMSG_LEN(_INT)
    return room >= needed


def _is_refused(sock: socket.socket, received: int, room: int, peeked: int) -> bool:
    """True if descriptors are missing although numbers are free, those that came being open.

    Other threads may have made some free since then. So as many must be free as may be missing; or
    a message that is still there is looked at again and again, and the same ones must come each
    time: what is refused is taken from the socket, and what is not must stay.
    """
    if not peeked:
        return _are_free(sock, MAX_DESCRIPTORS - received)
    for _ in range(_AGAIN):
        looks: list[Look] = []
        try:
            looks.extend(map(sock.recvmsg, (peeked,), (room,), (_LOOK | _DONTWAIT,)))
            _, control, flags, _ = looks[0]
            if not flags & _CTRUNC or len(_numbers(control)) != received:
                return False
            if not _are_free(sock, 1):
                return False
        except OSError:  # another process has read it
            return False
        finally:
            close_looks(looks)
    return True


def _are_free(sock: socket.socket, count: int) -> bool:
    """True if *count* numbers are free; *sock* is duplicated for each."""
    numbers: list[int] = []
    try:
        numbers.extend(map(fcntl.fcntl, repeat(sock, count), repeat(_DUPLICATE), repeat(0)))
    except OSError:
        return False
    finally:
        deque(close_steps(numbers), 0)
    return True


class Received(NamedTuple):
    """What one message brought. `data` is empty at the end of a stream.

    `credentials` is None unless the socket asked for them (`enable_credentials`) or the system
    lets a sender attach them unasked; `pidfd` the same (SO_PASSPIDFD). `address` is the sender's,
    of datagrams: give it to `send_fds` to answer. `flags` are recvmsg's (MSG_TRUNC: a datagram was
    longer than `max_bytes`). The caller owns the descriptors; close() or `with` closes them all.

    >>> one, other = s_pipe()
    >>> with one, other:
    ...     send_fds(one, [0], b"x")
    ...     with recv_fds(other, 100, 1) as got:
    ...         got.data, len(got.descriptors)
    (b'x', 1)
    """

    data: bytes
    descriptors: list[Descriptor]
    credentials: Credentials | None = None
    flags: int = 0
    address: str | bytes | None = None
    pidfd: Descriptor | None = None

    def close(self) -> None:
        """Close every descriptor that is still open."""
        close_all([*self.descriptors, *([self.pidfd] if self.pidfd else [])])

    def __enter__(self) -> Received:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def receive(sock: socket.socket, max_bytes: int, flags: int = 0, room: int = _ROOM) -> Received:
    """One recvmsg(2) with *room* bytes for control messages. The caller owns the result.

    Raises: DescriptorLimit, DescriptorRefused, TruncatedControl: descriptors were dropped, those
    that fitted closed. Without MSG_PEEK in *flags* the data are gone then.
    """
    got: tuple[bytes, Control, int, Any] | None = None
    owners: list[Descriptor] = []
    pidfds: list[Descriptor] = []
    try:
        (got,) = map(sock.recvmsg, (max_bytes,), (room,), (flags | _CLOEXEC,))
        data, control, came, address = got
        for numbers, owned in zip(_split(control), (owners, pidfds), strict=True):
            _own(numbers, owned)
        if came & _CTRUNC:
            raise _why_dropped(sock, len(owners), control, room, max_bytes if flags & _PEEK else 0)
        pidfd = pidfds[0] if pidfds else None
        who = _credentials(control)
        return Received(data, owners, who, int(came) & ~_CLOEXEC, address or None, pidfd)
    except BaseException:
        if got is not None:
            for numbers, owned in zip(_split(got[1]), (owners, pidfds), strict=True):
                _close_lost(numbers, owned)
        raise


def _credentials(control: Control) -> Credentials | None:
    """The last credentials in *control*; messages of other kinds are ignored."""
    found = None
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind in creds.HERE.control:
            found = creds.HERE.control[kind](data)
    return found
