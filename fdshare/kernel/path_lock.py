"""The path of a socket: the lock beside it, the probe of what is there, the removal of a stale one.

bind(2) says "Address already in use" of a live server, of a socket that a dead one left and of any
other file. Processes that start at the same moment race to tell these apart and to replace a stale
one; flock(2) on PATH.lock decides. The listener keeps the lock for its whole life, and nobody
unlinks the file: the lock of an unlinked file does not exclude a process that opens the path anew.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
from contextlib import suppress
from typing import Final, TypeAlias

from fdshare.errors import AddressInUse, EndpointError
from fdshare.kernel.credentials import peer_credentials
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.descriptor_limit import is_descriptor_limit
from fdshare.kernel.unix_address import file_type, sockaddr, trouble

__all__ = [
    "Inode",
    "clear",
    "is_lock",
    "is_stale",
    "live",
    "lock",
    "lock_owner",
    "refuse_other_files",
    "remove",
    "unlock",
]

_STARTING: Final = 1.0  # seconds for the owner of a lock to listen, so that we can say its pid
_PAUSE: Final = 0.02  # seconds between looks

Inode: TypeAlias = tuple[int, int]  # st_dev, st_ino


def lock(address: str) -> Descriptor:
    """PATH.lock, open and locked. The lock lasts as long as any copy of the descriptor.

    The caller owns the result. Raises: AddressInUse, EndpointError.
    """
    path = address + ".lock"
    # O_NOFOLLOW, and the owner below: in a shared folder the name could be anybody's.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        held = Descriptor(os.open(path, flags, 0o600))
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _not_our_lock(address, "it is a symbolic link") from None
        missing = is_descriptor_limit(error)  # nothing is wrong with the lock
        if error.errno == errno.EISDIR or (os.path.lexists(path) and not missing):
            raise _not_our_lock(address, error.strerror or str(error)) from None
        raise trouble(address, error) from None
    try:
        info = os.fstat(held.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise _not_our_lock(address, f"it is {file_type(info.st_mode)}")
        if info.st_uid != os.geteuid():
            raise _not_our_lock(address, f"it belongs to uid {info.st_uid}")
        _flock(address, held)
    except BaseException:
        held.close()
        raise
    return held


def is_lock(address: str, held: Descriptor) -> bool:
    """Whether PATH.lock is still the file that *held* has locked."""
    try:
        return os.path.samestat(os.stat(f"{address}.lock"), os.fstat(held.fileno()))
    except OSError:
        return False


def unlock(held: Descriptor) -> None:
    """Ends the lock of every copy of *held*: a process that hangs in its end keeps its own."""
    fcntl.flock(held.fileno(), fcntl.LOCK_UN)


def _flock(address: str, held: Descriptor) -> None:
    """Takes the lock. Raises: AddressInUse, with the pid that listens."""
    deadline = time.monotonic() + _STARTING
    while True:
        try:
            fcntl.flock(held.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            # Its owner may be between lock and listen(), or between close and its end.
            if time.monotonic() > deadline or _listening_pid(address, socket.SOCK_STREAM):
                raise live(address, socket.SOCK_STREAM) from None
        time.sleep(_PAUSE)


def _not_our_lock(address: str, why: str) -> EndpointError:
    reason = f"cannot lock {address}.lock: {why}; remove it or choose another path"
    return EndpointError(address, reason, errno.EACCES)


def refuse_other_files(address: str) -> os.stat_result | None:
    """The lstat of the socket on the path, None where nothing is there.

    Raises: AddressInUse: it is another file.
    """
    try:
        found = os.lstat(address)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise trouble(address, error) from None
    if not stat.S_ISSOCK(found.st_mode):
        raise AddressInUse(
            address,
            f"it is {file_type(found.st_mode)}, not a socket, and stays; "
            "choose another path or move it away",
        )
    return found


def clear(address: str, kind: int, reclaim: bool) -> None:
    """Makes the path free. The caller has the lock, if there is one. Raises: AddressInUse."""
    found = refuse_other_files(address)
    if found is None:
        return
    alive = _alive(address, kind)
    if alive is None:
        raise AddressInUse(
            address,
            f"a socket of uid {found.st_uid} is there, and uid {os.geteuid()} may not ask whether "
            "its server lives; remove it as that user, or choose another path",
        )
    if alive:
        raise live(address, kind)
    if not reclaim:
        raise AddressInUse(
            address,
            "a stale socket: the process that bound it is gone; "
            "remove the file, or bind with reclaim=True",
        )
    remove(address, (found.st_dev, found.st_ino))


def is_stale(address: str, kind: int, ours: Inode) -> bool:
    """Whether a socket is on the path that is not *ours*, and at which nobody listens."""
    try:
        found = os.lstat(address)
    except OSError:
        return False
    if not stat.S_ISSOCK(found.st_mode) or (found.st_dev, found.st_ino) == ours:
        return False
    return _alive(address, kind) is False


def _alive(address: str, kind: int) -> bool | None:
    """True unless the kernel says that nobody has the socket on the path open; None where it does
    not let us ask."""
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        try:
            with sockaddr(address, exists=True) as name:
                probe.connect(name)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except PermissionError:
            return None
        except OSError:
            return True  # EAGAIN: its backlog is full; EPROTOTYPE: another type
        return True


def live(address: str, kind: int) -> AddressInUse:
    """The error that says that a live server has the path, and its pid where it is known."""
    pid = _listening_pid(address, kind) or lock_owner(address)
    who = "another process has it open" if pid is None else f"a live server, pid {pid}"
    return AddressInUse(address, f"{who}; stop that one, or choose another path", pid)


def _listening_pid(address: str, kind: int) -> int | None:
    """The pid that listens: SO_PEERCRED of a listener is the process that called listen(2).

    None: no process, a full backlog, a datagram socket, a process outside our pid namespace, or no
    descriptor free to ask with.
    """
    with suppress(OSError), socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        with sockaddr(address, exists=True) as name:
            probe.connect(name)
        return peer_credentials(probe).pid or None
    return None


def lock_owner(address: str) -> int | None:
    """The pid that locked PATH.lock, while it lives and where /proc/locks has it (Linux)."""
    try:
        inode = os.stat(address + ".lock").st_ino
        with open("/proc/locks") as table:
            # 1: FLOCK  ADVISORY  WRITE 3794 fe:00:131 0 EOF
            rows = [line.split() for line in table]
        for row in rows:
            if row[1] == "FLOCK" and row[5].endswith(f":{inode}"):
                os.stat(f"/proc/{row[4]}")
                return int(row[4])
    except (OSError, IndexError):
        pass
    return None


def remove(address: str, inode: Inode) -> None:
    """Unlinks the path if it is still that inode."""
    try:
        info = os.lstat(address)
        if (info.st_dev, info.st_ino) == inode:
            os.unlink(address)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise trouble(address, error) from None
