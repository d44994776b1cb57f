"""The end of an old version: it accepts no more, answers what it has, and stops."""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fdshare.cli.support.program_group import end_group

if TYPE_CHECKING:
    from fdshare.cli.support.deployment import Version
    from fdshare.kernel.descriptor import Descriptor

__all__ = ["PRESETS", "Ending", "catches", "paths_kept"]

_SLICE: Final = 0.2  # seconds between looks, for the progress


@dataclass(frozen=True, slots=True)
class Ending:
    """How a version is stopped. Times in seconds."""

    drain_signal: signal.Signals | None = None
    drain_time: float = 1.0
    stop_signal: signal.Signals = signal.SIGTERM
    stop_timeout: float = 30.0

    def end(self, old: Version, look: Callable[[str], None]) -> str:
        """Returns when *old* has ended; a warning, or empty. *look* is called meanwhile, with what
        is waited for."""
        warning = ""
        if self.drain_signal is not None and self.drain_time:
            if catches(old.pid, self.drain_signal):
                _send(old, self.drain_signal)
                _wait(old, self.drain_time, lambda: look("the old version answers what it has"))
            else:
                warning = f"the old version does not handle {self.drain_signal.name}: not drained"
        if not old.has_ended():
            _send(old, self.stop_signal)
            _wait(old, self.stop_timeout, lambda: look("the old version stops"))
        if not old.has_ended():
            warning = f"the old version did not stop within {self.stop_timeout:g} s: it is killed"
            _send(old, signal.SIGKILL)
            _wait(old, self.stop_timeout, lambda: look("the old version is killed"))
        # What it started and left, if it led a group; nobody else makes a group of its pid.
        end_group(old.program, old.pid, self.stop_timeout, own=False)
        return warning


# By the program of the old version: uvicorn and hypercorn close what they have accepted and not
# read yet when they stop, so an application of theirs drains at SIGUSR1 (docs/howto/deploy.md).
PRESETS: Final = {
    "uvicorn": Ending(drain_signal=signal.SIGUSR1),
    "hypercorn": Ending(drain_signal=signal.SIGUSR1),
}


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process handles that signal: the default of most would end it."""
    try:
        with open(f"/proc/{pid}/status") as file:
            for line in file:
                if line.startswith("SigCgt:"):
                    return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    except OSError:
        pass
    return False


@contextmanager
def paths_kept(listeners: Sequence[Descriptor]) -> Iterator[None]:
    """The paths of UNIX sockets are there afterwards, whoever removes them meanwhile.

    asyncio of Python 3.13 and newer removes the path when it closes a listening socket, also where
    another process accepts on it. A second link keeps the socket's inode.
    """
    links = {}
    for listener in listeners:
        path = _path_of(listener)
        if path:
            link = f"{path}.deploy-{os.getpid()}"
            with suppress(OSError):
                os.link(path, link, follow_symlinks=False)
                links[path] = link
    try:
        yield
    finally:
        for path, link in links.items():
            with suppress(OSError):
                if os.path.lexists(path):
                    os.unlink(link)
                else:
                    os.rename(link, path)


def _path_of(listener: Descriptor) -> str:
    """The path of a UNIX socket; empty of any other."""
    with listener.dup() as copy:
        try:
            sock = copy.socket()
        except OSError:
            return ""
        with sock:
            name = sock.getsockname() if sock.family == socket.AF_UNIX else ""
    return name if isinstance(name, str) and name.startswith("/") else ""


def _send(old: Version, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(old.program.fileno(), number)


def _wait(old: Version, seconds: float, look: Callable[[], None]) -> None:
    waiting = select.poll()
    waiting.register(old.program.fileno(), select.POLLIN)
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0 and not waiting.poll(min(left, _SLICE) * 1000):
        look()
