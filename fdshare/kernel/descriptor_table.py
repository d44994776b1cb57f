"""The descriptor table of this process: closes what a forked child must not keep, and opens the
standard streams that it must have."""

from __future__ import annotations

import os
from collections.abc import Collection

__all__ = ["close_all_but", "open_standard_streams"]


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


def open_standard_streams() -> None:
    """Opens /dev/null for each of 0-2 that the caller of this program has closed (`>&-`): what is
    opened next would get that number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            os.set_inheritable(number, True)


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
