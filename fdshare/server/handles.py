"""Handle: a held descriptor that is closed off the event loop, and not before it was last sent.

close(2) may block: a TCP socket with SO_LINGER and unsent data, a file on FUSE or NFS. So one
thread closes, in both halves of the server. A handle that is queued to be sent is pinned; closing
it then waits for the last pin.
"""

from __future__ import annotations

import os
import threading
from queue import SimpleQueue

from fdshare.kernel.descriptor import Descriptor

__all__ = ["Closer", "Handle"]


class Handle:
    """One descriptor of the table. *key* is what the event loop finds when it stirs."""

    __slots__ = ("closing", "fd", "key", "pins")

    def __init__(self, descriptor: Descriptor) -> None:
        """Takes *descriptor* over."""
        self.fd = descriptor.detach()
        self.pins = 0
        self.closing = False
        self.key: object = None  # not None: registered with the poller

    def __repr__(self) -> str:
        return f"<Handle fd={self.fd}{' closing' if self.closing else ''}>"


class Closer:
    """A thread that closes what it is given, in order; started with the first."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[int | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def close(self, fd: int) -> None:
        """Closes *fd*, soon; the closer owns it now."""
        if self._thread is None:
            # A daemon: a close that never returns must not keep the process from ending.
            self._thread = threading.Thread(target=self._run, name="fdshare-closer", daemon=True)
            self._thread.start()
        self._queue.put(fd)

    def stop(self, timeout: float) -> None:
        """Waits up to *timeout* seconds for what was given so far."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(timeout)
            self._thread = None

    def _run(self) -> None:
        while (fd := self._queue.get()) is not None:
            try:
                os.close(fd)
            except OSError:
                pass  # the number is free whatever close(2) returned; EIO is the writer's loss
