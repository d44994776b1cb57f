"""Whether the readers of a queue peek before they read, which all its processes must know.

A reader that peeks (`read_expected`) may be sent announcement and body of a message in one send,
which saves the sender a system call and a waiting reader a wake-up: on two cores a socket sent to
and fro takes 12 us instead of 21. A reader that reads the announcement first would lose the
descriptors. So the value of a semaphore that the queue's processes share is the level:

    0   Readers read the announcement first: announcement and body are two sends.
    1   Readers peek first; announcement and body are still two sends.
    2   Readers peek first: announcement and body may be one send.

A reader changes it, by one, while it has the read lock, so no other reader is reading. A sender
reads it while it has the write lock. It goes from 1 to 0 only while nobody has the write lock, so
that a sender that saw a 2 has sent; and only if a peek over all that is queued finds no descriptor.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, ClassVar, Final

from fdshare.kernel.ancillary import Look, close_looks, look_into
from fdshare.mp.stock import raw

if TYPE_CHECKING:
    from multiprocessing.synchronize import Lock, Semaphore

__all__ = ["AT_ONCE", "AlwaysPeek", "PeekLevel"]

AT_ONCE: Final = 2
_PLAIN: Final = 8  # messages without descriptors, after which the level is lowered if it can be


class PeekLevel:
    """The level of one queue, in one of its processes."""

    __slots__ = ("_plain", "_semaphore", "_unlocked", "level")

    flags: ClassVar[int] = 0  # of a peek

    def __init__(self, semaphore: Semaphore, write_lock: Lock) -> None:
        """*semaphore* was made with a value of 0. Both belong to the queue."""
        self._semaphore = semaphore
        # As Queue.qsize() of the standard library calls it.
        self.level = raw(semaphore)._get_value
        self._unlocked = raw(write_lock)._get_value
        self._plain = 0

    def begin(self) -> None:
        """A reader got descriptors several times in a row."""
        self._plain = 0
        while self.level() < AT_ONCE:
            self._semaphore.release()

    def plain(self, sock: socket.socket) -> None:
        """A reader of *sock* peeked, and received a message without descriptors."""
        self._plain += 1
        if self._plain % _PLAIN == 0 and (
            self.level() == AT_ONCE or (self._unlocked() and not _brings_descriptors(sock))
        ):
            self._semaphore.acquire(False)


class AlwaysPeek(PeekLevel):
    """The level of a stream whose readers always peek, and never wait for a message to begin. They
    are always sent both at once: one that is killed has read all of a short message or nothing."""

    __slots__ = ()

    flags = int(socket.MSG_DONTWAIT)

    def __init__(self) -> None:
        self.level = lambda: AT_ONCE

    def begin(self) -> None:
        pass

    def plain(self, sock: socket.socket) -> None:
        pass


def _brings_descriptors(sock: socket.socket) -> bool:
    looks: list[Look] = []
    try:
        missing = look_into(looks, sock, 1, socket.MSG_DONTWAIT)
        found = missing is not None or bool(looks[0][1])
        close_looks(looks)
    except BlockingIOError:
        return False
    except BaseException:
        close_looks(looks)
        raise
    return found
