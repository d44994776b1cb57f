"""A program in the background: a session and a process group of its own, which ends as a whole."""

from __future__ import annotations

import os
import select
import signal
import time
from typing import Final

from fdshare.kernel.descriptor import Descriptor

__all__ = ["GRACE", "end_group"]

GRACE: Final = 10.0  # seconds to end at SIGTERM

_LOOK: Final = 0.02  # seconds between looks whether the group is empty
_LONGEST_POLL: Final = 86400.0  # seconds; poll(2) takes an int of milliseconds


def end_group(leader: Descriptor, pid: int, grace: float, *, own: bool) -> None:
    """Returns when the processes of the group *pid* have ended: SIGTERM, *grace* seconds, SIGKILL.

    *leader*: its pidfd, borrowed for the call. *own*: it is a child of this process, which reaps
    it. A process of the program that made a group of its own goes on.
    """
    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, grace)):
        try:
            os.killpg(pid, number)
        except (ProcessLookupError, PermissionError):
            break
        deadline = time.monotonic() + seconds
        if _ended(leader, seconds) and own:
            own = False
            os.waitpid(pid, 0)
        while _is_there(pid) and time.monotonic() < deadline:
            time.sleep(_LOOK)


def _ended(leader: Descriptor, seconds: float) -> bool:
    waiting = select.poll()
    waiting.register(leader.fileno(), select.POLLIN)
    return bool(waiting.poll(min(seconds, _LONGEST_POLL) * 1000))


def _is_there(group: int) -> bool:
    """Whether a process of *group* runs. A zombie does not: where pid 1 is no init, it stays."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it has become another user's
        return True
    return any(_runs_in(group, pid) for pid in filter(str.isdigit, os.listdir("/proc")))


def _runs_in(group: int, pid: str) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, _, found = file.read().rpartition(b")")[2].split()[:3]
    except (OSError, ValueError):  # it has ended
        return False
    return int(found) == group and state not in (b"Z", b"X")
