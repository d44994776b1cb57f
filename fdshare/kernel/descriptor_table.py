"""The descriptor table of this process: closes what a forked child must not keep."""

from __future__ import annotations

import os
from collections.abc import Collection

__all__ = ["close_all_but"]


def close_all_but(kept: Collection[int]) -> None:
    """Closes every descriptor of this process but 0-2 and *kept*.

    The caller has detached every object that owns one of the others: it would close the number once
    more, when that is the number of another descriptor.
    """
    low = 3
    for fd in sorted(kept):
        if fd > low:  # most numbers follow one another, and each call is a system call
            os.closerange(low, fd)
        low = max(low, fd + 1)
    os.closerange(low, _end())


def _end() -> int:
    """A number above every open descriptor: the size of the process's table (proc(5)), one more
    than the highest that is listed, or the limit. Listing 10,000 takes 16 ms, in which a server
    serves nobody."""
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("FDSize:"):
                    return int(line.split()[1])
    except OSError:
        pass
    try:
        return max(map(int, os.listdir("/proc/self/fd")), default=2) + 1
    except OSError:  # without /proc: above all that may be opened now
        return os.sysconf("SC_OPEN_MAX")
