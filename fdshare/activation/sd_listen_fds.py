"""Descriptors that a process was passed at its start, and those it passes on: sd_listen_fds(3).

Written after that page, systemd.exec(5) and systemd's src/libsystemd/sd-daemon/sd-daemon.c, whose
rules stand beside the lines.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping, Sequence
from typing import Final

from fdshare.errors import ClosedDescriptor, InvalidArgument, InvalidName
from fdshare.kernel import system
from fdshare.kernel.descriptor import Descriptor

__all__ = [
    "FIRST",
    "STORED",
    "check_fdname",
    "child_environment",
    "listen_fds",
    "listen_fds_in_order",
    "number_in",
    "own_pidfd_id",
]

FIRST: Final = 3  # SD_LISTEN_FDS_START
STORED: Final = "stored"  # the name of a stored descriptor that came without one, sd_notify(3)
_UNKNOWN: Final = "unknown"  # ... and of a passed one, sd_listen_fds_with_names(3)
_MAX_FDNAME: Final = 255  # FDNAME_MAX
_MAX_FDS: Final = 2**31 - 1 - FIRST
_VARIABLES: Final = ("LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES")


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
    if pid is None or number_in("LISTEN_PID", pid) != os.getpid():
        return []
    # Safe against reuse of the pid; a kernel that has no such ids leaves it unchecked.
    meant = environment.get("LISTEN_PIDFDID")
    if meant is not None:
        wanted, own = number_in("LISTEN_PIDFDID", meant), own_pidfd_id()
        if own is not None and own != wanted:
            return []
    text = environment.get("LISTEN_FDS")
    if text is None:
        return []
    count = number_in("LISTEN_FDS", text)
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


def number_in(variable: str, text: str) -> int:
    """The number that *text* is, the value of *variable*. Raises: InvalidArgument."""
    # int() alone would also take "1_000", " 3 " and other alphabets' digits.
    if text.isascii() and text.lstrip("+-").isdigit():
        try:
            return int(text)
        except ValueError:
            pass
    raise InvalidArgument(variable, f"{text!r} is not a number")
