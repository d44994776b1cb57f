"""SIGINT, SIGTERM and SIGHUP as something to poll: what was started is ended in one place."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Final, Self

from fdshare.kernel.descriptor import Descriptor

__all__ = ["Interruptions"]

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interruptions:
    """While it is open, these signals end nothing: they are read from `fileno()`.

    One that this process ignores (nohup) stays ignored. For the main thread.
    """

    def __init__(self) -> None:
        reads, writes = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._reads, self._writes = Descriptor(reads), Descriptor(writes)
        self._former: dict[int, object] = {}

    def fileno(self) -> int:
        """Readable when one of them came."""
        return self._reads.fileno()

    def received(self) -> signal.Signals | None:
        """The first that came, or None."""
        try:
            return signal.Signals(os.read(self._reads.fileno(), 1)[0])
        except BlockingIOError:
            return None

    def __enter__(self) -> Self:
        signal.set_wakeup_fd(self._writes.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            former = signal.getsignal(number)
            if former is not signal.SIG_IGN:
                self._former[number] = former
                signal.signal(number, _nothing)
        return self

    def __exit__(self, *exc: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, former in self._former.items():
            signal.signal(number, former)  # type: ignore[arg-type]
        self._reads.close()
        self._writes.close()


def _nothing(number: int, frame: FrameType | None) -> None:
    """What wakes the poll is the wakeup descriptor."""
