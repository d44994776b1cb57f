"""A message on its way out: sent at once where the socket takes it, or what is left of it.

frames.py says what is sent.
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
from fdshare.mp.channels.looking import AT_ONCE
from fdshare.mp.pickling.bundle import Bundle, Encoded

__all__ = ["Outgoing", "send_now"]

# How long a sender waits for receivers when its user has too many descriptors in flight. Seconds.
PATIENCE: Final = 10.0
_FIRST_PAUSE: Final = 0.0005
_LONGEST_PAUSE: Final = 0.02

# (buffers, descriptors on their first byte), one for each sendmsg(2).
Parts: TypeAlias = list[tuple[list[Bytes], list[int]]]


def send_now(
    sock: socket.socket, message: Encoded, flags: int, level: Callable[[], int] | None = None
) -> Outgoing | None:
    """Send *message* if the socket takes it; what is left of it, or None.

    It is safe to close what was pickled where it is None. *level* is that of looking.py.
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
    control = rights(fds)  # before the announcement: between it and the body a reader waits
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
    """A message on its way out: what is left of it, so that another thread may send the rest."""

    __slots__ = ("boxes", "bundle", "parts", "refused")

    def __init__(self, bundle: Bundle, parts: Parts | None = None) -> None:
        """*parts* are what is to be sent of it, where that is not all."""
        self.bundle = bundle
        self.boxes: list[Descriptor] = []
        # True once the kernel would not have its descriptors (ETOOMANYREFS).
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
        size = sum(map(len, buffers)) - BODY.size
        self.parts = [([BODY.pack(CANCELLED, 0, size), bytes(size)], [])]
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
