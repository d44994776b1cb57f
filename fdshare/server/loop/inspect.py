"""What the kernel knows of one descriptor, for `info`.

To be called in a worker thread: fstat(2) may block where the file system is a daemon or another
machine. So the link in /proc is read first, which the kernel answers by itself, and only a file on
a local file system is asked for its size.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import socket
import stat
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from fdshare.errors import FdshareError
from fdshare.kernel import system
from fdshare.kernel.borrowed_socket import AnySocket, borrowed_socket
from fdshare.kernel.credentials import peer_credentials
from fdshare.kernel.sock_diag import TCP_CLOSE_WAIT, TcpState, tcp_state, unix_state
from fdshare.protocol.messages import DescriptorInfo

__all__ = ["THROUGH_FOLDER", "describe_descriptor", "is_last_part", "local_mounts"]

# Fields of DescriptorInfo.
_Facts: TypeAlias = dict[str, Any]
Mounts: TypeAlias = Callable[[], frozenset[str]]

_ACCESS: Final = {os.O_RDONLY: "r", os.O_WRONLY: "w", os.O_RDWR: "rw"}
# <linux/fcntl.h>; Python names the first five from 3.8 to 3.13, not all on every C library.
_F_GET_SEALS: Final = 1024 + 10
_F_GETPIPE_SZ: Final = 1024 + 8
_SEALS: Final = {
    0x01: "seal",
    0x02: "shrink",
    0x04: "grow",
    0x08: "write",
    0x10: "future_write",
    0x20: "exec",
}
# File systems on which fstat(2) is answered by this kernel alone. On others (fuse, nfs, 9p, cifs
# ...) it is not called.
_LOCAL: Final = frozenset(
    b"""
    bcachefs btrfs cgroup2 devpts devtmpfs erofs exfat ext2 ext3 ext4 f2fs hugetlbfs iso9660 jfs
    mqueue ntfs3 overlay proc ramfs squashfs sysfs tmpfs udf vfat xfs zfs
    """.split()
)
_TERMINAL: Final = re.compile(r"/dev/(pts/\d+|tty\w*|console)$")
# A path longer than sun_path is bound through a descriptor of its folder (unix_address.py).
THROUGH_FOLDER: Final = "/proc/self/fd/"


def describe_descriptor(
    fd: int,
    *,
    look_up_path: bool = True,
    bound_to: str = "",
    mounts: Mounts | None = None,
) -> DescriptorInfo:
    """Type, access mode and, by type, addresses, queue, path, offset, size, seals and health.

    `family` and `socket_type` are the constants' names without their prefix ("inet6", "stream");
    addresses are "127.0.0.1:80", "[::1]:80", "/run/x.sock", "@abstract" or, where the other end is
    a process and has no address, "pid 123". What cannot be known is left at its default; never
    raises. With *look_up_path* the health of a bound UNIX socket says whether its path still leads
    to it, which asks the file system with the rights of this process. *bound_to* is the path of a
    UNIX socket where that is known: of a long one the kernel knows the last part alone. *mounts*
    returns the `local_mounts`, for who describes many. The caller keeps *fd* open meanwhile. *fd*
    is borrowed for the call.
    """
    try:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    except (OSError, ValueError, OverflowError):
        return DescriptorInfo("unknown", health="the descriptor is not open")
    access = "path" if flags & system.O_PATH else _ACCESS.get(flags & os.O_ACCMODE, "")
    link = _link(fd)
    facts = _by_link(fd, link, access, mounts or local_mounts) if link else _by_stat(fd, access)
    if is_last_part(facts.get("local", ""), bound_to):
        facts["local"] = bound_to
    if look_up_path and facts.get("family") == "unix" and not facts["peer"]:
        wrong = _path_health(fd, facts["local"]), facts["health"]
        facts["health"] = "; ".join(filter(None, wrong))
    return DescriptorInfo(access=access, **facts)


def local_mounts() -> frozenset[str]:
    """The ids of the mounts whose file systems may be asked: they wait for nobody."""
    try:
        with open("/proc/self/mountinfo", "rb", buffering=0) as table:
            rows = table.readall().splitlines()
    except OSError:
        return frozenset()
    # 36 35 98:0 /root /mount rw,noatime master:1 - ext4 /dev/root rw
    return frozenset(
        row.partition(b" ")[0].decode()
        for row in rows
        if row.partition(b" - ")[2].partition(b" ")[0] in _LOCAL
    )


def is_last_part(local: str, path: str) -> bool:
    """Whether *local* may be the address of a socket that was bound to the long *path*."""
    parted = local.removeprefix(THROUGH_FOLDER).partition("/")[2]
    return local.startswith(THROUGH_FOLDER) and parted == os.path.basename(path) != ""


# One function for each type. It returns the facts that it could find, "type" at least.


def _by_link(fd: int, link: str, access: str, mounts: Mounts) -> _Facts:
    """By what /proc/self/fd/N points to: no file system is asked."""
    if link.startswith("/memfd:"):
        return _memfd(fd, link)
    if link.startswith("/"):
        return _path(fd, link, access, mounts)
    word, _, rest = link.partition(":")
    if word == "socket":
        return _socket(fd)
    if word == "pipe":
        return {"type": "pipe", "health": _pipe_health(fd, access)}
    # "anon_inode:[pidfd]", and "pidfd:[1234]" since Linux 6.9.
    if word == "pidfd" or rest == "[pidfd]":
        return _pidfd(fd)
    if word == "anon_inode":  # "anon_inode:[eventfd]", "anon_inode:inotify"
        return {"type": rest.strip("[]")}
    return {"type": "namespace", "path": link}  # "net:[4026531833]", namespaces(7)


def _by_stat(fd: int, access: str) -> _Facts:
    """By fstat(2), where there is no /proc."""
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        return {"type": "unknown"}
    return _socket(fd) if stat.S_ISSOCK(mode) else _path(fd, "", access, local_mounts)


def _memfd(fd: int, link: str) -> _Facts:
    facts: _Facts = {"type": "memfd", "path": link, "offset": _offset(fd, _fdinfo(fd))}
    try:
        facts["size"] = os.fstat(fd).st_size
        seals = fcntl.fcntl(fd, _F_GET_SEALS)
        facts["seals"] = [word for bit, word in _SEALS.items() if seals & bit]
    except OSError:
        pass
    return facts


def _path(fd: int, link: str, access: str, mounts: Mounts) -> _Facts:
    facts: _Facts = {"type": "file", "path": link}
    if _TERMINAL.match(link):
        return {**facts, "type": "tty"}
    if _is_pipe(fd):
        return {**facts, "type": "pipe", "health": _pipe_health(fd, access)}
    fdinfo = _fdinfo(fd)
    if link and fdinfo.get("mnt_id") not in mounts():
        return {**facts, "offset": _offset(fd, fdinfo)}
    try:
        info = os.fstat(fd)
    except OSError:
        return facts
    kind = stat.S_IFMT(info.st_mode)
    if kind == stat.S_IFIFO:
        return {**facts, "type": "pipe", "health": _pipe_health(fd, access)}
    if kind == stat.S_IFCHR:
        return {**facts, "type": "tty" if os.isatty(fd) else "device"}
    if kind == stat.S_IFREG:
        facts["size"] = info.st_size
    words = {stat.S_IFDIR: "directory", stat.S_IFBLK: "device", stat.S_IFSOCK: "socket"}
    return {**facts, "type": words.get(kind, "file"), "offset": _offset(fd, fdinfo)}


def _pidfd(fd: int) -> _Facts:
    facts: _Facts = {"type": "pidfd"}
    pid = _fdinfo(fd).get("Pid", "")
    if pid.isdigit() and pid != "0":  # -1: reaped; 0: outside our pid namespace
        facts["peer"] = f"pid {pid}"
    if _events(fd) & select.POLLIN:  # pidfd_open(2)
        facts["health"] = "the process has ended"
    return facts


def _socket(fd: int) -> _Facts:
    facts: _Facts = {"type": "socket"}
    try:
        sock = borrowed_socket(fd)
    except (OSError, ValueError):
        return facts
    try:
        facts["family"] = _word(sock.family, "AF_")
        facts["socket_type"] = _word(sock.type, "SOCK_")
        facts["local"] = _try(lambda: _local(sock), "")
        facts["listening"] = _try(lambda: bool(sock.getsockopt(*_ACCEPTCONN)), False)
        facts["peer"] = "" if facts["listening"] else _try(lambda: _peer(sock), "")
        facts.update(_socket_health(sock, facts))
    finally:
        sock.detach()
    return facts


_ACCEPTCONN: Final = (socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


def _socket_health(sock: AnySocket, facts: _Facts) -> _Facts:
    """Queue and backlog of a listener, and what is wrong with the socket."""
    wrong: list[str] = []
    queue = backlog = None
    is_tcp = sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM
    tcp = tcp_state(sock) if is_tcp else None
    if tcp is not None:
        queue, backlog = tcp.queue, tcp.backlog
    if sock.family == socket.AF_UNIX and facts["listening"]:
        state = unix_state(_socket_inode(sock.fileno()))
        if state is not None:
            queue, backlog = state.queue, state.backlog
    # sk_acceptq_is_full(), unix_recvq_full(): one more than the backlog fits.
    if queue is not None and backlog is not None and queue > backlog:
        wrong.append(f"nobody accepts: {queue} connections wait, the queue is full")
    if not facts["listening"] and sock.type != socket.SOCK_DGRAM:
        wrong.append(_peer_health(_events(sock.fileno()), tcp))
    # unix_stream_connect() refuses then; a TCP socket that is shut down does not listen any more.
    of_unix = sock.family == socket.AF_UNIX
    if facts["listening"] and of_unix and _events(sock.fileno()) & system.RDHUP:
        wrong.append("it is shut down, nobody can connect")
    return {"queue": queue, "backlog": backlog, "health": "; ".join(filter(None, wrong))}


# Health: what is wrong with it.


def _peer_health(events: int, tcp: TcpState | None) -> str:
    """Of a stream: whether the other end can still send."""
    # A socket that was never connected has POLLHUP, but not POLLRDHUP (tcp_poll(), unix_poll()).
    if not events & (system.RDHUP or select.POLLHUP):
        return ""
    if events & select.POLLHUP:
        return "the peer is gone"
    # TCP cannot tell close(2) from shutdown(SHUT_WR) before we write.
    by_peer = tcp is not None and tcp.state == TCP_CLOSE_WAIT
    return "the peer has closed its side" if by_peer else "shut down for reading"


def _socket_inode(fd: int) -> int:
    """Its number in sockfs; 0 where it is not known."""
    inode: int = _try(lambda: os.fstat(fd).st_ino, 0)
    return inode


def _path_health(fd: int, path: str) -> str:
    """Whether a UNIX socket can still be reached under the *path* it was bound to."""
    if not path.startswith("/") or path.startswith(THROUGH_FOLDER):
        return ""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return f"nothing is at {path} any more, nobody can connect"
    except (OSError, ValueError):
        return ""
    state = unix_state(_socket_inode(fd))
    if state is not None and found.st_ino & 0xFFFFFFFF != state.inode:
        return f"something else is at {path}, nobody can connect to this one"
    return ""


def _pipe_health(fd: int, access: str) -> str:
    events = _events(fd) if access != "path" else 0
    if access == "r" and events & select.POLLHUP:
        return "no writer is left"
    if access == "w" and events & select.POLLERR:
        return "no reader is left"
    return ""


# What the kernel answers without asking a file system.


def _link(fd: int) -> str:
    """What /proc/self/fd/N points to; empty where there is no /proc."""
    try:
        return _text(os.readlink(b"/proc/self/fd/%d" % fd))
    except OSError:
        return ""


def _is_pipe(fd: int) -> bool:
    """True for a FIFO. Its file system may be one that is not asked: in a chroot whose root is no
    mount, mountinfo does not have that."""
    try:
        return fcntl.fcntl(fd, _F_GETPIPE_SZ) > 0  # pipe_fcntl() in fs/pipe.c: EBADF for others
    except OSError:
        return False


def _fdinfo(fd: int) -> dict[str, str]:
    """proc_pid_fdinfo(5): "pos", "mnt_id" and what the type adds, if that is not much."""
    try:
        # Not as text, which takes twice as long.
        with open(f"/proc/self/fdinfo/{fd}", "rb", buffering=0) as file:
            text = file.read(1024).decode(errors="replace")
    except (OSError, ValueError):
        return {}
    rows = (line.partition(":") for line in text.splitlines())
    return {key: value.strip() for key, _, value in rows}


def _offset(fd: int, fdinfo: dict[str, str]) -> int | None:
    """The file offset; None for what has none, and for O_PATH."""
    position = fdinfo.get("pos") if system.LINUX else None
    if position is not None:
        return int(position)
    try:
        return os.lseek(fd, 0, os.SEEK_CUR)
    except OSError:
        return None


def _events(fd: int) -> int:
    """What poll(2) reports now; 0 if it reports nothing."""
    poller = select.poll()
    try:
        poller.register(fd, select.POLLIN | select.POLLPRI | system.RDHUP)
        found = poller.poll(0)
    except OSError:
        return 0
    return found[0][1] if found else 0


def _local(sock: AnySocket) -> str:
    """Its own address; `*` is the host of one for all interfaces, IPv4 and IPv6."""
    address = _address(sock.family, sock.getsockname())
    if not address.startswith("[::]:") or sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
        return address
    return address.replace("[::]", "*")


def _peer(sock: AnySocket) -> str:
    """The other end's address, or its pid if it has none. Raises: OSError ENOTCONN."""
    address = _address(sock.family, sock.getpeername())
    if address or sock.family != socket.AF_UNIX or not isinstance(sock, socket.socket):
        return address
    pid = peer_credentials(sock).pid
    return f"pid {pid}" if pid else "unnamed"


def _address(family: int, name: Any) -> str:
    """A socket's name as text; empty if it is not bound."""
    if family == socket.AF_UNIX:
        raw = os.fsencode(name) if isinstance(name, str) else bytes(name)
        return _text(b"@" + raw[1:] if raw[:1] == b"\0" else raw)
    if family == socket.AF_INET:
        return f"{name[0]}:{name[1]}" if name[1] or name[0] != "0.0.0.0" else ""
    if family == socket.AF_INET6:
        host = name[0] if "%" in name[0] or not name[3] else f"{name[0]}%{name[3]}"
        return f"[{host}]:{name[1]}" if name[1] or host != "::" else ""
    return ":".join(map(str, name)) if isinstance(name, tuple) else str(name or "")


def _word(value: int, prefix: str) -> str:
    """The constant's name without its *prefix*, in lower case; the number if it has no name."""
    name = getattr(value, "name", None)
    return name.removeprefix(prefix).lower() if name else str(int(value))


def _text(raw: bytes) -> str:
    """*raw* as UTF-8, which msgpack can carry, whatever bytes a path has."""
    return raw.decode("utf-8", "backslashreplace")


def _try(ask: Callable[[], Any], default: Any) -> Any:
    """What *ask* returns; *default* if the kernel, or this system, does not answer."""
    try:
        return ask()
    except (OSError, ValueError, FdshareError):
        return default
