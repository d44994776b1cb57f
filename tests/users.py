"""Processes of other users, for tests of what one user can do to the others. They need root."""

from __future__ import annotations

import ctypes
import encodings.idna  # noqa: F401  what a socket needs, and another user may not be able to read
import itertools
import os
import resource
import select
import signal
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import TypeAlias

import pytest
from hanging import HangingFileSystem

_PR_SET_DUMPABLE = 4
Say: TypeAlias = Callable[[object], None]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be other users")
# Every user may do everything to names, and look at them.
ANYBODY = '[[rule]]\neffect = "allow"\nverbs = ["*"]\n'


_PR_CAPBSET_DROP = 24
_CAP_SYS_ADMIN, _CAP_SYS_RESOURCE = 21, 24


def few_processes(most: int) -> Callable[[], None]:
    """A preexec_fn, for root: the program, which may read what root may, is of a user who may have
    *most* processes, and has none yet."""
    uid = 100_000 + os.getpid() * 16 + next(_users) % 16

    def limit() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (_CAP_SYS_ADMIN, _CAP_SYS_RESOURCE):  # with these there is no limit
            if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0):
                os._exit(99)
        resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
        os.setresuid(uid, 0, 0)  # it counts for the real uid

    return limit


_users = itertools.count()


def become(uid: int) -> None:
    """Makes this process one of *uid*, without supplementary groups."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    # What a process of that user has from its exec on: others of it may look into its /proc.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)


class AsUser:
    """A forked process of *uid* that runs *task*, and keeps what that returns until this is closed.

    *task* is given a function that says something here, where `hear` returns it. It sees
    *file_system*, which is closed with this.
    """

    def __init__(
        self,
        uid: int,
        task: Callable[[Say], object],
        *,
        file_system: HangingFileSystem | None = None,
    ) -> None:
        said, says = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if not self.pid:
            said.close()
            try:
                if file_system is not None:
                    file_system.enter()
                become(uid)
                kept = task(lambda what: says.sendall(str(what).encode()[:100_000]))
                says.recv(1)  # the end of the other side
                del kept
            except BaseException as error:
                says.sendall("".join(traceback.format_exception(error)).encode())
            finally:
                os._exit(0)
        says.close()
        self._said = said
        self._file_system = file_system

    def hear(self, seconds: float = 30) -> str:
        """The next thing that it says."""
        ready, _, _ = select.select([self._said], [], [], seconds)
        assert ready, f"it said nothing for {seconds} s"
        return self._said.recv(1 << 17).decode()

    def close(self) -> None:
        """Kills it, unless the test has."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        if self._file_system is not None:  # else the process may hang at its end
            self._file_system.close()
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        self._said.close()

    def __enter__(self) -> AsUser:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def as_user(uid: int, task: Callable[[], object]) -> str:
    """What *task* returns, as str, or the error that it raises: its class and message. Run as
    *uid*."""

    def run(say: Say) -> None:
        try:
            say(task())
        except Exception as error:
            say(f"{type(error).__name__}: {error}")

    with AsUser(uid, run) as other:
        return other.hear()
