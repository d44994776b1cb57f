"""Processes that hang in their end.

A process that was killed closes what it had open, and asks the file system of each file on FUSE or
NFS. Where nobody answers, it never ends: it runs no code any more, keeps what it had open, and its
pidfd says nothing.
"""

from __future__ import annotations

import logging
import os
import select
from contextlib import suppress
from typing import Final

from fdshare.kernel.descriptor import Descriptor
from fdshare.server.loop.closing import close_quietly
from fdshare.server.loop.poller import READ, Poller

__all__ = ["Dying", "has_ended", "is_ending", "pid_of", "reap"]

log = logging.getLogger("fdshare.server")

_PF_EXITING: Final = 0x4  # <linux/sched.h>; among the flags of proc_pid_stat(5)


def has_ended(pidfd: Descriptor, seconds: float = 0.0) -> bool:
    """Whether the process has ended within *seconds*."""
    wait = select.poll()
    wait.register(pidfd.fileno(), select.POLLIN)
    return bool(wait.poll(seconds * 1000))


def is_ending(pidfd: Descriptor) -> bool:
    """True if the process runs no code any more: it was killed, or has ended."""
    try:
        with open(f"/proc/{pid_of(pidfd)}/stat", "rb") as file:
            # 1234 (name) S 1 1234 1234 0 -1 4194560 ...
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return has_ended(pidfd)
    return fields[0] in (b"Z", b"X") or bool(int(fields[6]) & _PF_EXITING)


def pid_of(pidfd: Descriptor) -> int:
    """The pid; -1 where it is not known: the process has been reaped, or no descriptor is free to
    look with. proc_pid_fdinfo(5)."""
    with suppress(OSError), open(f"/proc/self/fdinfo/{pidfd.fileno()}") as info:
        for line in info:
            if line.startswith("Pid:"):
                return int(line.split()[1])
    return -1


def reap(pidfd: Descriptor) -> str:
    """How a process has died that has ended; only its parent learns that."""
    try:
        ended = os.waitid(os.P_PIDFD, pidfd.fileno(), os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        ended = None
    if ended is None:
        return "its status is unknown, for it was no child of this process"
    if ended.si_code == os.CLD_EXITED:
        return f"it ended with status {ended.si_status}"
    return f"it was killed by signal {ended.si_status}"


class Dying:
    """The processes that hang in their end, watched with *poller* until it comes. *known*, pid ->
    what it was, is kept up to date."""

    def __init__(self, poller: Poller, known: dict[int, str]) -> None:
        self._poller = poller
        self._known = known
        self._watched: dict[Descriptor, int] = {}  # pidfd -> pid
        self._watch_known()

    def _watch_known(self) -> None:
        for pid in [pid for pid in self._known if pid not in self._watched.values()]:
            try:
                pidfd = Descriptor(os.pidfd_open(pid))
            except ProcessLookupError:
                del self._known[pid]
            except OSError:
                pass  # no descriptor is free: it is tried again
            else:
                self._watch(pidfd, pid, self._known[pid])

    def bury(self, process: Descriptor, what: str) -> None:
        """Takes over the pidfd of a process that runs no code any more, and was *what*; it is
        closed, and the process reaped, when that has ended.

        Never fails: without a free descriptor a process that hangs is in no note, and that is all.
        """
        self._watch(process, pid_of(process), what)

    def _watch(self, process: Descriptor, pid: int, what: str) -> None:
        def over(*_: object) -> None:
            self._poller.unregister(process.fileno())
            self._known.pop(pid, None)
            self._watched.pop(process, None)
            reap(process)
            close_quietly(process)

        if has_ended(process):
            over()
            return
        log.error(
            "the %s, pid %s, hangs in its end; what it holds stays open until that is over",
            what,
            pid if pid > 0 else "unknown",
        )
        if pid > 0:
            self._known[pid] = what
        self._watched[process] = pid
        self._poller.register(process.fileno(), READ, over)

    def __len__(self) -> int:
        return len(self._known)

    def notes(self) -> dict[str, str]:
        """For `stats`."""
        self._watch_known()
        return {
            f"pid {pid}": f"it was the {what} and hangs in its end, for some file system does not "
            "answer; what it holds stays open until that is over"
            for pid, what in self._known.items()
        }

    def close(self) -> None:
        """Closes the pidfds; `known` stays as it is."""
        close_quietly(*self._watched)
