"""Binds a socket to a path, whose file has the right mode and owner from its first moment on."""

from __future__ import annotations

import errno
import os
import socket
import stat
from _thread import allocate_lock  # threading imports more, and adds nothing to it
from typing import Final, TypeAlias

from fdshare.errors import EndpointError
from fdshare.kernel import system
from fdshare.kernel.path_lock import Inode, live
from fdshare.kernel.unix_address import sockaddr, trouble

__all__ = ["Owner", "bind_path"]

# The process has one umask(2): of two binds at once, each would restore the other's.
_umask_lock = allocate_lock()

Owner: TypeAlias = tuple[int, int]  # uid, gid; -1 leaves one as it is
_NOBODY_ELSE: Final = 0o600  # the mode of a file that has not its owner yet


def bind_path(address: str, sock: socket.socket, mode: int, owner: Owner | None) -> Inode:
    """The inode of the file at *address*, to which *sock* is bound now. *sock* is borrowed.

    Raises: AddressInUse; EndpointError: it cannot be bound, given to *owner*, or was replaced.
    """
    try:
        with sockaddr(address, exists=False) as name:
            if system.LINUX:
                info = _bind_linux(address, sock, name, mode, owner)
            else:
                info = _bind_umask(sock, name, mode, owner)
    except OSError as error:
        if isinstance(error, EndpointError):
            raise
        if error.errno == errno.EADDRINUSE:  # another process, which uses no lock, was faster
            raise live(address, sock.type) from None
        raise trouble(address, error) from None
    return info.st_dev, info.st_ino


def _bind_linux(
    address: str, sock: socket.socket, name: bytes, mode: int, owner: Owner | None
) -> os.stat_result:
    """Binds with at most *mode*, then sets the owner and the bits that the umask removed.

    unix_bind_bsd() (net/unix/af_unix.c) starts from the mode of the socket's own inode, so the
    umask, which other threads use at the same moment, need not be touched to narrow it.
    """
    os.fchmod(sock.fileno(), _NOBODY_ELSE if owner else mode)
    sock.bind(name)
    # A descriptor of the inode, not its name: who may write the folder could replace that, and
    # have the owner or the mode of another file changed.
    inode = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        info = os.fstat(inode)
        if owner or stat.S_IMODE(info.st_mode) != mode:
            if not stat.S_ISSOCK(info.st_mode) or info.st_uid != os.geteuid():
                raise EndpointError(address, "somebody replaced the socket while it was bound")
            os.chown(f"/proc/self/fd/{inode}", *(owner or (-1, -1)))
            os.chmod(f"/proc/self/fd/{inode}", mode)
        return info
    finally:
        os.close(inode)


def _bind_umask(sock: socket.socket, name: bytes, mode: int, owner: Owner | None) -> os.stat_result:
    with _umask_lock:
        before = os.umask(0o777 & ~(_NOBODY_ELSE if owner else mode))
        try:
            sock.bind(name)
        finally:
            os.umask(before)
    if owner:
        os.chown(name, *owner, follow_symlinks=False)
        os.chmod(name, mode, follow_symlinks=False)
    return os.lstat(name)
