"""Where the private server of a process tree listens: on a path, and on Linux on an abstract name.

The path is in a folder of this user's alone. It leads to the server from another network namespace,
too, and nobody else can bind it. The abstract name is there after chroot(2), in another mount
namespace, and where no folder can be made; but everybody can read it in /proc/net/unix, and bind it
when the server has gone. So the kernel is asked who listens, and no name is trusted.

The server removes the folder when it ends. One that was killed leaves it; the next server that is
started removes it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Final

from fdshare.errors import (
    AddressInUse,
    EndpointError,
    FdshareError,
    NoServer,
    ServerTimeout,
    UntrustedServer,
)
from fdshare.kernel import system
from fdshare.kernel.credentials import Credentials, is_overflow_uid, peer_credentials
from fdshare.kernel.endpoint import Listener, connect, listen
from fdshare.kernel.path_lock import Inode, clear, remove
from fdshare.kernel.unix_address import is_abstract

__all__ = ["connect_private", "is_ours", "leave", "listen_private", "new_address", "remove_dead"]

_PREFIX: Final = "fdshare-private-"
_KIND: Final = socket.SOCK_SEQPACKET
_SOCKET: Final = "sock"  # the file in the folder
_ABSTRACT_TIMEOUT: Final = 1.0  # seconds; whose full backlog it is cannot be seen
_LOOKED_AT: Final = 10_000  # files beside the folder that are looked at for what the dead left
_OF_ANOTHER: Final = (
    "and a private server is for its own user alone; between users, name a server that both may "
    "use: fdshare.install(PATH)"
)
_WITHOUT_NUMBER: Final = "as every user is shown that has no number in this user namespace"
_TRIES: Final = 3  # the folder may be removed between two steps


def new_address() -> str:
    """An address that nobody can guess: a path, or on Linux `@name` where there is no folder for
    temporary files. Nothing is made yet."""
    import tempfile  # here: the server needs none of it, and starts faster

    name = _PREFIX + os.urandom(16).hex()
    try:
        return os.path.join(tempfile.gettempdir(), name, _SOCKET)
    except FileNotFoundError:
        if not system.LINUX:
            raise
        return f"@{name}"


def is_ours(who: Credentials) -> bool:
    """True for this user, as far as the kernel can tell. Not for root: what neither side accepts
    from the other is no use to it."""
    return who.uid == os.geteuid() and not is_overflow_uid(who.uid)


def connect_private(address: str, timeout: float) -> socket.socket:
    """A connection to the server at *address*, by either name. The caller owns the result.

    Raises: NoServer; UntrustedServer: another user listens there; ServerTimeout.
    """
    # No error is kept in a variable: with its traceback it would be a cycle, which keeps what the
    # callers send until the collector comes.
    stranger: int | None = None
    late = False
    for name in _names(address):
        patience = min(timeout, _ABSTRACT_TIMEOUT) if is_abstract(name) else timeout
        try:
            sock = connect(name, timeout=patience, kind=_KIND)
        except EndpointError:
            continue  # also what this process may not see
        except ServerTimeout:
            late = True
            continue
        try:
            who = peer_credentials(sock)
            if is_ours(who):
                return sock
        except BaseException:
            sock.close()
            raise
        sock.close()
        stranger = who.uid
    if stranger is not None:
        reason = _WITHOUT_NUMBER if is_overflow_uid(stranger) else _OF_ANOTHER
        raise UntrustedServer(address, stranger, reason)
    if late:
        raise ServerTimeout(address, timeout)
    raise NoServer(address, "the private server is gone")


def listen_private(address: str) -> list[Listener]:
    """Listeners at *address*, that of the path first; none if another process listens there by now.
    A name that is not free or cannot be bound is left out. The caller owns the result.

    Raises: EndpointError: there is nothing that can be bound.
    """
    listeners: list[Listener] = []
    why: tuple[str, int | None] | None = None
    for name in _names(address):
        try:
            listeners.append(_listen(name))
        except AddressInUse:
            if not is_abstract(name):
                return []
            why = None  # who connects sees whose it is
        except EndpointError as error:
            why = error.reason, error.errno
    if why is not None and not listeners:
        raise EndpointError(address, *why)
    return listeners


def leave(address: str, inode: Inode | None) -> None:
    """Removes what is at *address*, if it is still the socket of *inode*. To be called before that
    is closed: another process may start a server there at once."""
    if inode is not None:
        with suppress(EndpointError):
            remove(address, inode)
        with suppress(OSError):
            os.rmdir(os.path.dirname(address))


def remove_dead(address: str) -> None:
    """Removes what servers of this user that were killed have left beside *address*."""
    if is_abstract(address):
        return
    place = os.path.dirname(os.path.dirname(address))
    with suppress(OSError), os.scandir(place) as found:
        for entry in islice(found, _LOOKED_AT):
            if entry.name.startswith(_PREFIX):
                with suppress(OSError):
                    _remove_if_dead(os.path.join(place, entry.name, _SOCKET))


def _names(address: str) -> list[str]:
    if is_abstract(address):
        return [address]
    if not system.LINUX:
        return [address]
    return [address, f"@{os.path.basename(os.path.dirname(address))}"]


def _listen(name: str) -> Listener:
    """Raises: AddressInUse: a live server has it; EndpointError."""
    if is_abstract(name):
        return listen(name, kind=_KIND)
    folder = os.path.dirname(name)
    tries = _TRIES
    while True:
        try:
            with suppress(FileExistsError):
                os.mkdir(folder, 0o700)
            with _locked(folder):
                return listen(name, kind=_KIND, locked=False)
        except OSError as error:
            tries -= 1
            if error.errno == errno.ENOENT and tries:
                continue  # a server that ended has just removed the folder
            if isinstance(error, FdshareError):
                raise
            raise EndpointError(folder, error.strerror or str(error), error.errno) from None


def _remove_if_dead(path: str) -> None:
    """Raises: OSError: it lives, is being started, or is another user's."""
    folder = os.path.dirname(path)
    with _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
        clear(path, _KIND, reclaim=True)
        os.rmdir(folder)


@contextmanager
def _locked(folder: str, flags: int = fcntl.LOCK_EX) -> Iterator[None]:
    """While one process looks whether the socket in *folder* is dead, and replaces it, no other
    does.

    Raises: EndpointError: the folder is not this user's alone; OSError: there is none.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        info = os.fstat(fd)
        if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & 0o077:
            reason = f"it is no folder of uid {os.geteuid()} with mode 0700"
            raise EndpointError(folder, reason, errno.EACCES)
        fcntl.flock(fd, flags)
        try:
            yield
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)  # a child that was forked meanwhile has a copy
    finally:
        os.close(fd)
