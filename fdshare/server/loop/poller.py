"""Poller: epoll(7), or poll(2) where there is none. Finds keys, not numbers.

A descriptor number found ready may by then be another's: each registration carries a key object,
and what is ready is named by its key. unregister() comes before every close: while another process
holds a copy of the open file description, epoll keeps a closed number's registration alive, reports
it for ever, and cannot remove it any more (EBADF).
"""

from __future__ import annotations

import select
from typing import Any, Final

__all__ = ["ERROR", "HANGUP", "READ", "WRITE", "Poller"]

READ: Final = select.POLLIN
WRITE: Final = select.POLLOUT
HANGUP: Final = select.POLLHUP | getattr(select, "POLLRDHUP", 0)
ERROR: Final = select.POLLERR

# epoll_wait(2) and poll(2) take an int of milliseconds, 24 days; whoever waits longer looks again.
_LONGEST: Final = 86400.0
# Events of one wait. Their room is allocated each time: above 42 by malloc(3) and not by Python,
# which is half a microsecond of every request. Who is not told of now comes first the next time.
_MOST: Final = 32


class Poller:
    """Level-triggered. HANGUP and ERROR are always reported, RDHUP where it was asked for."""

    def __init__(self) -> None:
        self._epoll = select.epoll() if hasattr(select, "epoll") else None
        self._poll: Any = self._epoll or select.poll()
        self._keys: dict[int, object] = {}

    def register(self, fd: int, events: int, key: object) -> None:
        """Raises: OSError EPERM for what cannot be polled: a regular file, a folder."""
        self._poll.register(fd, events)
        self._keys[fd] = key

    def modify(self, fd: int, events: int) -> None:
        self._poll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        """Does nothing for what is not registered."""
        if self._keys.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def wait(self, timeout: float | None) -> list[tuple[object, int]]:
        """(key, events) of what is ready within *timeout* seconds; None: without limit. Nothing
        may be ready even before that, once a day."""
        if timeout is not None:
            timeout = min(timeout, _LONGEST)
        if self._epoll is not None:
            # epoll counts in milliseconds and Python rounds up: never early, never a busy loop.
            ready = self._epoll.poll(-1 if timeout is None else timeout, _MOST)
        else:
            ready = self._poll.poll(None if timeout is None else int(timeout * 1000) + 1)
        keys = self._keys
        if len(ready) == 1:  # nearly always, and without a comprehension
            fd, events = ready[0]
            return [(keys[fd], events)] if fd in keys else []
        return [(keys[fd], events) for fd, events in ready if fd in keys]

    def close(self) -> None:
        if self._epoll is not None:
            self._epoll.close()
