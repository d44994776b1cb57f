"""Reports of a service to its manager: sd_notify(3) and sd_watchdog_enabled(3)."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterable

from fdshare.activation.sd_listen_fds import check_fdname, number_in
from fdshare.errors import InvalidArgument, ServerTimeout, UnsupportedPlatform
from fdshare.kernel.credentials import Credentials, own_credentials
from fdshare.kernel.descriptor import Descriptor, HasFileno
from fdshare.kernel.passing import send_fds
from fdshare.kernel.unix_address import is_abstract, sockaddr

__all__ = ["barrier", "notify", "store", "unstore", "watchdog_seconds"]


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
    if not text or (pid and number_in("WATCHDOG_PID", pid) != os.getpid()):
        return None
    usec = number_in("WATCHDOG_USEC", text)
    if usec <= 0:
        raise InvalidArgument("WATCHDOG_USEC", f"{usec} is not a time span")
    return usec / 1e6
