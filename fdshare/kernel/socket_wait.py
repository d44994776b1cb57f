"""The time that a call on a blocking socket may take, also while a program's signals come.

SO_RCVTIMEO and SO_SNDTIMEO bound a call without a poll(2) before it. But where a handler of the
signal module has run, Python makes the call again (PEP 475), and the kernel starts the whole time
anew: in a program with a timer it never passes. So FIRST_WAIT is the kernel's, and the rest is
waited for in poll(2), which Python calls again with what is left.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from typing import Final

__all__ = ["FIRST_WAIT", "wait_readable", "wait_writable"]

# struct timeval, of 5 ms: most answers come sooner, and need no poll(2). The kernel rounds it up to
# its ticks, of 1 to 10 ms.
FIRST_WAIT: Final = struct.pack("@ll", 0, 5000)
_LONGEST: Final = 86400.0  # seconds; poll(2) takes an int of milliseconds, and is called again


def wait_readable(sock: socket.socket, deadline: float | None) -> bool:
    """True once *sock* can be read, or is at its end; False at *deadline*, of the monotonic
    clock."""
    return _wait(sock, False, deadline)


def wait_writable(sock: socket.socket, deadline: float | None) -> bool:
    """As `wait_readable`, until *sock* takes data, or nobody reads them any more."""
    return _wait(sock, True, deadline)


def _wait(sock: socket.socket, writes: bool, deadline: float | None) -> bool:
    while True:
        left = _LONGEST if deadline is None else min(deadline - time.monotonic(), _LONGEST)
        if _is_ready(sock, writes, max(left, 0.0)):
            return True
        if left <= 0:
            return False


def _is_ready(sock: socket.socket, writes: bool, seconds: float) -> bool:
    try:
        poll = select.poll()
    except AttributeError:  # eventlet removes it, and has its other threads run in select()
        return any(select.select([] if writes else [sock], [sock] if writes else [], [], seconds))
    poll.register(sock, select.POLLOUT if writes else select.POLLIN)
    return bool(poll.poll(seconds * 1000))
