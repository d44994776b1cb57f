"""ReaderLock: whose turn it is to read of the workers that share a queue."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from fdshare.kernel import system
from fdshare.kernel.at_fork import forget_after_fork
from fdshare.kernel.descriptor import Descriptor, Spare
from fdshare.kernel.memfd import create_memfd

__all__ = ["ReaderLock"]

_flock: Final[Callable[[Any, int], None]] = fcntl.flock
_LOCK: Final = fcntl.LOCK_EX
_TRY: Final = fcntl.LOCK_EX | fcntl.LOCK_NB
_UNLOCK: Final = fcntl.LOCK_UN

_OWN: Final = "/proc/self/fd/%d"
_PAUSE: Final = 0.005  # seconds


class ReaderLock:
    """Held by one process at a time, and released by the kernel when that dies, killed or not.

    A worker waits for its next task under it, and a semaphore would stay locked for ever. It is
    flock(2) on an open file description of each process's own, of one memfd. It is no record lock
    (fcntl(2)), since the kernel refuses those that make processes wait in a circle (EDEADLK;
    posix_locks_deadlock, fs/locks.c): threads that wait for locks of the program's would close one.
    """

    def __init__(self, file: Spare) -> None:
        """Takes over *file*, which all the processes have. Raises: OSError of open(2)."""
        self._file = file
        self._open()
        forget_after_fork(self)

    @classmethod
    def create(cls) -> ReaderLock | None:
        """A new one; None: not on this system, or not without /proc. Raises: OSError (EMFILE)."""
        if not system.HAS_MEMFD:
            return None
        try:
            return cls(Spare(create_memfd("fdshare-reader-lock")))
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            return None

    def _open(self) -> None:
        path = _OWN % self._file.fileno()
        self._own = Spare(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        self._number = self._own.fileno()

    def _after_fork(self) -> None:
        """In a forked child: with the parent's description it would have the parent's lock, also
        after that has died."""
        if not self._own.closed:
            self._close_own()  # first, so that a number is free
            with suppress(OSError):
                self._open()

    def _close_own(self) -> None:
        self._number = -1  # what has that number next is no lock
        self._own.close()

    def __getstate__(self) -> Spare:
        return self._file

    def __setstate__(self, file: Descriptor) -> None:
        self.__init__(Spare(file.detach()))  # type: ignore[misc]

    def __enter__(self) -> None:
        _flock(self._number, _LOCK)

    def __exit__(self, *exc: object) -> None:
        _flock(self._number, _UNLOCK)

    def acquire(self, block: bool = True, timeout: float | None = None, /) -> bool:
        """As of a Lock. flock(2) waits for ever or not at all, so a timeout is many attempts."""
        if block and timeout is None:
            self.__enter__()
            return True
        deadline = time.monotonic() + (timeout or 0.0)
        while True:
            try:
                _flock(self._number, _TRY)
            except BlockingIOError:
                if not block or time.monotonic() >= deadline:
                    return False
                time.sleep(_PAUSE)
            else:
                return True

    def release(self) -> None:
        self.__exit__()

    def close(self) -> None:
        """Closes what this process has of it. Nobody may have it, or wait for it, here."""
        self._close_own()
        self._file.close()
