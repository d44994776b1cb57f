"""The process that has a TCP or UDP port, from /proc, so that an error message can say its pid."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

__all__ = ["PortOwner", "port_owner"]

# Seconds. To find the pid is to look through the descriptors of every process; it ends after this.
_PATIENCE: Final = 0.05
# <net/tcp_states.h>, as /proc/net/tcp and /proc/net/udp print them.
_LISTEN: Final = "0A"
_UDP_BOUND: Final = ("07", "01")
_ANY: Final = ("0.0.0.0", "::")


class PortOwner(NamedTuple):
    """*pid* is None where it was not found: another user's process, or too many descriptors."""

    uid: int
    pid: int | None


def port_owner(protocol: Literal["tcp", "udp"], host: str, port: int) -> PortOwner | None:
    """Whose socket prevents a bind(2) to *host* and *port*; None where /proc does not say.

    Takes at most a twentieth of a second more than reading /proc/net. proc_net(5).
    """
    for family in ("", "6"):
        try:
            with open(f"/proc/net/{protocol}{family}") as table:
                for row in _rows(table, protocol):
                    if row.port == port and (row.host in (*_ANY, host) or host in _ANY):
                        return PortOwner(row.uid, _pid_of(f"socket:[{row.inode}]"))
        except (OSError, ValueError, IndexError, struct.error):
            continue
    return None


class _Row(NamedTuple):
    host: str
    port: int
    uid: int
    inode: str


def _rows(table: Iterator[str], protocol: str) -> Iterator[_Row]:
    """The listening or bound sockets of /proc/net/{tcp,udp}{,6}."""
    next(table, None)
    for line in table:
        # sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode ...
        columns = line.split()
        if protocol == "tcp" and columns[3] != _LISTEN:
            return  # listeners come first (tcp_seq_start(), net/ipv4/tcp_ipv4.c)
        if protocol == "udp" and columns[3] not in _UDP_BOUND:
            continue
        address, _, port = columns[1].partition(":")
        yield _Row(_host(address), int(port, 16), int(columns[7]), columns[9])


def _host(digits: str) -> str:
    """An address as /proc/net prints it: words of 32 bits, each in the machine's byte order."""
    words = [int(digits[at : at + 8], 16) for at in range(0, len(digits), 8)]
    raw = struct.pack(f"={len(words)}I", *words)
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)


def _pid_of(target: str) -> int | None:
    """A process that has *target* open, this one first."""
    deadline = time.monotonic() + _PATIENCE
    others = (int(name) for name in os.listdir("/proc") if name.isdigit())
    for pid in (os.getpid(), *others):
        if _has_open(pid, target, deadline):
            return pid
        if time.monotonic() > deadline:
            return None
    return None


def _has_open(pid: int, target: str, deadline: float) -> bool:
    """Whether it is found before the *deadline*: a process may have a million descriptors."""
    try:
        with os.scandir(f"/proc/{pid}/fd") as descriptors:
            for descriptor in descriptors:
                if time.monotonic() > deadline:
                    return False
                try:
                    if os.readlink(descriptor.path) == target:
                        return True
                except OSError:
                    continue
    except OSError:
        pass  # it has ended, or is another user's
    return False
