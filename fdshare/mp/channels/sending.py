"""Sends messages: at once if the socket takes all of it; an Outgoing is what is left otherwise.

framing.py has the form of a message.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Final, TypeAlias

from fdshare.errors import DescriptorLimit
from fdshare.kernel.ancillary import (
    MAX_DESCRIPTORS,
    NOSIGNAL,
    Bytes,
    close_all,
    rights,
    send_message,
    send_rights,
)
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.plain_socket import stream_pair
from fdshare.mp.channels.framing import (
    BODY,
    BODY_FOLLOWS,
    BOXED,
    CANCELLED,
    JOINED,
    LARGEST,
    LENGTH,
    LONG,
    LONG_FOLLOWS,
    PLAIN,
    SHORT_BODY,
    framed,
    headed,
)
from fdshare.mp.channels.peek_level import AT_ONCE
from fdshare.mp.pickling.bundle import Bundle, Encoded

__all__ = ["Outgoing", "send_now"]

# Seconds that a sender waits for receivers when its user has too many descriptors in flight.
PATIENCE: Final = 10.0
_FIRST_PAUSE: Final = 0.0005
_LONGEST_PAUSE: Final = 0.02

# (buffers, descriptors on their first byte), one for each sendmsg(2).
Parts: TypeAlias = list[tuple[list[Bytes], list[int]]]


def send_now(
    sock: socket.socket, message: Encoded, flags: int, level: Callable[[], int] | None = None
) -> Outgoing | None:
    """Sends *message* if the socket takes it; what is left of it, or None.

    If None, it is safe to close what was pickled. *level* is that of peek_level.py.
    """
    if type(message) is bytes and len(message) <= JOINED:
        data = headed(message)
        try:
            sent = sock.send(data, flags | NOSIGNAL)
        except BlockingIOError:
            sent = 0
        if sent == len(data):
            return None
        return Outgoing(Bundle(message), [([memoryview(data)[sent:]], [])])
    bundle = None
    if isinstance(message, tuple):
        data, fds = message
        announcement, body = _framed_single(data)
    else:
        bundle = Bundle(message) if isinstance(message, bytes) else message
        fds = bundle.numbers
        if not 0 < len(fds) <= MAX_DESCRIPTORS or len(bundle.data) > JOINED:
            outgoing = Outgoing(bundle)
            return None if outgoing.push_now(sock, flags) else outgoing
        announcement, body = framed(bundle.data, len(fds))
    # The common case of `Outgoing.push_now`, without one.
    control = rights(fds)  # before the announcement: after it a reader waits for the body
    buffers: list[Bytes] = [body]
    size = len(body)
    rest: Parts = [([announcement], []), ([body], fds)]
    if level is not None and level() == AT_ONCE:
        buffers = [announcement, body]
        size += len(announcement)
    else:
        try:
            sent = sock.send(announcement, flags | NOSIGNAL)
        except BlockingIOError:
            sent = 0
        if sent < len(announcement):
            rest[0] = ([announcement[sent:]], [])
            return Outgoing(bundle or Bundle(b"", fds), rest)
        del rest[0]
    refused = False
    try:
        sent = send_rights(sock, buffers, control, flags)
        if sent == size:
            return None
        rest = [(_after(buffers, sent), [])]
    except BlockingIOError:
        pass
    except DescriptorLimit:
        refused = True
    outgoing = Outgoing(bundle or Bundle(b"", fds), rest)
    outgoing.refused = refused
    return outgoing


@lru_cache(maxsize=256)
def _framed_single(pickled: bytes) -> tuple[bytes, bytes]:
    """`framed` for the pickle of one descriptor: all sockets of a kind have the same."""
    return framed(pickled, 1)


class Outgoing:
    """What is left of a message to send; another thread may send it."""

    __slots__ = ("boxes", "bundle", "parts", "refused")

    def __init__(self, bundle: Bundle, parts: Parts | None = None) -> None:
        """*parts*: what is to be sent of *bundle*; None: all."""
        self.bundle = bundle
        self.boxes: list[Descriptor] = []
        # True after the kernel refused its descriptors (ETOOMANYREFS).
        self.refused = False
        self.parts: Parts = self._parts() if parts is None else parts

    @classmethod
    def of(cls, message: Encoded) -> Outgoing:
        """All of *message*."""
        if isinstance(message, tuple):
            return cls(Bundle(*message))
        return cls(Bundle(message) if isinstance(message, bytes) else message)

    def _parts(self) -> Parts:
        data, fds = self.bundle.data, self.bundle.numbers
        size = len(data)
        if fds:
            return self._with_descriptors(fds, data, size)
        if size <= JOINED:
            return [([headed(data)], [])]
        if size <= LARGEST:
            return [([LENGTH.pack(size), data], [])]
        return [([LENGTH.pack(LONG_FOLLOWS) + LONG.pack(size), data], [])]

    def _with_descriptors(self, fds: list[int], data: Bytes, size: int) -> Parts:
        if size <= JOINED and len(fds) <= MAX_DESCRIPTORS:
            announcement, body = framed(data, len(fds))
            return [([announcement], []), ([body], fds)]
        count, status = len(fds), PLAIN
        if count > MAX_DESCRIPTORS:
            fds, status = self._box(fds), BOXED
        head = BODY.pack(status, count, size)
        announcement = LENGTH.pack(BODY_FOLLOWS)
        if status == PLAIN and len(head) + size <= LARGEST + SHORT_BODY:
            announcement = LENGTH.pack(SHORT_BODY - len(head) - size)
        return [([announcement], []), ([head, data], fds)]

    def _box(self, fds: list[int]) -> list[int]:
        try:
            for start in range(0, len(fds), MAX_DESCRIPTORS):
                inner, outer = stream_pair()
                with inner:
                    self.boxes.append(Descriptor(outer.detach()))
                    some = fds[start : start + MAX_DESCRIPTORS]
                    _patiently(lambda: send_message(inner, (b"\0",), some))  # noqa: B023
        except BaseException:
            close_all(self.boxes)
            raise
        return [box.fileno() for box in self.boxes]

    def push(self, sock: socket.socket, flags: int = 0) -> bool:
        """Sends what the socket takes; True when all of it is sent.

        With MSG_DONTWAIT it is False if the socket is full. Raises: DescriptorLimit
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
        """As `push`, but False also if the kernel refuses the descriptors for now."""
        try:
            return self.push(sock, flags)
        except DescriptorLimit:
            return False

    def push_patiently(self, sock: socket.socket) -> None:
        """Sends all of it, waiting up to PATIENCE seconds for descriptors in flight to be received.

        Raises: DescriptorLimit (ETOOMANYREFS) after that; the message is cancelled.
        """
        try:
            _patiently(lambda: self.push(sock))
        except DescriptorLimit:
            self.cancel(sock)
            raise

    def cancel(self, sock: socket.socket) -> None:
        """Sends a body without descriptors in the place of the one announced."""
        (buffers, _), *_ = self.parts
        size = sum(map(len, buffers)) - BODY.size
        self.parts = [([BODY.pack(CANCELLED, 0, size), bytes(size)], [])]
        self.push(sock)

    def own(self) -> None:
        """Duplicates the descriptors that are left: what was pickled may be closed. Raises: as
        `Bundle.own`."""
        if self.boxes:
            return  # the kernel has those in boxes
        self.bundle.own()
        if self.parts and self.parts[-1][1]:
            self.parts[-1] = (self.parts[-1][0], self.bundle.numbers)

    def close(self) -> None:
        """Closes what it owns, sent or not."""
        boxes, self.boxes = self.boxes, []
        close_all(boxes)
        self.bundle.close()

    def __del__(self) -> None:
        if getattr(self, "boxes", None):
            self.close()


def _after(buffers: list[Bytes], sent: int) -> list[Bytes]:
    for index, buffer in enumerate(buffers):
        if sent < len(buffer):
            return [memoryview(buffer)[sent:], *buffers[index + 1 :]]
        sent -= len(buffer)
    return []


def _patiently(send: Callable[[], object]) -> None:
    """Calls *send* until the kernel does not refuse it; after PATIENCE seconds, it raises."""
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
