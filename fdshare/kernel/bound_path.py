"""Binds a socket to a path, whose file has the right mode and owner from its first moment on."""

from __future__ import annotations

import errno
import os
import socket
import stat
from _thread import allocate_lock  # threading imports more, and adds nothing to it
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final, TypeAlias

from fdshare.errors import EndpointError
from fdshare.kernel import system
from fdshare.kernel.path_lock import Inode, live
from fdshare.kernel.unix_address import sockaddr, trouble

__all__ = ["Owner", "bind_path", "set_file"]

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
                info = _bind_umask(address, sock, name, mode, owner)
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
    with _removed_on_error(name), _inode(name) as inode:
        info = os.fstat(inode)
        if owner or stat.S_IMODE(info.st_mode) != mode:
            if not stat.S_ISSOCK(info.st_mode) or info.st_uid != os.geteuid():
                raise EndpointError(address, "somebody replaced the socket while it was bound")
            _set(address, f"/proc/self/fd/{inode}", mode, owner)
        return info


def _bind_umask(
    address: str, sock: socket.socket, name: bytes, mode: int, owner: Owner | None
) -> os.stat_result:
    with _umask_lock:
        before = os.umask(0o777 & ~(_NOBODY_ELSE if owner else mode))
        try:
            sock.bind(name)
        finally:
            os.umask(before)
    with _removed_on_error(name):
        if owner:
            _set(address, name, mode, owner, follow_symlinks=False)
        return os.lstat(name)


def set_file(address: str, mode: int | None, owner: Owner | None) -> None:
    """Sets the mode and the owner of the socket's file at *address*; None leaves one as it is.

    Raises: EndpointError: no socket is there, or this user may not.
    """
    try:
        with sockaddr(address, exists=True) as name:
            if not system.LINUX:
                _check_socket(address, os.lstat(name))
                _set(address, name, mode, owner, follow_symlinks=False)
                return
            if not os.path.exists("/proc/self/fd"):
                raise EndpointError(address, "without /proc its mode and group cannot be set")
            with _inode(name) as inode:
                _check_socket(address, os.fstat(inode))
                _set(address, f"/proc/self/fd/{inode}", mode, owner)
    except OSError as error:
        if isinstance(error, EndpointError):
            raise
        raise trouble(address, error) from None


def _check_socket(address: str, info: os.stat_result) -> None:
    if not stat.S_ISSOCK(info.st_mode):
        raise EndpointError(address, "it is no socket")


@contextmanager
def _inode(name: bytes) -> Iterator[int]:
    """A descriptor of the inode, not its name: who may write the folder could replace that, and
    have the owner or the mode of another file changed."""
    inode = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield inode
    finally:
        os.close(inode)


@contextmanager
def _removed_on_error(name: bytes) -> Iterator[None]:
    """Removes the file of the socket that was just bound if what follows fails: the next to bind
    would take it for that of a server that died."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            found = os.lstat(name)
            if stat.S_ISSOCK(found.st_mode) and found.st_uid == os.geteuid():
                os.unlink(name)
        raise


def _set(
    address: str,
    file: str | bytes,
    mode: int | None,
    owner: Owner | None,
    *,
    follow_symlinks: bool = True,
) -> None:
    try:
        if owner is not None:
            os.chown(file, *owner, follow_symlinks=follow_symlinks)
        if mode is not None:
            os.chmod(file, mode, follow_symlinks=follow_symlinks)
    except PermissionError as error:
        raise EndpointError(
            address,
            f"uid {os.geteuid()} may not give the socket that owner, group or mode: the owner of "
            "its file may, as a member of the group, or root with CAP_CHOWN",
            error.errno or errno.EPERM,
        ) from None
