"""Credentials: who is at the other end of a socket, as the kernel says and not the peer.

One table, `PLATFORMS`, has what differs between systems. Its parsers take bytes, so that the tests
of one system run those of all.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Final, NamedTuple, TypeAlias

from fdshare.errors import AccessDenied, ProtocolError, UnsupportedPlatform
from fdshare.kernel import system
from fdshare.kernel.descriptor import Descriptor

__all__ = [
    "PLATFORMS",
    "Credentials",
    "Platform",
    "enable_credentials",
    "is_overflow_gid",
    "is_overflow_uid",
    "own_credentials",
    "parse_cmsgcred",
    "parse_sockcred2",
    "parse_ucred",
    "parse_xucred",
    "peer_credentials",
    "peer_pidfd",
    "platform",
]


class Credentials(NamedTuple):
    """pid, uid and gid as the receiving side's namespaces see them.

    pid is 0 where the peer is in a pid namespace that we cannot see, or where the system does not
    say; uid and gid are 65534 where its user namespace has no mapping (`is_overflow_uid`).
    `groups` are the supplementary ones; `all_groups` is False where there may be more of them.
    """

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    all_groups: bool = True


Parser: TypeAlias = Callable[[bytes], Credentials]

# struct ucred: pid_t pid, uid_t uid, gid_t gid. unix(7), Linux.
UCRED: Final = struct.Struct("iII")
# struct xucred: u_int cr_version, uid_t cr_uid, short cr_ngroups, gid_t cr_groups[16].
# <sys/ucred.h>, FreeBSD and macOS.
_XUCRED: Final = struct.Struct("@IIh16I")
# ... and since FreeBSD 13 a union of a pointer and pid_t cr_pid, aligned as the pointer.
_XUCRED_PID: Final = struct.Struct("@IIh16I0Pi")
# struct cmsgcred: pid_t pid, uid_t uid, uid_t euid, gid_t gid, short ngroups, gid_t groups[16].
# <sys/socket.h>, FreeBSD.
_CMSGCRED: Final = struct.Struct("@iIIIh16I")
# struct sockcred2: int version, pid_t pid, uid_t uid, uid_t euid, gid_t gid, gid_t egid,
# int ngroups, gid_t groups[]. <sys/socket.h>, FreeBSD 13.
_SOCKCRED2: Final = struct.Struct("@iiIIIIi")
_XUCRED_VERSION: Final = 0


def parse_ucred(data: bytes) -> Credentials:
    """Linux: SO_PEERCRED and SCM_CREDENTIALS. Raises: ProtocolError: truncated."""
    _whole(data, UCRED.size, "struct ucred")
    return Credentials(*UCRED.unpack_from(data))


def parse_xucred(data: bytes) -> Credentials:
    """FreeBSD and macOS: LOCAL_PEERCRED; the pid is 0 where the structure has no pid.

    Raises: ProtocolError: truncated, or of another version.
    """
    _whole(data, _XUCRED.size, "struct xucred")
    version, uid, count, *groups = _XUCRED.unpack_from(data)
    if version != _XUCRED_VERSION:
        raise ProtocolError(f"struct xucred has version {version}, not {_XUCRED_VERSION}")
    pid = _XUCRED_PID.unpack_from(data)[-1] if len(data) >= _XUCRED_PID.size else 0
    # The first group is the effective one. A full list may have been cut.
    all_groups = count < len(groups)
    groups = groups[: max(0, count)]
    return Credentials(pid, uid, groups[0] if groups else 0, tuple(groups[1:]), all_groups)


def parse_cmsgcred(data: bytes) -> Credentials:
    """FreeBSD: SCM_CREDS that the sender attached and the kernel filled in (effective uid).

    Raises: ProtocolError: truncated.
    """
    _whole(data, _CMSGCRED.size, "struct cmsgcred")
    pid, _, euid, gid, count, *groups = _CMSGCRED.unpack_from(data)
    all_groups = count < len(groups)
    groups = groups[: max(0, count)]
    return Credentials(pid, euid, groups[0] if groups else gid, tuple(groups[1:]), all_groups)


def parse_sockcred2(data: bytes) -> Credentials:
    """FreeBSD: SCM_CREDS2, which LOCAL_CREDS_PERSISTENT adds to every message.

    Raises: ProtocolError: truncated.
    """
    _whole(data, _SOCKCRED2.size, "struct sockcred2")
    _, pid, _, euid, _, egid, count = _SOCKCRED2.unpack_from(data)
    tail = data[_SOCKCRED2.size :]
    groups = struct.unpack_from(f"{min(max(0, count), len(tail) // 4)}I", tail)
    return Credentials(pid, euid, egid, tuple(group for group in groups if group != egid))


def _whole(data: bytes, size: int, what: str) -> None:
    if len(data) < size:
        raise ProtocolError(f"truncated credentials: {len(data)} of the {size} bytes of {what}")


class Platform(NamedTuple):
    """What one system offers; numbers from its headers, because Python names few of them."""

    sun_path: int  # sizeof(sockaddr_un.sun_path), <sys/un.h>
    abstract: bool = False  # names without a file
    # getsockopt(level, option, size) that returns the peer, and the parser of it.
    peer: tuple[int, int, int, Parser] | None = None
    peer_pid: tuple[int, int] | None = None  # (level, option) of an int, where `peer` has no pid
    peer_groups: tuple[int, int] | None = None
    peer_pidfd: tuple[int, int] | None = None
    pass_credentials: tuple[int, int] | None = None  # asks for them with every message
    # cmsg_type (of level SOL_SOCKET) -> how to read the credentials in it.
    control: Mapping[int, Parser] = MappingProxyType({})
    attach: int | None = None  # the cmsg_type with which a sender attaches its own
    attach_size: int = 0  # bytes of that message
    may_name_others: bool = False  # a privileged sender chooses what is attached
    scm_pidfd: int | None = None  # the cmsg_type of a message that holds one descriptor, a pidfd


PLATFORMS: Final[Mapping[str, Platform]] = {
    # <asm-generic/socket.h>, <linux/socket.h>: SO_PASSCRED 16, SO_PEERCRED 17, SO_PEERGROUPS 59,
    # SO_PEERPIDFD 77 (6.5), SCM_CREDENTIALS 2, SCM_PIDFD 4.
    "linux": Platform(
        sun_path=108,
        abstract=True,
        peer=(1, 17, UCRED.size, parse_ucred),
        peer_groups=(1, 59),
        peer_pidfd=(1, 77),
        pass_credentials=(1, 16),
        control={2: parse_ucred},
        attach=2,
        attach_size=UCRED.size,
        may_name_others=True,
        scm_pidfd=4,
    ),
    # <sys/un.h>: SOL_LOCAL 0, LOCAL_PEERCRED 1, LOCAL_CREDS_PERSISTENT 3 (13.0);
    # <sys/socket.h>: SCM_CREDS 3, SCM_CREDS2 8.
    "freebsd": Platform(
        sun_path=104,
        peer=(0, 1, 88, parse_xucred),
        pass_credentials=(0, 3),
        control={3: parse_cmsgcred, 8: parse_sockcred2},
        attach=3,
        attach_size=_CMSGCRED.size,
    ),
    # <sys/un.h>: SOL_LOCAL 0, LOCAL_PEERCRED 1, LOCAL_PEERPID 2. No credentials in messages.
    "darwin": Platform(
        sun_path=104,
        peer=(0, 1, _XUCRED.size, parse_xucred),
        peer_pid=(0, 2),
    ),
}


def platform(name: str = system.NAME) -> Platform:
    """The row of this system ("freebsd14" is "freebsd"); for an unknown one a row without any."""
    return PLATFORMS.get(name.rstrip("0123456789."), Platform(sun_path=104))


HERE: Final = platform()


def own_credentials() -> Credentials:
    """The credentials of this process, as a peer sees them: effective uid and gid.

    >>> own_credentials().uid == os.geteuid()
    True
    """
    return Credentials(os.getpid(), os.geteuid(), os.getegid(), tuple(os.getgroups()))


def peer_credentials(sock: socket.socket) -> Credentials:
    """The credentials of the other end when the connection was made, as the kernel says.

    SO_PEERCRED and SO_PEERGROUPS on Linux, LOCAL_PEERCRED on FreeBSD and macOS. For the socket of
    a connect(2) they are those of the process that called listen(2).
    Raises: UnsupportedPlatform; OSError where *sock* has no peer (ENOTCONN, FreeBSD and macOS).

    >>> with listen("s") as listener, connect("s") as conn:
    ...     peer_credentials(conn).pid == os.getpid()
    True
    """
    if HERE.peer is None:
        raise UnsupportedPlatform("peer credentials", f"fdshare knows no call on {system.NAME}")
    level, option, size, parse = HERE.peer
    who = parse(sock.getsockopt(level, option, size))
    if HERE.peer_pid is not None:
        who = who._replace(pid=sock.getsockopt(*HERE.peer_pid))
    if HERE.peer_groups is not None:
        groups = _peer_groups(sock, *HERE.peer_groups)
        who = who._replace(groups=groups or (), all_groups=groups is not None)
    return who


def _peer_groups(sock: socket.socket, level: int, option: int) -> tuple[int, ...] | None:
    """The peer's supplementary groups; None where the kernel does not give them (before 4.13)."""
    for size in (256, 1024):  # bytes; socket.getsockopt() accepts no larger buffer
        try:
            raw = sock.getsockopt(level, option, size)
        except OSError as error:
            if error.errno == errno.ERANGE:
                continue
            return None
        return struct.unpack(f"{len(raw) // 4}I", raw)
    try:
        # ctypes takes time to import, and few users are in more than 256 groups.
        from fdshare.kernel.peer_groups import many_peer_groups

        return many_peer_groups(sock, level, option)
    except (ImportError, OSError):  # no descriptor is free to import with
        return None


@cache
def _overflow(sysctl: str) -> int:
    try:
        with open(f"/proc/sys/kernel/{sysctl}") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 65534


def is_overflow_uid(uid: int) -> bool:
    """True if *uid* may be any user at all, so that it must not be trusted.

    A user that has no number in our user namespace is shown as the overflow uid, 65534, and so is
    every other such user (user_namespaces(7)). Where each user has a number, as in the first
    namespace, 65534 is one user, and this is False.
    """
    return uid == _overflow("overflowuid") and not _all_are_mapped("uid_map")


def is_overflow_gid(gid: int) -> bool:
    """`is_overflow_uid`, of a group."""
    return gid == _overflow("overflowgid") and not _all_are_mapped("gid_map")


def _all_are_mapped(table: str) -> bool:
    """True if our user namespace has every id: one row, from 0, of 2**32 - 1 ids."""
    try:
        with open(f"/proc/self/{table}") as file:
            return file.read().split() == ["0", "0", "4294967295"]
    except OSError:
        return not system.LINUX


def peer_pidfd(sock: socket.socket) -> Descriptor | None:
    """A pidfd for the peer, safe against pid reuse; None where the kernel offers none.

    SO_PEERPIDFD, Linux 6.5. The caller owns the result.

    >>> with listen("s") as listener, connect("s") as conn:
    ...     process = peer_pidfd(conn)
    >>> if process is not None:
    ...     with process:
    ...         signal.pidfd_send_signal(process.fileno(), 0)  # 0: is it there?
    """
    if HERE.peer_pidfd is None:
        return None
    try:
        fd = sock.getsockopt(*HERE.peer_pidfd)
    except OSError:  # ENOPROTOOPT before 6.5, ESRCH for a peer that is gone, ENODATA, EMFILE
        return None
    return Descriptor(fd)


def enable_credentials(sock: socket.socket, on: bool = True) -> None:
    """Every message received from now on brings its sender's credentials.

    Linux: SO_PASSCRED, also for what is queued already. FreeBSD 13: LOCAL_CREDS_PERSISTENT.
    Raises: UnsupportedPlatform.

    >>> one, other = s_pipe()
    >>> with one, other:
    ...     enable_credentials(other)
    ...     one.sendall(b"who am I?")
    ...     recv_fds(other, 100, 0).credentials.pid == os.getpid()
    True
    """
    if HERE.pass_credentials is None:
        raise UnsupportedPlatform(
            "credentials with messages", f"{system.NAME} has them for connections only"
        )
    sock.setsockopt(*HERE.pass_credentials, int(on))


def control_message(credentials: Credentials | None) -> tuple[int, int, bytes]:
    """The control message that attaches *credentials*; None means this process's own.

    Raises: UnsupportedPlatform.
    """
    if HERE.attach is None:
        raise UnsupportedPlatform(
            "credentials with messages", f"{system.NAME} has them for connections only"
        )
    if not HERE.may_name_others:
        if credentials is not None:
            raise UnsupportedPlatform(
                "naming other credentials", f"the kernel of {system.NAME} fills in your own"
            )
        return socket.SOL_SOCKET, HERE.attach, bytes(HERE.attach_size)
    who = credentials or own_credentials()
    return socket.SOL_SOCKET, HERE.attach, UCRED.pack(who.pid, who.uid, who.gid)


def refused(credentials: Credentials) -> AccessDenied:
    """The error for EPERM on a message that claims *credentials* (scm_check_creds)."""
    return AccessDenied(
        "send as",
        f"pid={credentials.pid} uid={credentials.uid} gid={credentials.gid}",
        os.geteuid(),
        "the kernel lets only CAP_SYS_ADMIN name another pid, CAP_SETUID another uid and "
        "CAP_SETGID another gid (unix(7), SCM_CREDENTIALS)",
    )
