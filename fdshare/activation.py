"""Service managers: take passed descriptors (LISTEN_FDS), report (sd_notify); and the other side.

A program calls `listen_fds()` and `notify("READY=1")`, under systemd or under `fdshare run`, which
speaks the same protocols. Written after sd_listen_fds(3), sd_notify(3), systemd.exec(5) and
systemd's src/libsystemd/sd-daemon/sd-daemon.c, whose rules stand beside the lines.

FIRST is the number of the first descriptor that is passed, STORED the name of a stored one that
came without a name.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

from fdshare.errors import (
    ClosedDescriptor,
    FdshareError,
    InvalidArgument,
    InvalidName,
    ServerTimeout,
    UnsupportedPlatform,
)
from fdshare.kernel import system
from fdshare.kernel.ancillary import MAX_DESCRIPTORS, close_all
from fdshare.kernel.credentials import Credentials, enable_credentials, own_credentials
from fdshare.kernel.descriptor import Descriptor, HasFileno
from fdshare.kernel.endpoint import Listener, datagram
from fdshare.kernel.passing import recv_fds, send_fds
from fdshare.kernel.unix_address import is_abstract, sockaddr

__all__ = [
    "FIRST",
    "STORED",
    "Notification",
    "NotifySocket",
    "barrier",
    "check_fdname",
    "child_environment",
    "listen_fds",
    "listen_fds_in_order",
    "notify",
    "own_pidfd_id",
    "store",
    "unstore",
    "watchdog_seconds",
]

FIRST: Final = 3  # SD_LISTEN_FDS_START
STORED: Final = "stored"  # the name of a stored descriptor that came without one, sd_notify(3)
_UNKNOWN: Final = "unknown"  # ... and of a passed one, sd_listen_fds_with_names(3)
_MAX_FDNAME: Final = 255  # FDNAME_MAX
_MAX_FDS: Final = 2**31 - 1 - FIRST
_MAX_NOTIFICATION: Final = 4096  # NOTIFY_BUFFER_MAX; systemd refuses what is longer
_VARIABLES: Final = ("LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES")


# Descriptors that were passed to this process.


def listen_fds(*, unset_environment: bool = True) -> dict[str, list[Descriptor]]:
    """The descriptors that a service manager passed, by name, in the order given.

    {} if there are none, or if they are meant for another process. Names come from LISTEN_FDNAMES
    and may repeat; without it all are "unknown". Every descriptor is close-on-exec now. The
    variables are removed, also if this raises, so that neither a second call nor a child takes them
    again; pass *unset_environment* False to leave them.

    Raises: InvalidArgument: a count that is no positive number, or not that of the names;
    ClosedDescriptor: one of them is not open. The caller owns the result.

    >>> listen_fds()  # started by hand, without a service manager
    {}
    """
    passed: dict[str, list[Descriptor]] = {}
    for name, descriptor in listen_fds_in_order(unset_environment=unset_environment):
        passed.setdefault(name, []).append(descriptor)
    return passed


def listen_fds_in_order(*, unset_environment: bool = True) -> list[tuple[str, Descriptor]]:
    """As `listen_fds`, as (name, descriptor) from number 3 upwards. The caller owns the result.

    >>> listen_fds_in_order()  # started by hand, without a service manager
    []
    """
    try:
        names = _passed_names(os.environ)
    finally:
        if unset_environment:
            for variable in _VARIABLES:
                os.environ.pop(variable, None)
    for number in range(FIRST, FIRST + len(names)):
        try:
            flags = fcntl.fcntl(number, fcntl.F_GETFD)
            fcntl.fcntl(number, fcntl.F_SETFD, flags | fcntl.FD_CLOEXEC)
        except OSError:
            raise ClosedDescriptor(
                f"LISTEN_FDS={len(names)}, but descriptor {number} is not open"
            ) from None
    return [(name, Descriptor(FIRST + at)) for at, name in enumerate(names)]


def _passed_names(environment: Mapping[str, str]) -> list[str]:
    """A name for each descriptor that was passed to this very process."""
    pid = environment.get("LISTEN_PID")
    if pid is None or _number("LISTEN_PID", pid) != os.getpid():
        return []
    # Safe against reuse of the pid; a kernel that has no such ids leaves it unchecked.
    meant = environment.get("LISTEN_PIDFDID")
    if meant is not None:
        wanted, own = _number("LISTEN_PIDFDID", meant), own_pidfd_id()
        if own is not None and own != wanted:
            return []
    text = environment.get("LISTEN_FDS")
    if text is None:
        return []
    count = _number("LISTEN_FDS", text)
    if not 0 < count <= _MAX_FDS:
        raise InvalidArgument("LISTEN_FDS", f"{count} is not between 1 and {_MAX_FDS}")
    listed = environment.get("LISTEN_FDNAMES")
    if listed is None:
        _check_open(FIRST + count - 1, count)
        return [_UNKNOWN] * count
    names = listed.split(":")
    if len(names) != count:
        raise InvalidArgument(
            "LISTEN_FDNAMES", f"{len(names)} names for {count} descriptors: {listed!r}"
        )
    return names


def _check_open(last: int, count: int) -> None:
    """Refuses a huge count before a list of that length is made."""
    try:
        fcntl.fcntl(last, fcntl.F_GETFD)
    except OSError:
        raise ClosedDescriptor(f"LISTEN_FDS={count}, but descriptor {last} is not open") from None


def _number(variable: str, text: str) -> int:
    # int() alone would also take "1_000", " 3 " and other alphabets' digits.
    if text.isascii() and text.lstrip("+-").isdigit():
        try:
            return int(text)
        except ValueError:
            pass
    raise InvalidArgument(variable, f"{text!r} is not a number")


def own_pidfd_id() -> int | None:
    """The LISTEN_PIDFDID of this process: the inode of its pidfd, unique until the next boot.

    None where the kernel has no pidfs (before Linux 6.9).

    >>> own_pidfd_id() == own_pidfd_id()
    True
    """
    if not system.HAS_PIDFD_IDS:
        return None
    try:
        with Descriptor(os.pidfd_open(os.getpid())) as pidfd, Descriptor(os.eventfd(0)) as other:
            found, anonymous = os.fstat(pidfd.fileno()), os.fstat(other.fileno())
    except OSError:
        return None
    # Without pidfs all anonymous descriptors are of one file system and share one inode.
    return None if found.st_dev == anonymous.st_dev else found.st_ino


# Descriptors for a child.


def check_fdname(name: str) -> str:
    """*name* itself, if systemd allows it for a descriptor.

    That is at most 255 printable ASCII characters, no colon. Raises: InvalidName, where systemd
    would ignore the name silently.

    >>> check_fdname("web")
    'web'
    """
    if len(name) > _MAX_FDNAME:
        raise InvalidName(name[:40] + "...", f"{len(name)} characters, systemd allows 255")
    for character in name:
        if not " " <= character <= "~":
            raise InvalidName(name, "systemd allows printable ASCII only for a descriptor's name")
        if character == ":":
            raise InvalidName(name, "a colon separates the names of descriptors in LISTEN_FDNAMES")
    return name


def child_environment(names: Sequence[str]) -> dict[str, str]:
    """The variables for a program that this process is about to exec, with descriptors from 3.

    One descriptor for each of *names*, in that order, not close-on-exec. LISTEN_PID and, where the
    kernel has it, LISTEN_PIDFDID are this process's: a child must call this itself, between fork
    and exec. Raises: InvalidName.

    >>> child_environment(["web", "admin"])["LISTEN_FDNAMES"]
    'web:admin'
    """
    variables = {
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDS": str(len(names)),
        "LISTEN_FDNAMES": ":".join(map(check_fdname, names)),
    }
    if (own := own_pidfd_id()) is not None:
        variables["LISTEN_PIDFDID"] = str(own)
    return variables


# Reports to a service manager.


def notify(
    state: str,
    *,
    fds: Iterable[HasFileno | int] = (),
    pid: int | None = None,
    unset_environment: bool = False,
    timeout: float | None = None,
) -> bool:
    """True when *state* was sent to NOTIFY_SOCKET; False where there is none.

    So a program can call it whether it has a service manager or not. *state* is "READY=1",
    "STATUS=..." or several lines. Copies of *fds* (at most 253) go with it, and the sender's
    credentials; a privileged sender may report for another *pid*. *timeout*: seconds to wait for a
    manager that does not read. *fds* are borrowed for the call.
    Raises: InvalidArgument: NOTIFY_SOCKET is not a UNIX address; OSError: the manager is not there;
    BlockingIOError or TimeoutError: it does not read; TooManyDescriptors, DescriptorLimit.

    >>> notify("READY=1")  # started by hand, without a service manager
    False
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if unset_environment:
        os.environ.pop("NOTIFY_SOCKET", None)
    if not address:
        return False
    _send(address, state, fds, pid, timeout)
    return True


def _send(
    address: str,
    state: str,
    fds: Iterable[HasFileno | int],
    pid: int | None,
    timeout: float | None,
) -> None:
    if address.startswith("vsock"):
        raise UnsupportedPlatform("NOTIFY_SOCKET", f"{address}: fdshare reports to UNIX sockets")
    if not (is_abstract(address) or os.path.isabs(address)) or len(address) < 2:
        raise InvalidArgument("NOTIFY_SOCKET", f"{address!r} is neither a path nor @name")
    own = own_credentials()
    speaker = Credentials(pid, own.uid, own.gid) if pid is not None else True
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock,
        sockaddr(address, exists=True) as name,
    ):
        sock.settimeout(timeout)
        send_fds(sock, fds, state.encode(), credentials=speaker, address=name)


def store(
    name: str,
    fds: Iterable[HasFileno | int],
    *,
    poll: bool = True,
    timeout: float | None = None,
) -> bool:
    """True when the service manager was given copies of *fds* to keep under *name* (FDSTORE=1).

    `listen_fds` returns them at the next start. At most 253. Without *poll* they are kept past a
    hang-up (FDPOLL=0). It is safe to close *fds* after this
    call. Raises: InvalidName, and those of `notify`.

    >>> with open(os.devnull) as file:
    ...     store("null", [file])  # started by hand, without a service manager
    False
    """
    polled = "" if poll else "\nFDPOLL=0"
    state = f"FDSTORE=1\nFDNAME={check_fdname(name)}{polled}"
    return notify(state, fds=fds, timeout=timeout)


def unstore(name: str, *, timeout: float | None = None) -> bool:
    """True when the service manager was told to close all that it keeps under *name*.

    >>> unstore("null")  # started by hand, without a service manager
    False
    """
    return notify(f"FDSTOREREMOVE=1\nFDNAME={check_fdname(name)}", timeout=timeout)


def barrier(timeout: float | None = None) -> bool:
    """True when the service manager has handled all that was sent before (BARRIER=1).

    False where there is none. *timeout* in seconds. Raises: ServerTimeout, and those of `notify`.

    >>> barrier(timeout=5)  # started by hand, without a service manager
    False
    """
    ours, theirs = map(Descriptor, os.pipe())
    with ours:
        with theirs:
            if not notify("BARRIER=1", fds=[theirs], timeout=timeout):
                return False
        # It closes its copy when it is done, and the pipe has no writer left.
        waiting = select.poll()
        waiting.register(ours.fileno(), 0)
        if not waiting.poll(None if timeout is None else timeout * 1000):
            raise ServerTimeout(os.environ.get("NOTIFY_SOCKET", ""), timeout or 0.0)
    return True


def watchdog_seconds() -> float | None:
    """The seconds within which each WATCHDOG=1 must follow the last; None where none is expected.

    As sd_watchdog_enabled(3). Raises: InvalidArgument.

    >>> watchdog_seconds() is None  # started by hand, without a service manager
    True
    """
    text, pid = os.environ.get("WATCHDOG_USEC"), os.environ.get("WATCHDOG_PID")
    if not text or (pid and _number("WATCHDOG_PID", pid) != os.getpid()):
        return None
    usec = _number("WATCHDOG_USEC", text)
    if usec <= 0:
        raise InvalidArgument("WATCHDOG_USEC", f"{usec} is not a time span")
    return usec / 1e6


# The manager's side.


@dataclass(frozen=True, slots=True)
class Notification:
    """One datagram of a service: *lines* as sent, *sender* as the kernel says.

    The caller owns *descriptors*.
    """

    lines: list[str]
    descriptors: list[Descriptor] = field(default_factory=list)
    sender: Credentials | None = None

    def says(self, line: str) -> bool:
        """True if *line* ("READY=1") is among them."""
        return line in self.lines

    def value(self, key: str) -> str | None:
        """The value of the first KEY=, or None."""
        for line in self.lines:
            if line.startswith(f"{key}="):
                return line[len(key) + 1 :]
        return None

    @property
    def is_barrier(self) -> bool:
        """True for a BARRIER=1, which is alone and has one descriptor.

        Close it when all that came before is done.
        """
        return self.lines == ["BARRIER=1"] and len(self.descriptors) == 1

    def close(self) -> None:
        """Closes the descriptors that are still open."""
        close_all(self.descriptors)


class NotifySocket:
    """Owns a socket whose address is the NOTIFY_SOCKET of a child."""

    def __init__(self, path: str, *, mode: int = 0o600) -> None:
        """Binds *path* with *mode*, or `@name`. Raises: AddressInUse, EndpointError."""
        self._listener: Listener = datagram(path, mode=mode)
        enable_credentials(self._listener.socket)
        self.address = self._listener.address

    def fileno(self) -> int:
        """The number of the socket, readable when there is a notification."""
        return self._listener.fileno()

    def receive(self) -> Notification | None:
        """The next notification; None for one that systemd would not accept either.

        That is one that is too long, has a NUL or more than 253 descriptors, or is not UTF-8.
        Blocks. The caller owns its descriptors.

        Raises: DescriptorLimit: no descriptor is free; the notification is still there.
        """
        try:
            got = recv_fds(self._listener.socket, _MAX_NOTIFICATION, MAX_DESCRIPTORS)
        except FdshareError as error:
            if isinstance(error, OSError):
                raise
            return None
        try:
            text = got.data.decode()
            if got.flags & socket.MSG_TRUNC or "\0" in text.rstrip("\0"):
                raise UnicodeError
        except UnicodeError:
            got.close()
            return None
        lines = [line for line in text.rstrip("\0").split("\n") if line]
        return Notification(lines, got.descriptors, got.credentials)

    def abandon(self) -> None:
        """Closes this process's copy, for a forked child that uses the other; the path stays."""
        sock, _ = self._listener.detach()
        sock.close()

    def close(self) -> None:
        """Closes the socket and removes its path."""
        self._listener.close()

    def __repr__(self) -> str:
        return f"<NotifySocket {self.address}{' closed' if self.fileno() < 0 else ''}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
