"""Reports to the service manager, if there is one: sd_notify(3).

They never fail. A manager that does not read gets a second for each; then the report is dropped.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Final

from fdshare.activation import notify, watchdog_seconds
from fdshare.errors import FdshareError

__all__ = ["Watchdog", "announce_main_pid", "is_reported", "report"]

log = logging.getLogger("fdshare.keeper")

_PATIENCE: Final = 1.0  # seconds for a manager that does not read


def is_reported() -> bool:
    """True where there is a service manager to tell."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def report(state: str) -> None:
    """Sends *state* to the service manager, if there is one. Never fails."""
    try:
        notify(state, timeout=_PATIENCE)
    except (OSError, FdshareError) as error:
        log.warning("the service manager was not told %s: %s", state, error)


def announce_main_pid() -> None:
    """Tells the service manager to watch this process from now on, instead of one that died.

    systemd accepts that from every process of the unit if NotifyAccess=all.
    """
    if "WATCHDOG_PID" in os.environ:
        os.environ["WATCHDOG_PID"] = str(os.getpid())
    report(f"MAINPID={os.getpid()}")


class Watchdog:
    """Reports WATCHDOG=1 twice in the time that the service manager allows, sd_watchdog_enabled(3).

    *due* is the time of the next report, None if none are asked for.
    """

    def __init__(self) -> None:
        self._every = _interval()
        self.due = None if self._every is None else time.monotonic()

    def feed(self, *, well: bool = True) -> None:
        """Reports, if it is time to; if not *well*, waits until it is."""
        if self.due is None or self._every is None or time.monotonic() < self.due:
            return
        if well:
            report("WATCHDOG=1")
        self.due = time.monotonic() + (self._every if well else self._every / 4)


def _interval() -> float | None:
    try:
        seconds = watchdog_seconds()
    except FdshareError as error:
        log.warning("the watchdog is not fed: %s", error)
        return None
    return None if seconds is None else seconds / 2
