"""Threads that leave the signals of a process to others.

The kernel gives a signal of a process to any thread that does not block it (signal(7)). Python
notes it there, and the main thread runs the handler later. What was noted and is not handled yet is
lost at an exec(2); a signal that all threads block waits for the new program.
"""

from __future__ import annotations

import signal
import threading
from typing import Final

__all__ = ["start_without_signals"]

# These are for the thread that causes them: faulthandler shows where.
_FAULTS: Final = {
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGABRT,
    signal.SIGTRAP,
    signal.SIGSYS,
}
_OTHERS: Final = signal.valid_signals() - _FAULTS


def start_without_signals(thread: threading.Thread) -> None:
    """Starts *thread*, which gets none of the signals that are sent to the process. Raises:
    RuntimeError: there is no room for a thread."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, _OTHERS)  # a new thread inherits what is blocked
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
