"""Why no other process can be started."""

from __future__ import annotations

import errno
import resource

__all__ = ["note_limits", "too_many", "why_not_forked"]


def why_not_forked(error: OSError) -> str:
    """What to say of *error* of fork(2): for EAGAIN, the limits that it may come from."""
    if error.errno != errno.EAGAIN:
        return str(error)
    return too_many()


def too_many() -> str:
    """That there are too many processes, by which limits."""
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    of_user = "" if limit == resource.RLIM_INFINITY else f"RLIMIT_NPROC, {limit} (ulimit -u), or "
    return f"too many processes: {of_user}the pids.max of a cgroup is reached"


def note_limits(error: BaseException) -> None:
    """Notes the limits of processes at the error of a thread that could not be started."""
    if str(error) == "can't start new thread":
        error.add_note(too_many())
