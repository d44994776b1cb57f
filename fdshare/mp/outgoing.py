"""A message on its way out: sent at once where the socket takes it, or what is left of it.

frames.py says what is sent.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from fdshare.errors import DescriptorLimit
from fdshare.kernel.ancillary import (
    MAX_DESCRIPTORS,
    Bytes,
    close_all,
    rights,
    send_message,
    send_rights,
)
from fdshare.kernel.descriptor import Descriptor
from fdshare.mp.frames import (
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
from fdshare.mp.transit import Bundle

__all__ = ["Outgoing", "send_now"]

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
            data = headed(message)
            try:
                sent = sock.send(data, flags)
            except BlockingIOError:
                sent = 0
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
    control = rights(fds)  # before the announcement: between it and the body a reader waits
    try:
        sent = sock.send(announcement, flags)
    except BlockingIOError:
        sent = 0
    if sent < len(announcement):
        rest: Parts = [([announcement[sent:]], []), ([body], fds)]
        return Outgoing(message, rest)  # type: ignore[arg-type]
    refused = False
    try:
        sent = send_rights(sock, (body,), control, flags)
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
        elif size <= LARGEST:
            self.parts = [([LENGTH.pack(size), data], [])]
        else:
            self.parts = [([LENGTH.pack(LONG_FOLLOWS) + LONG.pack(size), data], [])]

    def _with_descriptors(self, fds: Any, data: Bytes, size: int) -> Any:
        count, status = len(fds), PLAIN
        if count > MAX_DESCRIPTORS:
            fds, status = self._box(fds), BOXED
        body = BODY.pack(status, count, size)
        total = len(body) + size
        if status == PLAIN and total <= LARGEST + SHORT_BODY:
            announcement = LENGTH.pack(SHORT_BODY - total)
        else:
            announcement = LENGTH.pack(BODY_FOLLOWS)
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
