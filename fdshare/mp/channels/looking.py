"""Whether the readers of a queue look before they read, which all its processes must know.

A reader that looks (`read_expected`) finds announcement and body of a message also where both came
in one send, which spares the sender a call and the reader a wake-up. One that reads first would
lose the descriptors. So a semaphore that the queue's processes share says what is so:

    0   Readers read first: announcement and body are sent one after the other.
    1   Readers look first; they are still sent one after the other.
    2   Readers look first: both may be sent at once.

It changes by one at a time, and only a reader that has the read lock changes it, so no reader is in
between. Senders heed it while they have the write lock. From 1 to 0 it goes when nobody has that
lock, so whoever saw a 2 has sent, and a look past all that is queued finds no descriptors.
"""

from __future__ import annotations

import socket
import sys
from typing import TYPE_CHECKING, Final

from fdshare.errors import DescriptorLimit
from fdshare.kernel.ancillary import close_all, peek
from fdshare.kernel.descriptor import Descriptor
from fdshare.mp.stock import raw

if TYPE_CHECKING:
    from multiprocessing.synchronize import Lock, Semaphore

__all__ = ["AT_ONCE", "POSSIBLE", "Looking"]

AT_ONCE: Final = 2
_PLAIN: Final = 8  # messages without descriptors, after which looking is thought over
# Not where sem_getvalue(3) does not work (HAVE_BROKEN_SEM_GETVALUE of multiprocessing).
POSSIBLE: Final = sys.platform != "darwin"


class Looking:
    """What a process of one queue knows and says of it."""

    __slots__ = ("_plain", "_semaphore", "_unlocked", "level")

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
        """A reader of *sock* looked and got a message without descriptors."""
        self._plain += 1
        if self._plain % _PLAIN == 0 and (
            self.level() == AT_ONCE or (self._unlocked() and not _brings_descriptors(sock))
        ):
            self._semaphore.acquire(False)


def _brings_descriptors(sock: socket.socket) -> bool:
    try:
        _, copies = peek(sock, 1, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except DescriptorLimit:
        return True
    close_all(map(Descriptor, copies))
    return bool(copies)
