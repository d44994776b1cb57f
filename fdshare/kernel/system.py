"""What differs between systems, but for credentials, which have a table of their own.

No other module asks which system it runs on, or whether Python has a call there. A flag that the
system lacks is 0, so that it changes nothing.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import sys
from typing import Final

__all__ = [
    "CMSG_CLOEXEC",
    "HAS_EPOLL",
    "HAS_MEMFD",
    "HAS_PIDFD",
    "HAS_PIDFD_IDS",
    "HAS_REUSE_PORT",
    "HAS_SEALS",
    "HAS_SEM_GETVALUE",
    "HAS_SEQPACKET",
    "LINUX",
    "NAME",
    "NOSIGNAL",
    "O_PATH",
    "RDHUP",
    "SET_PIPE_SIZE",
    "SOCK_NONBLOCK",
    "SO_DOMAIN",
    "SO_PRIORITY",
    "SO_PROTOCOL",
    "UNREAD",
]

NAME: Final = sys.platform
# abstract names, /proc/self/fd/N as a path, fchmod(2) of a socket before bind(2), sock_diag(7),
# TCP_INFO, F_DUPFD_QUERY; a send on a stream that takes all of a short message or nothing.
LINUX: Final = NAME == "linux"

# Without it, an object that another thread drops last goes when the thread that made it runs next:
# not while that waits in a system call.
HAS_GIL: Final[bool] = getattr(sys, "_is_gil_enabled", lambda: True)()

HAS_EPOLL: Final = hasattr(select, "epoll")
HAS_MEMFD: Final = hasattr(os, "memfd_create")
HAS_SEALS: Final = HAS_MEMFD and hasattr(fcntl, "F_ADD_SEALS")
HAS_PIDFD: Final = hasattr(os, "pidfd_open")
# An inode number of each process; told by that of another file of the kernel's own, an eventfd.
HAS_PIDFD_IDS: Final = HAS_PIDFD and hasattr(os, "eventfd")
HAS_REUSE_PORT: Final = hasattr(socket, "SO_REUSEPORT")
# HAVE_BROKEN_SEM_GETVALUE of multiprocessing.
HAS_SEM_GETVALUE: Final = NAME != "darwin"
# SOCK_SEQPACKET of AF_UNIX.
HAS_SEQPACKET: Final = NAME != "darwin"

O_PATH: Final = int(getattr(os, "O_PATH", 0))
CMSG_CLOEXEC: Final = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))
# A reader that has gone is an error (EPIPE), also where the program has SIGPIPE end it.
NOSIGNAL: Final = int(getattr(socket, "MSG_NOSIGNAL", 0))
SOCK_NONBLOCK: Final = int(getattr(socket, "SOCK_NONBLOCK", 0))
RDHUP: Final = int(getattr(select, "POLLRDHUP", 0))
SET_PIPE_SIZE: Final[int | None] = getattr(fcntl, "F_SETPIPE_SZ", None)
# What a socket was made with; socket(7).
SO_DOMAIN: Final = int(getattr(socket, "SO_DOMAIN", 0))
SO_PROTOCOL: Final = int(getattr(socket, "SO_PROTOCOL", 0))
# An option of each socket that any user may set from 0 to 6; socket(7).
SO_PRIORITY: Final[int | None] = getattr(socket, "SO_PRIORITY", None)
# ioctl(2): the bytes that were sent and the peer has not read. SIOCOUTQ, <linux/sockios.h>;
# FIONWRITE of FreeBSD.
UNREAD: Final = 0x5411 if LINUX else 0x40046677
