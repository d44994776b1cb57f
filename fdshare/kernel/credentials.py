"""Credentials: who is at the other end of a socket, asked of the kernel and never of the peer."""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from dataclasses import dataclass
from typing import Final

from fdshare.errors import UnsupportedPlatform
from fdshare.kernel.descriptor import Descriptor

__all__ = ["Credentials", "own_credentials", "peer_credentials", "peer_pidfd"]

# Linux, <asm-generic/socket.h>; Python names none of these.
_SO_PEERGROUPS: Final = 59
_SO_PEERPIDFD: Final = 77  # since 6.5

UCRED: Final = struct.Struct("iII")  # struct ucred: pid_t, uid_t, gid_t (unix(7))


@dataclass(frozen=True, slots=True)
class Credentials:
    """pid, uid and gid as the receiving side's namespaces see them.

    pid is 0 where the peer lives in a pid namespace we cannot see, uid and gid are 65534 where its
    user namespace has no mapping (user_namespaces(7)). `groups` are the supplementary ones, where
    the kernel tells.
    """

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


def own_credentials() -> Credentials:
    """This process's, as a peer would see them: effective uid and gid."""
    return Credentials(os.getpid(), os.geteuid(), os.getegid(), tuple(os.getgroups()))


def peer_credentials(sock: socket.socket) -> Credentials:
    """Who was at the other end when the connection was made (SO_PEERCRED, SO_PEERGROUPS).

    Raises: UnsupportedPlatform.
    """
    if sys.platform != "linux":
        raise UnsupportedPlatform("peer credentials", f"no means known on {sys.platform}")
    pid, uid, gid = UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    return Credentials(pid, uid, gid, _peer_groups(sock))


def _peer_groups(sock: socket.socket) -> tuple[int, ...]:
    """The peer's supplementary groups; none where the kernel does not tell."""
    for size in (256, 65536 * 4):  # NGROUPS_MAX is 65536; Python allocates what it is told
        try:
            raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, min(size, 1024 * 256))
        except OSError as error:
            if error.errno == errno.ERANGE:
                continue
            return ()
        return struct.unpack(f"{len(raw) // 4}I", raw)
    return ()


def peer_pidfd(sock: socket.socket) -> Descriptor | None:
    """A pidfd for the peer, safe against pid reuse; None where the kernel has none to give.

    The caller owns the result.
    """
    if sys.platform != "linux":
        return None
    try:
        fd = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:  # ENOPROTOOPT before 6.5, ESRCH for a peer that is gone, ENODATA, EMFILE
        return None
    return Descriptor(fd)
