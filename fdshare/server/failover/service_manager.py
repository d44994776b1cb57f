"""Reports to the service manager, if there is one: sd_notify(3).

They never fail. A manager that does not read gets a second for each; then the report is dropped.
"""

from __future__ import annotations

import logging
import os
import subprocess
import time
from typing import Final, NamedTuple

from fdshare.activation import notify, watchdog_seconds
from fdshare.errors import FdshareError

__all__ = [
    "Watchdog",
    "announce_main_pid",
    "ask_systemd",
    "is_reported",
    "leave_service",
    "report",
    "store_state",
]

log = logging.getLogger("fdshare.keeper")

_PATIENCE: Final = 1.0  # seconds for a manager that does not read
_OF_SERVICE: Final = ("NOTIFY_SOCKET", "WATCHDOG_", "LISTEN_")


def leave_service() -> None:
    """From now on there is no service manager to tell: that of the environment is for the program
    that has started this process, which is no service of its own."""
    for variable in list(os.environ):
        if variable.startswith(_OF_SERVICE):
            del os.environ[variable]


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


class StoreState(NamedTuple):
    """How many descriptors the service manager holds for this service at most, and how many it
    holds; None where it does not say."""

    limit: int | None
    held: int | None


def store_state() -> StoreState:
    """What the service manager says. May wait for it.

    systemd tells the limit in $FDSTORE since 254, unless it is 0 (systemd.exec(5)); it is asked all
    the same, because a daemon-reload may change it. The answer stays in $FDSTORE, for successors.
    """
    said = ask_systemd("FileDescriptorStoreMax", "NFileDescriptorStore")
    limit = _count(said.get("FileDescriptorStoreMax") or os.environ.get("FDSTORE", ""))
    if limit is not None:
        os.environ["FDSTORE"] = str(limit)
    return StoreState(limit, _count(said.get("NFileDescriptorStore", "")))


def _count(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None


def ask_systemd(*names: str) -> dict[str, str]:
    """Properties of the unit that this process belongs to; empty where there is none, or nobody to
    ask. May wait for systemd."""
    if not os.environ.get("NOTIFY_SOCKET", "").endswith("/systemd/notify"):
        return {}
    try:
        with open("/proc/self/cgroup") as file:
            groups = file.read().split()
        # The last one is that of version 2, or of systemd alone.
        path = next(group.split(":", 2)[2] for group in reversed(groups) if group[0] in "01")
        unit = os.path.basename(path)
        if not unit.endswith(".service"):
            return {}
        of_user = ["--user"] if "/user@" in os.path.dirname(path) else []
        asks = f"--property={','.join(names)}"
        command = ["systemctl", *of_user, "show", asks, "--", unit]
        asked = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE
        )
    except (OSError, StopIteration, subprocess.SubprocessError):
        return {}
    return dict(line.split("=", 1) for line in asked.stdout.splitlines() if "=" in line)


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
