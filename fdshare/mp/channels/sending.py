"""The sends of a message, and how it is gone on with after one of them.

framing.py has the form of a message. A message of one or two short sends is `Short`: Linux takes or
refuses each as a whole. Any other is an Outgoing, which knows at any moment what is left of it: a
handler of the signal module may raise after any call (kernel/ancillary.py).
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, Final, TypeAlias

from fdshare.errors import DescriptorLimit
from fdshare.kernel import system
from fdshare.kernel.ancillary import (
    MAX_DESCRIPTORS,
    Bytes,
    Rights,
    close_all,
    rights,
    send_all_into,
    send_into,
    send_message,
)
from fdshare.kernel.descriptor import Descriptor, Spare
from fdshare.kernel.descriptor_limit import as_limit
from fdshare.kernel.plain_socket import stream_pair
from fdshare.mp.channels.framing import (
    BODY,
    BODY_FOLLOWS,
    BOXED,
    JOINED,
    LARGEST,
    LARGEST_SHORT,
    LENGTH,
    LONG,
    LONG_FOLLOWS,
    PLAIN,
    SHORT_BODY,
    WHOLE,
    framed,
    headed,
)
from fdshare.mp.pickling.bundle import Encoded, as_bundle

__all__ = ["PATIENCE", "Outgoing", "Short", "patiently", "push_short", "short"]

# Seconds that a sender waits for receivers when its user has too many descriptors in flight.
PATIENCE: Final = 10.0
_FIRST_PAUSE: Final = 0.0005
_LONGEST_PAUSE: Final = 0.02
_DONTWAIT: Final = int(socket.MSG_DONTWAIT)
_SOCKET: Final = int(socket.SOL_SOCKET)
_SNDBUF: Final = int(socket.SO_SNDBUF)
# Bytes beside the memory of an array by itself: the same for one after the other.
_OF_ARRAYS: Final = 512

# (buffers, descriptors on their first byte), one for each sendmsg(2).
Part: TypeAlias = tuple[Sequence[Bytes], Sequence[int]]
# The buffers and the control messages of one or two sends; the first of two is an announcement.
Short: TypeAlias = tuple[Sequence[Sequence[Bytes]], Sequence[Rights]]


def short(message: Encoded, at_once: bool) -> Short | None:
    """*message* in one or two short sends, with borrowed descriptors; None if it takes others.

    *at_once*: announcement and body may be one (peek_level.py).
    """
    if isinstance(message, tuple):
        data, fds = message
        if len(data) > WHOLE:
            return None
        if at_once:
            return _joined_single(data), (rights(fds),)
        announcement, body = _framed_single(data)
    elif isinstance(message, bytes):
        return (((headed(message),),), ((),)) if len(message) <= WHOLE else None
    else:
        content, fds = message.data, message.numbers
        if len(content) > WHOLE or len(fds) > MAX_DESCRIPTORS:
            return None
        if not fds:
            return ((headed(content),),), ((),)
        of_array = message.memory is not None and len(fds) == 1 and len(content) <= _OF_ARRAYS
        if of_array and type(content) is bytes:
            announcement, body = _framed_single(content)
        else:
            announcement, body = framed(content, len(fds))
    if at_once:
        return ((announcement + body,),), (rights(fds),)
    return ((announcement,), (body,)), ((), rights(fds))


def push_short(cell: list[Any], sock: socket.socket, parts: Short, flags: int = 0) -> None:
    """Sends what `short` has returned; ``cell[0]`` is true if it was sent, whatever is raised.

    Raises: BlockingIOError; DescriptorLimit (ETOOMANYREFS); any other OSError of sendmsg(2).
    """
    messages, controls = parts
    if len(messages) == 1:
        send_into(cell, sock, messages[0], controls[0], flags)
        return
    counts: list[int] = []
    try:
        # Only the first may wait: then a reader waits for the second.
        both = flags | system.NOSIGNAL, _DONTWAIT | system.NOSIGNAL
        send_all_into(counts, sock, messages, controls, both)
        cell[0] = True
    except BaseException as error:
        if len(counts) == 1 and isinstance(error, BlockingIOError):
            _send_beyond(cell, sock, messages[1], controls[1])
            return
        cell[0] = len(counts) == 2
        raise


def _send_beyond(
    cell: list[Any], sock: socket.socket, buffers: Sequence[Bytes], control: Rights
) -> None:
    """Sends the beginning of a body on a socket that is full. Raises: BlockingIOError.

    Linux takes a buffer if less than SO_SNDBUF is queued (sock_alloc_send_pskb), and lets us double
    that, up to net.core.wmem_max.
    """
    usual = sock.getsockopt(_SOCKET, _SNDBUF)
    try:
        sock.setsockopt(_SOCKET, _SNDBUF, usual)  # the kernel doubles the value: socket(7)
        send_into(cell, sock, buffers, control, _DONTWAIT)
    finally:
        sock.setsockopt(_SOCKET, _SNDBUF, usual // 2)


@lru_cache(maxsize=256)
def _framed_single(pickled: bytes) -> tuple[bytes, bytes]:
    """`framed` for the pickle of one descriptor: all sockets of a kind have the same."""
    return framed(pickled, 1)


@lru_cache(maxsize=256)
def _joined_single(pickled: bytes) -> tuple[tuple[bytes]]:
    return ((b"".join(_framed_single(pickled)),),)


class Outgoing:
    """What is left to send of a message; another thread may send it."""

    __slots__ = (
        "_body",
        "_cell",
        "_head",
        "_parts",
        "boxes",
        "bundle",
        "given",
        "holds_lock",
        "independent",
    )

    def __init__(self, message: Encoded, sent: int = 0) -> None:
        """*sent*: how many bytes of it were sent; it has no descriptors then."""
        self.bundle = as_bundle(message)
        self.boxes: list[Descriptor] = []
        # True if it needs nothing of what was pickled.
        self.independent = False
        # True if another thread may send it, and if that releases the write lock of the queue.
        self.given = self.holds_lock = False
        # How many bytes were sent of the first part, if any. Both are changed together, with no
        # call in between.
        self._cell: list[int | None] = [None]
        self._parts: tuple[Part, ...] = self._all_parts()
        *self._head, self._body = self._parts
        if sent:
            self._parts = _after(self._parts, sent)

    def _all_parts(self) -> tuple[Part, ...]:
        data, fds = self.bundle.data, self.bundle.numbers
        size = len(data)
        if fds:
            return self._with_descriptors(fds, data, size)
        if size <= JOINED:
            return (((headed(data),), ()),)
        head = LENGTH.pack(size) if size <= LARGEST else LENGTH.pack(LONG_FOLLOWS) + LONG.pack(size)
        return (((head, data), ()),)

    def _with_descriptors(self, fds: list[int], data: Bytes, size: int) -> tuple[Part, ...]:
        if size <= JOINED and len(fds) <= MAX_DESCRIPTORS:
            announcement, body = framed(data, len(fds))
            return ((announcement,), ()), ((body,), fds)
        count, form = len(fds), PLAIN
        if count > MAX_DESCRIPTORS:
            fds, form = self._box(fds), BOXED
        head = BODY.pack(form, count, size)
        announcement = LENGTH.pack(BODY_FOLLOWS)
        if form == PLAIN and len(head) + size <= LARGEST_SHORT:
            announcement = LENGTH.pack(SHORT_BODY - len(head) - size)
        return ((announcement,), ()), ((head, data), fds)

    def _box(self, fds: list[int]) -> list[int]:
        try:
            for start in range(0, len(fds), MAX_DESCRIPTORS):
                inner, outer = stream_pair()
                with inner:
                    self.boxes.append(Spare(outer.detach()))
                    some = fds[start : start + MAX_DESCRIPTORS]
                    patiently(lambda: send_message(inner, (b"\0",), some))  # noqa: B023
        except BaseException as error:
            close_all(self.boxes)
            raise as_limit(error) from None
        return [box.fileno() for box in self.boxes]

    @classmethod
    def joined(cls, messages: Sequence[Bytes]) -> Outgoing:
        """One of several messages that `framing.headed` has made."""
        self = cls(b"")
        self._head, self._body = [], ((b"".join(messages),), ())
        self._parts = (self._body,)
        return self

    @property
    def has_descriptors(self) -> bool:
        """True if there are descriptors in what is left."""
        return bool(self._parts) and bool(self._parts[-1][1])

    @property
    def unsent(self) -> bool:
        """True if nothing was sent that a reader takes for a message."""
        parts = self._parts
        return bool(parts) and parts[-1] is self._body and (len(parts) > 1 or not self._cell[0])

    @property
    def begun(self) -> bool:
        """True if a reader waits for the rest."""
        return bool(self._parts) and not self.unsent

    def push(self, sock: socket.socket, flags: int = 0) -> None:
        """Sends what is left. Whatever is raised, it can be called again.

        Raises: BlockingIOError; DescriptorLimit (ETOOMANYREFS); any other OSError of sendmsg(2).
        """
        while self._parts:
            buffers, fds = self._parts[0]
            if self._cell[0] is None:
                control = rights(fds)
                try:
                    # Nobody waits when a reader waits for the beginning of the body.
                    send_into(self._cell, sock, buffers, control, _DONTWAIT if fds else flags)
                except BlockingIOError:
                    if not fds:
                        raise
                    _send_beyond(self._cell, sock, buffers, control)
            self._record()
        self.close()

    def _record(self) -> None:
        """Takes what was sent from what is left."""
        sent = self._cell[0]
        if sent is not None:
            left = _after(self._parts, sent)
            self._parts, self._cell = left, [None]

    def push_now(self, sock: socket.socket) -> bool:
        """As `push`, without waiting: False if it would have to."""
        try:
            self.push(sock, _DONTWAIT)
        except (BlockingIOError, DescriptorLimit):
            return False
        return True

    def push_patiently(self, sock: socket.socket) -> None:
        """As `push`, but waits up to PATIENCE seconds for descriptors in flight to be received.

        Raises: DescriptorLimit (ETOOMANYREFS) after that.
        """
        patiently(lambda: self.push(sock))

    def settle(self, sock: socket.socket) -> bool:
        """After an exception: True if the rest has to be sent, which needs nothing of what was
        pickled then."""
        self._record()
        if self.unsent and len(self._parts) == 1 and self.has_descriptors:  # it is announced
            with suppress(OSError):
                self.push_now(sock)
        if self.begun:
            self.own()
        return self.begun

    def own(self) -> None:
        """Makes it independent: what was pickled may be closed. Raises: as `Bundle.share`."""
        self._record()
        parts = self._parts
        # The kernel has those in boxes, and those of a body that has begun.
        if parts and parts[-1][1] and not self.boxes and not self.independent:
            self.bundle.share()
            body = parts[-1][0], self.bundle.numbers
            # Announced once more: another message may be sent before.
            self._parts, self._body = (*self._head, body), body
        elif self.begun:
            # A buffer that was given to send_bytes() is its caller's.
            self._parts = tuple((list(map(_constant, buffers)), fds) for buffers, fds in parts)
        self.independent = True

    def close(self) -> None:
        """Closes what it owns, sent or not."""
        boxes, self.boxes = self.boxes, []
        close_all(boxes)
        self.bundle.close()


def _constant(buffer: Bytes) -> Bytes:
    return buffer if memoryview(buffer).readonly else bytes(buffer)


def _after(parts: tuple[Part, ...], sent: int) -> tuple[Part, ...]:
    """What is left of *parts* when *sent* bytes of the first were sent."""
    (buffers, _), *others = parts
    for index, buffer in enumerate(buffers):
        if sent < len(buffer):
            return ([memoryview(buffer)[sent:], *buffers[index + 1 :]], ()), *others
        sent -= len(buffer)
    return tuple(others)


def patiently(send: Callable[[], object], patience: float = PATIENCE) -> None:
    """Calls *send* until the kernel does not refuse it; after *patience* seconds, it raises."""
    pause = _FIRST_PAUSE
    deadline = time.monotonic() + patience
    while True:
        try:
            send()
            return
        except DescriptorLimit:
            if time.monotonic() >= deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
