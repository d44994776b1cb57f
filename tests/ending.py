"""Ending programs as a person does."""

from __future__ import annotations

import signal
import subprocess
import time


def terminated(process: subprocess.Popen[str], seconds: float = 60) -> tuple[str, str]:
    """What *process* still says, on standard output and error, after a SIGTERM that ends it.

    After some seconds there is another. A handler in Python runs between two of its instructions,
    so a signal that comes just before a system call begins to wait is heard when that returns; only
    who has signal.set_wakeup_fd() among what he waits for hears it at once, and plain programs
    have not.
    """
    deadline = time.monotonic() + seconds
    while True:
        process.send_signal(signal.SIGTERM)
        try:
            return process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline:
                raise
