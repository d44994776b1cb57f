"""Open file descriptions: which descriptors share one. kcmp(2), fcntl(2)."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
from collections.abc import Callable
from functools import cache
from typing import Final

from fdshare.kernel import system

__all__ = ["Descriptions", "compare_open_files", "same_here", "same_open_file"]

# <asm/unistd.h>; Python and the C library have no wrapper.
_SYS_KCMP: Final = {
    "x86_64": 312,
    "i386": 349,
    "i686": 349,
    "aarch64": 272,
    "armv7l": 378,
    "ppc64le": 354,
    "riscv64": 272,
    "s390x": 343,
}.get(platform.machine())
_KCMP_FILE: Final = 0  # <linux/kcmp.h>
# Linux 6.10 and newer, <linux/fcntl.h>: 1 if the argument shares the description, else 0.
_F_DUPFD_QUERY: Final = 1024 + 3
_EQUAL: Final = 0
_LESS: Final = 1


@cache
def _syscall() -> tuple[Callable[..., int], Callable[[], int]]:
    """syscall(2), and what returns the errno of its last call."""
    # Not at import: a process that has imported ctypes has one descriptor more, libffi's own file
    # (libffi 3.5 and newer).
    import ctypes

    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    call.argtypes = [ctypes.c_long] * 2 + [ctypes.c_ulong] * 4
    return call, ctypes.get_errno


def compare_open_files(pid: int, fd: int, other_pid: int, other_fd: int) -> int | None:
    """0 where two descriptors share one open file description, 1 where that of the first comes
    before that of the other in the kernel's order, 2 where it comes after (kcmp(2), KCMP_FILE).

    The order is the same in all processes until the next boot. None where the kernel does not tell:
    it needs the right to trace both processes (ptrace(2), PTRACE_MODE_READ_REALCREDS), or was built
    without. Raises: OSError: one of the two is closed, or its process has ended.
    """
    if _SYS_KCMP is None:
        return None
    kcmp, last_errno = _syscall()
    result = kcmp(_SYS_KCMP, pid, other_pid, _KCMP_FILE, fd, other_fd)
    if result >= 0:
        return result
    code = last_errno()
    if code in (errno.EBADF, errno.ESRCH):
        raise OSError(code, os.strerror(code))
    return None


def same_open_file(pid: int, fd: int, other_pid: int, other_fd: int) -> bool | None:
    """Whether two descriptors share one open file description; None where the kernel does not
    tell. One that is closed shares none."""
    try:
        order = compare_open_files(pid, fd, other_pid, other_fd)
    except OSError:
        return False
    return None if order is None else order == _EQUAL


def same_here(fd: int, other: int) -> bool | None:
    """As `same_open_file`, of two descriptors of this process, in a quarter of the time."""
    if system.LINUX:
        try:
            return fcntl.fcntl(fd, _F_DUPFD_QUERY, other) == 1
        except OSError:
            pass  # an older kernel, or one of them is closed
    pid = os.getpid()
    return same_open_file(pid, fd, pid, other)


class Descriptions:
    """Descriptors of this process, each of an open file description of its own, found in log n
    steps. They are borrowed: each must stay open until it is removed.

    *works* is false where the kernel does not tell: nothing is ever found then.
    """

    def __init__(self) -> None:
        self._fds: list[int] = []  # in the kernel's order
        self._pid = os.getpid()
        with open(os.devnull) as file:
            self.works = self._compare(file.fileno(), file.fileno()) is not None

    def find(self, fd: int) -> int | None:
        """The one that shares the description of *fd*."""
        if self.works:
            at = self._position(fd)
            if at < len(self._fds) and self._compare(self._fds[at], fd) == _EQUAL:
                return self._fds[at]
        return None

    def add(self, fd: int) -> None:
        """Adds *fd*, which shares with none."""
        if self.works:
            self._fds.insert(self._position(fd), fd)

    def replace(self, fd: int, other: int | None) -> None:
        """Puts *other*, which shares with *fd*, in the place of *fd*, if that is there; None
        removes it."""
        if self.find(fd) == fd:
            at = self._position(fd)
            self._fds[at : at + 1] = [] if other is None else [other]

    def _position(self, fd: int) -> int:
        """Where *fd* is, or belongs."""
        low, high = 0, len(self._fds)
        while low < high:
            middle = (low + high) // 2
            if self._compare(self._fds[middle], fd) == _LESS:
                low = middle + 1
            else:
                high = middle
        return low

    def _compare(self, fd: int, other: int) -> int | None:
        return compare_open_files(self._pid, fd, self._pid, other)
