"""What Linux knows of a socket that getsockopt(2) does not return: its accept queue, and the inode
that a UNIX socket is bound to. Everything here is None where the kernel does not say."""

from __future__ import annotations

import errno
import socket
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from fdshare.kernel import system

if TYPE_CHECKING:  # it imports ctypes
    from fdshare.kernel.borrowed_socket import AnySocket

__all__ = ["TCP_CLOSE_WAIT", "TcpState", "UnixState", "tcp_state", "unix_peer", "unix_state"]

# <linux/netlink.h>, <linux/sock_diag.h>, <linux/unix_diag.h>
_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLM_F_REQUEST: Final = 1
_SHOW_VFS: Final = 0x02
_SHOW_PEER: Final = 0x04
_SHOW_RQLEN: Final = 0x10
_ATTR_VFS: Final = 1
_ATTR_PEER: Final = 2
_ATTR_RQLEN: Final = 4
_ANY_STATE: Final = 0xFFFFFFFF
_NO_COOKIE: Final = 0xFFFFFFFF
_NLMSGHDR: Final = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_REQUEST: Final = struct.Struct("=BBHIIIII")  # family, protocol, -, states, inode, show, cookie
_ATTRIBUTES_AT: Final = _NLMSGHDR.size + 16  # behind struct unix_diag_msg
_NLATTR: Final = struct.Struct("=HH")  # length, type
_ONE: Final = struct.Struct("=I")
_TWO: Final = struct.Struct("=II")

# <linux/tcp.h>, struct tcp_info: eight bytes of flags, then words. For a listener tcpi_unacked is
# the accept queue and tcpi_sacked its limit (tcp_get_info(), net/ipv4/tcp.c).
_TCP_INFO_SIZE: Final = 104
_TCPI_UNACKED: Final = 24
TCP_LISTEN: Final = 10  # <net/tcp_states.h>
TCP_CLOSE_WAIT: Final = 8


class UnixState(NamedTuple):
    """*queue* and *backlog* of a listener; *inode* (its low 32 bits) of the path it is bound to."""

    queue: int | None
    backlog: int | None
    inode: int | None


class TcpState(NamedTuple):
    """*state* as in <net/tcp_states.h>; *queue* and *backlog* of a listener."""

    state: int
    queue: int | None
    backlog: int | None


def tcp_state(sock: AnySocket) -> TcpState | None:
    """The state of a TCP socket by TCP_INFO (tcp(7)); None where the system does not say."""
    if not system.LINUX:
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
        if info[0] != TCP_LISTEN:
            return TcpState(info[0], None, None)
        return TcpState(info[0], *_TWO.unpack_from(info, _TCPI_UNACKED))
    except (OSError, IndexError, struct.error):
        return None


def unix_state(inode: int) -> UnixState | None:
    """What NETLINK_SOCK_DIAG (sock_diag(7)) says of the UNIX socket with this inode in sockfs.

    None where it says nothing: not Linux, no unix_diag module, a seccomp filter, another network
    namespace. Never blocks: netlink answers within the send.
    """
    reply = _ask(inode, _SHOW_VFS | _SHOW_RQLEN)
    try:
        return None if reply is None else _parse(reply)
    except (OSError, struct.error):
        return None


def unix_peer(inode: int) -> int | None:
    """The inode (its low 32 bits) of the other end of a connected UNIX socket; 0 until a process
    has accepted it (sk_diag_dump_peer(), net/unix/diag.c). None as for `unix_state`."""
    reply = _ask(inode, _SHOW_PEER)
    try:
        found = {} if reply is None else _attributes(reply)
    except (OSError, struct.error):
        return None
    return _ONE.unpack(found[_ATTR_PEER])[0] if len(found.get(_ATTR_PEER, b"")) == 4 else None


def _ask(inode: int, show: int) -> bytes | None:
    """The reply of the kernel about one UNIX socket; None where it says nothing."""
    if not system.LINUX:
        return None
    body = _REQUEST.pack(
        socket.AF_UNIX, 0, 0, _ANY_STATE, inode & 0xFFFFFFFF, show, _NO_COOKIE, _NO_COOKIE
    )
    head = _NLMSGHDR.pack(_NLMSGHDR.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
            netlink.settimeout(None)
            netlink.send(head + body)
            return netlink.recv(8192, socket.MSG_DONTWAIT)
    except OSError:
        return None


def _parse(reply: bytes) -> UnixState:
    """The state in a unix_diag_msg. Raises: OSError for NLMSG_ERROR; struct.error."""
    found = _attributes(reply)
    queue = backlog = bound = None
    if _ATTR_RQLEN in found:
        queue, backlog = _TWO.unpack_from(found[_ATTR_RQLEN])
    if _ATTR_VFS in found:
        bound, _device = _TWO.unpack_from(found[_ATTR_VFS])
    return UnixState(queue, backlog, bound)


def _attributes(reply: bytes) -> dict[int, bytes]:
    """The attributes of a unix_diag_msg. Raises: OSError for NLMSG_ERROR; struct.error."""
    length, kind, *_ = _NLMSGHDR.unpack_from(reply)
    if kind != _SOCK_DIAG_BY_FAMILY:
        raise OSError(errno.ENOENT, "sock_diag knows no such socket")
    found: dict[int, bytes] = {}
    at, end = _ATTRIBUTES_AT, min(length, len(reply))
    while at + _NLATTR.size <= end:
        size, name = _NLATTR.unpack_from(reply, at)
        if size < _NLATTR.size:
            break
        found[name] = reply[at + _NLATTR.size : at + size]
        at += (size + 3) & ~3  # NLA_ALIGN
    return found
