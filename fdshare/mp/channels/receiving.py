"""Receives the next message of a socket without losing any of its descriptors.

framing.py has the form of a message, and says why it is peeked at before it is read.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, Final

from fdshare.errors import DescriptorLimit, InvalidArgument, ProtocolError
from fdshare.kernel.ancillary import close_all, peek
from fdshare.kernel.descriptor import Descriptor
from fdshare.mp.channels.framing import (
    BODY,
    BODY_FOLLOWS,
    BOXED,
    CANCELLED,
    JOINED,
    LENGTH,
    LONG,
    LONG_FOLLOWS,
    SHORT_BODY,
)
from fdshare.mp.pickling.bundle import Arrived, Bundle, Made, made_at_once

__all__ = ["marked", "read_bytes", "read_expected", "read_message", "read_without"]

_ANNOUNCED: Final = LENGTH.size + 1  # bytes up to the first one of the body
# Any user may set 0 to 6; socket(7). Where there is none, only the connection object has the mark.
_MARK: Final[int | None] = getattr(socket, "SO_PRIORITY", None)
_SOCKET: Final = int(socket.SOL_SOCKET)
_WAITALL: Final = int(socket.MSG_WAITALL)
_PEEK_ALL: Final = int(socket.MSG_PEEK | socket.MSG_WAITALL)

# Announcement and body of pickles that are `made_at_once`, and the function that builds the object.
_bodies: Final[dict[bytes, Callable[[int], Any]]] = {}
_SHORT: Final = 512  # bytes; none of their bodies is longer


def marked(sock: socket.socket) -> bool:
    """True if a reader of this socket has read an announcement and left the body."""
    return _MARK is not None and sock.getsockopt(_SOCKET, _MARK) != 0


def _mark(sock: socket.socket, value: bool) -> None:
    if _MARK is not None:
        sock.setsockopt(_SOCKET, _MARK, value)


def read_message(sock: socket.socket, announced: bool) -> Arrived:
    """The next message. Blocks.

    *announced*: its announcement was read before (see `marked`).
    Raises: EOFError; OSError: the end came in the middle; DescriptorLimit (EMFILE): the message is
    still there, marked.
    """
    while True:
        if announced:
            size = BODY_FOLLOWS
        else:
            head = sock.recv(4)
            size = LENGTH.unpack(head if len(head) == 4 else _rest_of(sock, head, 4))[0]
        if size > 0:
            data = sock.recv(size, _WAITALL)  # as _exactly()
            return data if len(data) == size else _rest_of(sock, data, size)
        if not size:
            return b""
        if size == LONG_FOLLOWS:
            return _exactly(sock, LONG.unpack(_exactly(sock, 8))[0])
        message = _read_body(sock, size, announced)
        if message is not None:
            return message
        announced = False  # it was cancelled


def _read_body(sock: socket.socket, size: int, announced: bool) -> Bundle | Made | None:
    """The message whose body is next; None if that was cancelled."""
    try:
        if size <= SHORT_BODY:
            body_size = SHORT_BODY - size
            copies = peek(sock, 1)[1]
        else:
            status, _, length = BODY.unpack(_peek_bytes(sock, BODY.size))
            body_size = BODY.size + length
            copies = _peek(sock, status)
    except DescriptorLimit:
        if not announced:
            _mark(sock, True)
        raise
    return _read_rest(sock, 0, body_size, copies, announced)


def read_expected(sock: socket.socket) -> Bundle | Made | None:
    """The next message if it has descriptors, in one peek and one read, where `read_message` needs
    one read more. None: `read_message` has to read it. Blocks until there is one.

    To be called where descriptors are likely: for a message without any the peek is wasted, and
    walks on to the next that has some. Raises: as `read_message`, but at the limit all of it stays.
    """
    try:
        head, copies = peek(sock, _ANNOUNCED)
        if len(head) == LENGTH.size:  # the body is being sent
            head, copies = peek(sock, _ANNOUNCED)
    except DescriptorLimit:
        head = sock.recv(_ANNOUNCED, socket.MSG_PEEK)
        if len(head) == _ANNOUNCED and LENGTH.unpack_from(head)[0] <= SHORT_BODY:
            raise
        return None  # the descriptors are a later message's
    # Announcements are negative. A body left by another reader begins with its status, and is not.
    size = LENGTH.unpack_from(head)[0] if len(head) == _ANNOUNCED else 0
    if not copies or size > SHORT_BODY:
        _close(copies)
        return None
    return _read_rest(sock, LENGTH.size, SHORT_BODY - size, copies, False)


def _read_rest(
    sock: socket.socket, start: int, size: int, copies: list[int], announced: bool
) -> Bundle | Made | None:
    """The message whose body has *size* bytes after *start* others. The descriptors *copies*, found
    by the peek, now belong to it. None: it was cancelled."""
    try:
        # Without a control buffer: the kernel drops its references, the copies are ours.
        body = sock.recv(start + size, _WAITALL)
        if len(body) < start + size:
            body = _rest_of(sock, body, start + size)
        if announced:
            _mark(sock, False)
        build = _bodies.get(body) if size <= _SHORT else None
        if build is None or len(copies) != 1:
            status, count, _ = BODY.unpack_from(body, start)
    except BaseException:
        _close(copies)
        raise
    if build is not None and len(copies) == 1:
        try:
            return (build(copies[0]),)
        except Exception as error:  # to be raised where the message is opened
            bundle = Bundle(b"")
            bundle.missing = error
            return bundle
    if status == CANCELLED or len(copies) != count:
        # What the peek found then, if anything, is a later message's.
        _close(copies)
        if status == CANCELLED:
            return None
        raise ProtocolError(f"{len(copies)} descriptors arrived with a message of {count}")
    first = start + BODY.size
    owned = list(map(Descriptor, copies))
    if size > JOINED:
        return Bundle(memoryview(body)[first:], owned=owned)
    data = body[first:]
    if start and count == 1 and data in made_at_once:
        _bodies[body] = made_at_once[data]
    return Bundle(data, owned=owned)


def _close(numbers: list[int]) -> None:
    close_all(map(Descriptor, numbers))


def _peek(sock: socket.socket, status: int) -> list[int]:
    if status == CANCELLED:
        return []
    copies = peek(sock, 1)[1]
    if status != BOXED:
        return copies
    contents: list[int] = []
    try:
        for box in copies:
            with Descriptor.dup_of(box).socket() as inside:
                contents += peek(inside, 1)[1]
    except BaseException:
        _close(contents)
        raise
    finally:
        _close(copies)
    return contents


def read_bytes(
    sock: socket.socket, announced: bool, limit: int | None, peeks: bool = False
) -> bytes | None:
    """The next message's bytes; None if they are more than *limit*, and then only its head is read.

    *peeks*: the body may have been sent with the announcement. Raises: as `read_message`;
    InvalidArgument: it has descriptors; it is still there, and marked if not *peeks*.
    """
    if not announced:
        size: int = LENGTH.unpack((_peek_bytes if peeks else _exactly)(sock, 4))[0]
        if peeks and size >= LONG_FOLLOWS:
            _exactly(sock, 4)
        if size == LONG_FOLLOWS:
            size = LONG.unpack(_exactly(sock, 8))[0]
        if size >= 0:
            return None if limit is not None and size > limit else _exactly(sock, size)
        if not peeks:
            _mark(sock, True)
    raise InvalidArgument(
        "recv_bytes", "the next message has descriptors, which bytes cannot hold; recv() takes it"
    )


def read_without(sock: socket.socket, announced: bool) -> bytes | None:
    """The data of the message left at the limit; its descriptors are lost. None: its sender has
    cancelled it.
    """
    if not announced:
        _exactly(sock, LENGTH.size)
    status, _, length = BODY.unpack(_exactly(sock, BODY.size))
    if announced:
        _mark(sock, False)
    data = _exactly(sock, length)
    return None if status == CANCELLED else data


def _exactly(sock: socket.socket, size: int) -> bytes:
    # One buffer of the final size, which the kernel fills: no copy, whatever the size.
    data = sock.recv(size, _WAITALL) if size else b""
    return data if len(data) == size else _rest_of(sock, data, size)


def _rest_of(sock: socket.socket, head: bytes, size: int) -> bytes:
    """*head* and what is missing to *size* bytes, after a signal or a short recv(2)."""
    parts, have = [head], len(head)
    while have < size:
        part = sock.recv(size - have, _WAITALL) if have else b""
        if not part:
            raise OSError("got end of file during message") if have else EOFError
        parts.append(part)
        have += len(part)
    return b"".join(parts)


def _peek_bytes(sock: socket.socket, size: int) -> bytes:
    data = sock.recv(size, _PEEK_ALL)
    if len(data) < size:
        raise OSError("got end of file during message") if data else EOFError
    return data
