"""Poller: epoll(7), or poll(2) where there is none. It reports keys, not descriptor numbers.

When a number is reported ready, it may have been closed and used again: so each registration has a
key object, and the key is reported. A descriptor is unregistered before it is closed: while another
process holds a copy of the open file description, epoll keeps the registration of a closed number,
reports it for ever, and cannot remove it any more (EBADF).
"""

from __future__ import annotations

import select
from typing import Any, Final

from fdshare.kernel import system

__all__ = ["ERROR", "FEW", "HANGUP", "MANY", "READ", "WRITE", "Poller"]

READ: Final = select.POLLIN
WRITE: Final = select.POLLOUT
HANGUP: Final = select.POLLHUP | system.RDHUP
ERROR: Final = select.POLLERR

# epoll_wait(2) and poll(2) take an int of milliseconds, at most 24 days.
_LONGEST: Final = 86400.0
# Events of one wait. Their memory is allocated each time: for more than 42 by malloc(3) and not by
# Python, which takes half a microsecond of every request. The others are reported first next time.
FEW: Final = 32
MANY: Final = 256  # ... of one where there is a crowd: who has come for one request is among them


class Poller:
    """Level-triggered. HANGUP and ERROR are always reported, RDHUP if it was asked for."""

    def __init__(self) -> None:
        self._epoll = select.epoll() if system.HAS_EPOLL else None
        self._poll: Any = self._epoll or select.poll()
        self._keys: dict[int, object] = {}

    def register(self, fd: int, events: int, key: object) -> None:
        """Raises: OSError EPERM for what cannot be polled: a regular file, a directory."""
        self._poll.register(fd, events)
        self._keys[fd] = key

    def modify(self, fd: int, events: int) -> None:
        self._poll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        """Does nothing if *fd* is not registered."""
        if self._keys.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def wait(self, timeout: float | None, most: int = FEW) -> list[tuple[object, int]]:
        """(key, events) of each that is ready within *timeout* seconds, or of the *most* that were
        first; None: without limit. The list may be empty earlier: no wait is longer than a day."""
        if timeout is not None:
            timeout = min(timeout, _LONGEST)
        if self._epoll is not None:
            # epoll counts in milliseconds and Python rounds up: never early, never a busy loop.
            ready = self._epoll.poll(-1 if timeout is None else timeout, most)
        else:
            ready = self._poll.poll(None if timeout is None else int(timeout * 1000) + 1)
        keys = self._keys
        if len(ready) == 1:  # as nearly always: quicker than the comprehension
            fd, events = ready[0]
            return [(keys[fd], events)] if fd in keys else []
        return [(keys[fd], events) for fd, events in ready if fd in keys]

    def close(self) -> None:
        if self._epoll is not None:
            self._epoll.close()
