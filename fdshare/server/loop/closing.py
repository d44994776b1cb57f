"""Handle: a descriptor that the server holds; Closer: the threads that close it.

close(2) may block: a TCP socket with SO_LINGER and unsent data, a file on FUSE or NFS. So threads
close, in both halves of the server. A handle that is queued to be sent is pinned, and is closed
only after the last pin is gone.
"""

from __future__ import annotations

import os
import threading
import time
from queue import SimpleQueue
from typing import Final, Protocol

__all__ = ["Closer", "Handle", "close_quietly"]

_MOST: Final = 64  # threads that may be stuck
_STUCK: Final = 0.1  # seconds in close(2)


class Closable(Protocol):
    def close(self) -> None: ...


def close_quietly(*owners: Closable) -> None:
    """Closes each, and ignores what close(2) reports: the number is free in any case."""
    for owner in owners:
        try:
            owner.close()
        except OSError:
            pass


class Handle:
    """One descriptor of the table. It has no finalizer: the `Closer`, or the end of the process,
    closes it. *key* is what the poller reports of it."""

    __slots__ = ("at_once", "closing", "fd", "key", "pins")

    def __init__(self, fd: int, *, at_once: bool = False) -> None:
        """Takes *fd* over. *at_once*: its close cannot block, and the loop's own thread does it."""
        self.fd = fd
        self.at_once = at_once
        self.pins = 0
        self.closing = False
        self.key: object = None  # not None: registered with the poller

    def __repr__(self) -> str:
        return f"<Handle fd={self.fd}{' closing' if self.closing else ''}>"


class Closer:
    """Threads that close descriptors. The first starts with the first close, and another whenever
    all are stuck: a close on a dead FUSE mount never returns, and the others must still be
    closed."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[int | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._since: dict[int, float] = {}  # thread -> when its current close(2) began
        self._looking = False  # a timer will see whether all threads are stuck

    def close(self, fd: int) -> None:
        """Closes *fd*, soon; the closer owns it now."""
        self._queue.put(fd)
        if not self._threads or self._is_stuck():
            self._start()
        else:
            self._look_later()

    def stop(self, timeout: float) -> None:
        """Waits up to *timeout* seconds for the closes that were asked for so far."""
        deadline = time.monotonic() + timeout
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        self._threads = []

    def _start(self) -> None:
        if len(self._threads) < _MOST:
            # Daemon threads: a close that never returns must not keep the process from ending.
            thread = threading.Thread(target=self._run, name="fdshare-closer", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _look_later(self) -> None:
        """Whether a close that has just begun is stuck shows only after a while, and then perhaps
        nobody calls."""
        if self._since and not self._looking and len(self._threads) < _MOST:
            self._looking = True
            timer = threading.Timer(_STUCK, self._look)
            timer.daemon = True
            timer.start()

    def _look(self) -> None:
        self._looking = False
        if self._threads and not self._queue.empty():
            if self._is_stuck():
                self._start()
            self._look_later()

    def _is_stuck(self) -> bool:
        before = time.monotonic() - _STUCK
        began = list(self._since.values())
        return 0 < len(began) == len(self._threads) and max(began) < before

    def _run(self) -> None:
        me = threading.get_ident()
        while (fd := self._queue.get()) is not None:
            self._since[me] = time.monotonic()
            try:
                os.close(fd)
            except OSError:
                pass  # the number is free whatever close(2) returned; EIO is the writer's loss
            del self._since[me]
