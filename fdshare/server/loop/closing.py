"""Handle: a held descriptor that is closed off the event loop, and not before it was last sent.

close(2) may block: a TCP socket with SO_LINGER and unsent data, a file on FUSE or NFS. So a thread
closes, in both halves of the server. A handle that is queued to be sent is pinned; closing
it then waits for the last pin.
"""

from __future__ import annotations

import os
import threading
import time
from queue import SimpleQueue
from typing import Final, Protocol

from fdshare.kernel.descriptor import Descriptor

__all__ = ["Closer", "Handle", "close_quietly"]

_MOST: Final = 64  # threads that may be stuck
_STUCK: Final = 0.1  # seconds in close(2)


class Closable(Protocol):
    def close(self) -> None: ...


def close_quietly(*owners: Closable) -> None:
    """Closes each. What close(2) reports is somebody else's loss: the number is free."""
    for owner in owners:
        try:
            owner.close()
        except OSError:
            pass


class Handle:
    """One descriptor of the table. *key* is what the event loop finds when it stirs."""

    __slots__ = ("at_once", "closing", "fd", "key", "pins")

    def __init__(self, descriptor: Descriptor, *, at_once: bool = False) -> None:
        """Takes *descriptor* over. *at_once*: it is closed in the loop's own thread, for its
        close cannot block."""
        self.fd = descriptor.detach()
        self.at_once = at_once
        self.pins = 0
        self.closing = False
        self.key: object = None  # not None: registered with the poller

    def __repr__(self) -> str:
        return f"<Handle fd={self.fd}{' closing' if self.closing else ''}>"


class Closer:
    """Threads that close what they are given; started with the first, and one more whenever all of
    them are stuck: a close on a dead FUSE mount never returns, and must not keep the rest open."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[int | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._since: dict[int, float] = {}  # thread -> when the close that it is in began

    def close(self, fd: int) -> None:
        """Closes *fd*, soon; the closer owns it now."""
        self._queue.put(fd)
        if not self._threads or (len(self._threads) < _MOST and self._is_stuck()):
            # Daemons: a close that never returns must not keep the process from ending.
            thread = threading.Thread(target=self._run, name="fdshare-closer", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self, timeout: float) -> None:
        """Waits up to *timeout* seconds for what was given so far."""
        deadline = time.monotonic() + timeout
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        self._threads = []

    def _is_stuck(self) -> bool:
        before = time.monotonic() - _STUCK
        began = list(self._since.values())
        return len(began) == len(self._threads) and max(began) < before

    def _run(self) -> None:
        me = threading.get_ident()
        while (fd := self._queue.get()) is not None:
            self._since[me] = time.monotonic()
            try:
                os.close(fd)
            except OSError:
                pass  # the number is free whatever close(2) returned; EIO is the writer's loss
            del self._since[me]
