"""Ending programs as a person does, and servers so that nothing of them is left."""

from __future__ import annotations

import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any


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


def is_running(pid: int) -> bool:
    """False for one that has ended, also if nobody has waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def let_end(process: subprocess.Popen[Any], seconds: float = 20) -> None:
    """Waits for a server that was told to end, and kills one that does not.

    Killed while it is about to end, a half would be replaced by the other.
    """
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    process.wait()
