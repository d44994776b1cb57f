"""Messages on a stream socket: multiprocessing's framing, and one more form for descriptors.

A message without descriptors is what multiprocessing sends: its length in 4 bytes, or -1 and the
length in 8, then the data. A message with descriptors is two sends:

    announcement    4 bytes: -3 - (length of the body), or -2 where that does not say it all
    body            status, count, length of the data; the data. The descriptors are on its first
                    byte

They are two because a reader that reads the length with read(2) would lose what rides on it, and
one that looks first (MSG_PEEK) would pay for it with every number in the queue: a peek walks over
all that is queued. After an announcement the reader peeks, for nothing is before the body.

Nothing is lost at the receiver's descriptor limit: the peek fails and the body stays. But the
announcement is gone, so the socket itself remembers: SO_PRIORITY, which means nothing on an AF_UNIX
socket, is shared by every process that reads from it, as its queue is. A reader that finds the mark
knows that a body comes next.

More than 253 descriptors travel in boxes: sockets with up to 253 in the queue of each, so that one
peek of one message holds everything, and it is still all or nothing.

A sender that has announced and then may not send (ETOOMANYREFS) waits; past the bound it sends a
body that says "cancelled", and the reader goes on to the next message.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from fdshare.errors import DescriptorLimit, InvalidArgument, ProtocolError
from fdshare.kernel.ancillary import (
    MAX_DESCRIPTORS,
    Bytes,
    close_all,
    peek_descriptors,
    send_message,
)
from fdshare.kernel.descriptor import Descriptor
from fdshare.mp.transit import Bundle

__all__ = [
    "JOINED",
    "Outgoing",
    "framed",
    "headed",
    "marked",
    "read_bytes",
    "read_message",
    "read_without",
    "send_now",
]

_LENGTH: Final = struct.Struct("!i")
_LONG: Final = struct.Struct("!Q")
_BODY: Final = struct.Struct("!BIQ")

_LONG_FOLLOWS: Final = -1
_BODY_FOLLOWS: Final = -2
_SHORT_BODY: Final = -3
_LARGEST: Final = 0x7FFFFFFF

# What a body says of itself.
_CANCELLED: Final = 0
_PLAIN: Final = 1
_BOXED: Final = 2

JOINED: Final = 16384  # below, one copy is cheaper than a second buffer (connection.py, 3.11)
# 0..6 for everybody; socket(7). Where there is none, only the connection object remembers.
_MARK: Final[int | None] = getattr(socket, "SO_PRIORITY", None)
_SOCKET: Final = int(socket.SOL_SOCKET)
_WAITALL: Final = int(socket.MSG_WAITALL)

# How long a sender waits for receivers when its user has too many descriptors in flight. Seconds.
PATIENCE: Final = 10.0
_FIRST_PAUSE: Final = 0.0005
_LONGEST_PAUSE: Final = 0.02


# (buffers, descriptors on their first byte), one for each sendmsg(2).
Parts: TypeAlias = list[tuple[list[Bytes], list[int]]]


def send_now(sock: socket.socket, message: bytes | Bundle, flags: int) -> Outgoing | None:
    """Send *message* if the socket takes it; what is left of it, or None. The common case of
    `Outgoing`, without one."""
    if type(message) is bytes:
        if len(message) <= JOINED:
            data = _LENGTH.pack(len(message)) + message
            sent = _send(sock, data, flags)
            if sent == len(data):
                return None
            return Outgoing(Bundle(message), [([memoryview(data)[sent:]], [])])
        message = Bundle(message)
    fds = message.fds or message.numbers  # type: ignore[union-attr]
    size = len(message.data)  # type: ignore[union-attr]
    if not fds or len(fds) > MAX_DESCRIPTORS or size > JOINED:
        outgoing = Outgoing(message)  # type: ignore[arg-type]
        return None if outgoing.push_now(sock, flags) else outgoing
    announcement, body = message.framed or framed(message.data, len(fds))  # type: ignore[union-attr]
    sent = _send(sock, announcement, flags)
    if sent < len(announcement):
        rest: Parts = [([announcement[sent:]], []), ([body], fds)]
        return Outgoing(message, rest)  # type: ignore[arg-type]
    refused = False
    try:
        sent = send_message(sock, (body,), fds, flags)
        if sent == len(body):
            return None
        rest = [([body[sent:]], [])]
    except BlockingIOError:
        rest = [([body], fds)]
    except DescriptorLimit:
        rest = [([body], fds)]
        refused = True
    outgoing = Outgoing(message, rest)  # type: ignore[arg-type]
    outgoing.refused = refused
    return outgoing


def framed(data: Bytes, count: int) -> tuple[bytes, bytes]:
    """(announcement, body) of *data* with *count* descriptors: at most JOINED bytes and 253."""
    body = _BODY.pack(_PLAIN, count, len(data)) + data
    return _LENGTH.pack(_SHORT_BODY - len(body)), body


def _send(sock: socket.socket, data: bytes, flags: int) -> int:
    try:
        return sock.send(data, flags)
    except BlockingIOError:
        return 0


class Outgoing:
    """A message on its way out: what is left of it, so that another thread may send the rest."""

    __slots__ = ("boxes", "bundle", "parts", "refused")

    def __init__(self, bundle: Bundle, rest: Parts | None = None) -> None:
        """*rest* is what is left of it, where its first part has gone."""
        self.bundle = bundle
        self.boxes: list[Descriptor] = []
        # True once the kernel would not have its descriptors (ETOOMANYREFS).
        self.refused = False
        data = bundle.data
        size = len(data)
        self.parts: Parts
        numbers = bundle.numbers
        if rest is not None:
            self.parts = rest
        elif numbers:
            self.parts = self._with_descriptors(numbers, data, size)
        elif size <= JOINED:
            self.parts = [([headed(data)], [])]
        elif size <= _LARGEST:
            self.parts = [([_LENGTH.pack(size), data], [])]
        else:
            self.parts = [([_LENGTH.pack(_LONG_FOLLOWS) + _LONG.pack(size), data], [])]

    def _with_descriptors(self, fds: Any, data: Bytes, size: int) -> Any:
        count, status = len(fds), _PLAIN
        if count > MAX_DESCRIPTORS:
            fds, status = self._box(fds), _BOXED
        body = _BODY.pack(status, count, size)
        total = len(body) + size
        if status == _PLAIN and total <= _LARGEST + _SHORT_BODY:
            announcement = _LENGTH.pack(_SHORT_BODY - total)
        else:
            announcement = _LENGTH.pack(_BODY_FOLLOWS)
        buffers: list[Bytes] = [body + bytes(data)] if size <= JOINED else [body, data]
        return [([announcement], []), (buffers, list(fds))]

    def _box(self, fds: list[int]) -> list[int]:
        try:
            for start in range(0, len(fds), MAX_DESCRIPTORS):
                inner, outer = socket.socketpair()
                with inner:
                    self.boxes.append(Descriptor(outer.detach()))
                    some = fds[start : start + MAX_DESCRIPTORS]
                    _patiently(lambda: send_message(inner, (b"\0",), some))  # noqa: B023
        except BaseException:
            close_all(self.boxes)
            raise
        return [box.fileno() for box in self.boxes]

    def push(self, sock: socket.socket, flags: int = 0) -> bool:
        """Send what the socket takes; True when all is gone.

        With MSG_DONTWAIT it is False where the socket is full. Raises: DescriptorLimit
        (ETOOMANYREFS): call again later, or `cancel`; any other OSError of sendmsg(2).
        """
        parts = self.parts
        while parts:
            buffers, fds = parts[0]
            try:
                sent = send_message(sock, buffers, fds, flags)
            except BlockingIOError:
                return False
            except DescriptorLimit:
                self.refused = True
                raise
            rest = _after(buffers, sent)
            if rest:
                parts[0] = (rest, [])
            else:
                del parts[0]
        self.close()
        return True

    def push_now(self, sock: socket.socket, flags: int) -> bool:
        """As `push`, but False too where descriptors are refused for the time being."""
        try:
            return self.push(sock, flags)
        except DescriptorLimit:
            return False

    def push_patiently(self, sock: socket.socket) -> None:
        """Send all of it, waiting up to PATIENCE seconds for descriptors in flight to land.

        Raises: DescriptorLimit (ETOOMANYREFS) after that; the message is cancelled.
        """
        try:
            _patiently(lambda: self.push(sock))
        except DescriptorLimit:
            self.cancel(sock)
            raise

    def cancel(self, sock: socket.socket) -> None:
        """Send a body that carries nothing in the place of the one announced."""
        (buffers, _), *_ = self.parts
        size = sum(map(len, buffers)) - _BODY.size
        self.parts = [([_BODY.pack(_CANCELLED, 0, size), bytes(size)], [])]
        self.push(sock)

    def own(self) -> None:
        """Make the rest independent of what was pickled. Raises as `Bundle.own` does."""
        if self.boxes:
            return  # what is in a box is the kernel's
        self.bundle.own()
        if self.parts and self.parts[-1][1]:
            self.parts[-1] = (self.parts[-1][0], self.bundle.numbers)

    def close(self) -> None:
        """Let go of what it holds, sent or not."""
        boxes, self.boxes = self.boxes, []
        close_all(boxes)
        self.bundle.close()

    def __del__(self) -> None:
        if getattr(self, "boxes", None):
            self.close()


def headed(data: Bytes) -> bytes:
    """*data*, at most JOINED bytes, as a message without descriptors.

    Linux takes or refuses so little as a whole (unix_stream_sendmsg: one skb up to 32 KiB).
    """
    return _LENGTH.pack(len(data)) + data


def _after(buffers: list[Bytes], sent: int) -> list[Bytes]:
    for index, buffer in enumerate(buffers):
        if sent < len(buffer):
            return [memoryview(buffer)[sent:], *buffers[index + 1 :]]
        sent -= len(buffer)
    return []


def _patiently(send: Callable[[], object]) -> None:
    """Call *send* until it is not refused for what is in flight; after PATIENCE, let it raise."""
    pause = _FIRST_PAUSE
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            send()
            return
        except DescriptorLimit:
            if time.monotonic() > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


# Receiving


def marked(sock: socket.socket) -> bool:
    """Whether some reader of this socket has read an announcement and had to leave the body."""
    return _MARK is not None and sock.getsockopt(_SOCKET, _MARK) != 0


def _mark(sock: socket.socket, value: bool) -> None:
    if _MARK is not None:
        sock.setsockopt(_SOCKET, _MARK, value)


def read_message(sock: socket.socket, announced: bool) -> bytes | Bundle:
    """The next message: its bytes, or a Bundle where it has descriptors. Blocks.

    *announced*: its announcement was read before (see `marked`).
    Raises: EOFError; OSError: the end came in the middle; DescriptorLimit (EMFILE): the message is
    still there, marked.
    """
    while True:
        if announced:
            size = _BODY_FOLLOWS
        else:
            head = sock.recv(4)
            size = _LENGTH.unpack(head if len(head) == 4 else _rest_of(sock, head, 4))[0]
        if size > 0:
            data = sock.recv(size, _WAITALL)  # as _exactly()
            return data if len(data) == size else _rest_of(sock, data, size)
        if not size:
            return b""
        if size == _LONG_FOLLOWS:
            return _exactly(sock, _LONG.unpack(_exactly(sock, 8))[0])
        bundle = _read_body(sock, size, announced)
        if bundle is not None:
            return bundle
        announced = False  # it was cancelled


def _read_body(sock: socket.socket, size: int, announced: bool) -> Bundle | None:
    """The message whose body is next; None if that was cancelled."""
    try:
        if size <= _SHORT_BODY:
            body_size = _SHORT_BODY - size
            copies = peek_descriptors(sock, MAX_DESCRIPTORS)
        else:
            status, count, length = _BODY.unpack(_peek_bytes(sock, _BODY.size))
            body_size = _BODY.size + length
            copies = _peek(sock, status)
    except DescriptorLimit:
        if not announced:
            _mark(sock, True)
        raise
    try:
        # Without a control buffer: the kernel drops its references, the copies are ours.
        body = sock.recv(body_size, _WAITALL)
        if len(body) < body_size:
            body = _rest_of(sock, body, body_size)
        if announced:
            _mark(sock, False)
        status, count, length = _BODY.unpack_from(body)
    except BaseException:
        close_all(copies)
        raise
    if status == _CANCELLED or len(copies) != count:
        # What was peeked then, if anything, is a later message's.
        close_all(copies)
        if status == _CANCELLED:
            return None
        raise ProtocolError(f"{len(copies)} descriptors arrived with a message of {count}")
    data = body[_BODY.size :] if body_size <= JOINED else memoryview(body)[_BODY.size :]
    return Bundle(data, owned=copies)


def _peek(sock: socket.socket, status: int) -> list[Descriptor]:
    if status == _CANCELLED:
        return []
    copies = peek_descriptors(sock, MAX_DESCRIPTORS)
    if status != _BOXED:
        return copies
    contents: list[Descriptor] = []
    try:
        for box in copies:
            with box.dup().socket() as inside:
                contents += peek_descriptors(inside, MAX_DESCRIPTORS)
    except BaseException:
        close_all(contents)
        raise
    finally:
        close_all(copies)
    return contents


def read_bytes(sock: socket.socket, announced: bool, limit: int | None) -> bytes | None:
    """The next message's bytes; None if they are more than *limit*, and then only its head is read.

    Raises: as `read_message`; InvalidArgument: it has descriptors; it is still there, marked.
    """
    if not announced:
        size: int = _LENGTH.unpack(_exactly(sock, 4))[0]
        if size == _LONG_FOLLOWS:
            size = _LONG.unpack(_exactly(sock, 8))[0]
        if size >= 0:
            return None if limit is not None and size > limit else _exactly(sock, size)
        _mark(sock, True)
    raise InvalidArgument(
        "recv_bytes", "the next message has descriptors, which bytes cannot hold; recv() takes it"
    )


def read_without(sock: socket.socket) -> bytes | None:
    """The data of the marked message, without its descriptors, which are gone then.

    None: its sender has cancelled it.
    """
    status, _, length = _BODY.unpack(_exactly(sock, _BODY.size))
    _mark(sock, False)
    data = _exactly(sock, length)
    return None if status == _CANCELLED else data


def _exactly(sock: socket.socket, size: int) -> bytes:
    # One allocation of the final size, filled in the kernel: no copy however large it is.
    data = sock.recv(size, _WAITALL) if size else b""
    return data if len(data) == size else _rest_of(sock, data, size)


def _rest_of(sock: socket.socket, head: bytes, size: int) -> bytes:
    """*head* and what is missing to *size*: a signal came between, or more than recv(2) gives."""
    parts, have = [head], len(head)
    while have < size:
        part = sock.recv(size - have, _WAITALL) if have else b""
        if not part:
            raise OSError("got end of file during message") if have else EOFError
        parts.append(part)
        have += len(part)
    return b"".join(parts)


def _peek_bytes(sock: socket.socket, size: int) -> bytes:
    data = sock.recv(size, socket.MSG_PEEK | socket.MSG_WAITALL)
    if len(data) < size:
        raise OSError("got end of file during message") if data else EOFError
    return data
