"""The supplementary groups of a peer that is in more than socket.getsockopt() can return.

Python limits the buffer of getsockopt(2) to 1,024 bytes (sock_getsockopt, Modules/socketmodule.c);
a Linux process can be in 65,536 groups. A module of its own, so that few import ctypes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket

__all__ = ["many_peer_groups"]

_libc = ctypes.CDLL(None, use_errno=True)


def many_peer_groups(sock: socket.socket, level: int, option: int) -> tuple[int, ...]:
    """All of them, whatever their number. *level*, *option*: SO_PEERGROUPS. Raises: OSError."""
    count = 1024
    while True:
        groups = (ctypes.c_uint32 * count)()
        size = ctypes.c_uint32(ctypes.sizeof(groups))
        if not _libc.getsockopt(sock.fileno(), level, option, groups, ctypes.byref(size)):
            return tuple(groups[: size.value // 4])
        code = ctypes.get_errno()
        if code != errno.ERANGE or size.value // 4 <= count:
            raise OSError(code, os.strerror(code))
        count = size.value // 4  # ERANGE tells the size (sk_getsockopt, net/core/sock.c)
