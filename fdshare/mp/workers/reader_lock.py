"""ReaderLock: whose turn it is to read of the workers that share a queue."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable
from typing import Any, Final

from fdshare.mp.channels.connection import ConnectionMixin

__all__ = ["ReaderLock"]

_lockf: Final[Callable[[Any, int], None]] = fcntl.lockf
_LOCK: Final = fcntl.LOCK_EX
_TRY: Final = fcntl.LOCK_EX | fcntl.LOCK_NB
_UNLOCK: Final = fcntl.LOCK_UN

_PAUSE: Final = 0.005  # seconds


class ReaderLock:
    """Held by one process at a time, and released by the kernel when that dies, killed or not.

    A worker waits for its next task under it, and a semaphore would stay locked for ever. A record
    lock (fcntl(2), F_SETLKW) is a process's own. Linux takes one on any descriptor, so that it is
    on the socket itself.
    """

    def __init__(self, reader: ConnectionMixin) -> None:
        """Raises: OSError: not on a socket, on this system."""
        self._reader = reader
        _lockf(reader, _TRY)
        _lockf(reader, _UNLOCK)

    # The number itself: of the connection, lockf() would ask a method in Python.
    def __enter__(self) -> None:
        _lockf(self._reader._handle, _LOCK)

    def __exit__(self, *exc: object) -> None:
        _lockf(self._reader._handle, _UNLOCK)

    def acquire(self, block: bool = True, timeout: float | None = None, /) -> bool:
        """As of a Lock. fcntl(2) waits for ever or not at all, so a timeout is many attempts."""
        if block and timeout is None:
            self.__enter__()
            return True
        deadline = time.monotonic() + (timeout or 0.0)
        while True:
            try:
                _lockf(self._reader._handle, _TRY)
            except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, fcntl(2)
                if not block or time.monotonic() >= deadline:
                    return False
                time.sleep(_PAUSE)
            else:
                return True

    def release(self) -> None:
        self.__exit__()
