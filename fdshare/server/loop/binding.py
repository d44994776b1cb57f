"""The sockets of the `bind` verb: the server binds an address once, for all who ask for the name.

This runs in the event loop and never blocks: no host name is looked up, and the test whether a UNIX
socket is live does not wait.
"""

from __future__ import annotations

import errno
import grp
import os
import socket
import stat
from typing import Final

from fdshare.errors import (
    AddressInUse,
    EndpointError,
    FdshareError,
    InvalidArgument,
    UnsupportedPlatform,
)
from fdshare.kernel import endpoint, system
from fdshare.kernel.borrowed_socket import can_be_asked
from fdshare.kernel.descriptor_limit import descriptor_limit, is_descriptor_limit
from fdshare.kernel.path_lock import live, refuse_other_files
from fdshare.kernel.port_owner import port_owner
from fdshare.protocol.bind_address import BindAddress, parse_address
from fdshare.server.loop.inspect import describe_descriptor

__all__ = ["bind_address", "gid_of", "is_reached", "parse_address"]

_MODE: Final = 0o600
_MOST: Final = 2**31 - 1  # an int of listen(2)
_HIGHEST_GID: Final = 2**32 - 2  # chown(2) takes the next for "leave it"
_HIGHEST_SCOPE: Final = 2**32 - 1  # sin6_scope_id, ipv6(7)


def bind_address(
    address: str, *, backlog: int, reuse_port: bool, find_owner: bool = True
) -> socket.socket:
    """A new socket bound to *address*, listening unless it is udp; blocking, as any new one is.

    `parse_address` says what an address is. tcp has SO_REUSEADDR; with *reuse_port* tcp and udp
    have SO_REUSEPORT; [::] is IPv6 alone, * is both. A UNIX socket that a dead process left on the
    path is replaced; in a folder that others can write, only where that is sticky, as /tmp is, and
    the socket is this user's. The caller owns the result.

    Raises:
        InvalidArgument: not an address, a negative *backlog*, *reuse_port* for unix.
        AddressInUse: somebody has it, or it is another file. `pid` of who has a port only with
            *find_owner*, where /proc tells: to find it takes a twentieth of a second.
        EndpointError: not one of this machine's addresses, no permission, no such folder.
        DescriptorLimit: the server's.
    """
    parsed = parse_address(address)
    if not 0 <= backlog <= _MOST:
        raise InvalidArgument("backlog", f"{backlog} is not between 0 and {_MOST}")
    try:
        if parsed.scheme == "unix":
            return _bind_unix(parsed, backlog, reuse_port)
        return _bind_network(parsed, backlog, reuse_port, find_owner)
    except OSError as error:
        if is_descriptor_limit(error) and not isinstance(error, FdshareError):
            raise descriptor_limit(error.errno, "server") from None
        raise


def is_reached(address: str, fd: int) -> bool:
    """Whether *fd* is a UNIX socket at the path of *address*, and clients can connect to it.

    *fd* is borrowed for the call.
    """
    path = parse_address(address).path
    if not path or not can_be_asked(fd):
        return False
    found = describe_descriptor(fd, bound_to=path)
    return found.listening and found.local == path and "nobody can connect" not in found.health


def _bind_network(
    address: BindAddress, backlog: int, reuse_port: bool, find_owner: bool
) -> socket.socket:
    family = socket.AF_INET6 if address.is_ipv6 else socket.AF_INET
    stream = address.scheme == "tcp"
    try:
        sock = socket.socket(family, socket.SOCK_STREAM if stream else socket.SOCK_DGRAM)
    except OSError as error:
        raise _trouble(address, error) from None
    try:
        if stream:
            # Not for udp: two sockets could share the port then, and one of them would get nothing.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            _share_port(sock)
        if address.is_ipv6:
            # Else [::] would take the port of 0.0.0.0, too, for which the policy was not asked.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(not address.is_dual))
        _bind(sock, address, backlog, find_owner)
        return sock
    except BaseException:
        sock.close()
        raise


def _bind(sock: socket.socket, address: BindAddress, backlog: int, find_owner: bool) -> None:
    host, _, scope = ("::" if address.is_dual else address.host).partition("%")
    try:
        if address.is_ipv6:
            sock.bind((host, address.port, 0, _scope(scope)))
        else:
            sock.bind((host, address.port))
        if address.scheme == "tcp":
            # Two may bind with SO_REUSEADDR; the second to listen is refused.
            sock.listen(backlog)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _in_use(address, find_owner) from None
        raise _trouble(address, error) from None


def _scope(scope: str) -> int:
    """The number of a network interface. Raises: OSError."""
    if not scope:
        return 0
    if not (scope.isascii() and scope.isdigit()):
        return socket.if_nametoindex(scope)
    if int(scope) > _HIGHEST_SCOPE:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
    return int(scope)


def _share_port(sock: socket.socket) -> None:
    if not system.HAS_REUSE_PORT:
        raise UnsupportedPlatform("reuse_port", "there is no SO_REUSEPORT")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def _bind_unix(address: BindAddress, backlog: int, reuse_port: bool) -> socket.socket:
    if reuse_port:
        raise InvalidArgument("reuse_port", "a UNIX socket has no port to share")
    path = address.path
    stale = False
    if not path.startswith("@") and refuse_other_files(path) is not None:
        in_use = live(path, socket.SOCK_STREAM)
        if in_use.pid is not None:
            raise in_use
        _check_folder(path)
        stale = True  # or its queue is full: listen() checks again, under the lock
    mode = _MODE if address.mode is None else address.mode
    owner = (-1, gid_of(address)) if address.group else None
    listener = endpoint.listen(
        path, mode=mode, backlog=backlog, reclaim=stale, locked=stale, owner=owner
    )
    sock, lock = listener.detach()
    if lock is not None:
        # It was taken to remove the path; from now on the listening socket shows that it is in use.
        lock.close()
    return sock


def gid_of(address: BindAddress) -> int:
    """The number of its group, which is looked up as those of a policy are. Raises:
    InvalidArgument."""
    try:
        if not address.group.isdecimal():
            return grp.getgrnam(address.group).gr_gid
        if (gid := int(address.group)) <= _HIGHEST_GID:
            return gid
    except KeyError:
        pass
    raise InvalidArgument("address", f"there is no group {address.group!r}")


def _check_folder(path: str) -> None:
    """Refuses to replace what is at *path* if other users could have put it there, or swap it."""
    folder = os.path.dirname(path)
    info = os.stat(folder)
    others_write = stat.S_IMODE(info.st_mode) & (stat.S_IWGRP | stat.S_IWOTH)
    # In a sticky folder (/tmp) nobody but its owner can have put it there or can swap it.
    if info.st_mode & stat.S_ISVTX and os.lstat(path).st_uid == os.geteuid():
        others_write = 0
    if others_write or info.st_uid not in (0, os.geteuid()):
        raise AddressInUse(
            path,
            f"a socket is there that nobody answers on, and others can write to {folder}; "
            "remove it yourself, or choose a folder that only this user can write",
        )


def _in_use(address: BindAddress, find_owner: bool) -> AddressInUse:
    """The error that names the process that has the port, with *find_owner* and if /proc tells."""
    scheme = address.scheme
    host = "::" if address.is_dual else address.host
    owner = None
    if find_owner and scheme != "unix":
        owner = port_owner(scheme, host, address.port)
    if owner is None:
        return AddressInUse(str(address), "another socket has it; choose another port")
    if owner.pid == os.getpid():
        reason = (
            "this server itself has it, bound before; fetch that one by its name, or try again if "
            "it has been unregistered"
        )
    elif owner.pid is not None:
        reason = f"pid {owner.pid} of uid {owner.uid} has it; stop that, or choose another port"
    else:
        reason = f"a process of uid {owner.uid} has it; stop that, or choose another port"
    return AddressInUse(str(address), reason, owner.pid)


def _trouble(address: BindAddress, error: OSError) -> OSError:
    """What a failed socket(2) or bind(2) means, as the error to raise."""
    code = error.errno or errno.EIO
    if is_descriptor_limit(error):
        return descriptor_limit(code, "server")
    if code == errno.EADDRNOTAVAIL:
        reason = f"this machine has no address {address.host}"
    elif code in (errno.EACCES, errno.EPERM):
        reason = (
            f"uid {os.geteuid()} may not bind port {address.port}; run the server as root or with "
            "CAP_NET_BIND_SERVICE, or choose a port from 1024 on"
        )
    elif code == errno.EAFNOSUPPORT:
        reason = "this machine has no IPv6" if address.is_ipv6 else "this machine has no IPv4"
    else:
        reason = error.strerror or str(error)
    return EndpointError(str(address), reason, code)
