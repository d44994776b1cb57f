"""Why no other process can be started."""

from __future__ import annotations

import errno
import resource

__all__ = ["why_not_forked"]


def why_not_forked(error: OSError) -> str:
    """What to say of *error* of fork(2): for EAGAIN, the limits that it may come from."""
    if error.errno != errno.EAGAIN:
        return str(error)
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    of_user = "" if limit == resource.RLIM_INFINITY else f"RLIMIT_NPROC, {limit} (ulimit -u), or "
    return f"too many processes: {of_user}the pids.max of a cgroup is reached"
