"""The two processes of a server: how one forks the other, and makes sure that it is dead.

The end of a connection does not prove that the peer is dead. So the half that takes over first
kills the other by its pidfd and shuts the journal down, so that nothing more can come: that is the
fence. Then it waits for the end of the process, but not for ever: that may never come (dying.py).
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NamedTuple, TypeAlias

from fdshare.kernel.ancillary import send_message
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.passing import recv_fds
from fdshare.kernel.plain_socket import stream_pair
from fdshare.server import logs
from fdshare.server.loop.closing import close_quietly
from fdshare.server.loop.dying import has_ended, reap
from fdshare.server.loop.lanes import Lanes

__all__ = [
    "BACK_OFF",
    "SIGNALS",
    "Deaths",
    "Forked",
    "Life",
    "fence",
    "fork_half",
    "live",
]

log = logging.getLogger("fdshare.server")

# A half that dies so many times within so many seconds has a reason that does not go away: the
# survivor keeps the table, and waits a while before it forks the next.
_MANY: Final = 5
_WITHIN: Final = 10.0
BACK_OFF: Final = 5.0

_END: Final = 1.0  # seconds that a process gets to end after it was killed

# What a keeper obeys. A forked half has them blocked until it can hear them.
SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)

# Said to an orphan: to be the other half, or not.
_WANTED: Final = b"y"
_UNWANTED: Final = b"n"

# What a process does until it has something else to do, which is then returned; None to end.
Life: TypeAlias = "Callable[[], Life | None]"


class Deaths:
    """Counts how often the other half has died."""

    def __init__(self) -> None:
        self._at: deque[float] = deque(maxlen=_MANY)

    def too_many(self, now: float) -> str:
        """Counts a death at *now*. Empty, or how many there were in how short a time where they
        are too many: counting starts anew then."""
        self._at.append(now)
        if len(self._at) < _MANY or now - self._at[0] >= _WITHIN:
            return ""
        self._at.clear()
        return f"{_MANY} times in {_WITHIN:g} s"


def fence(pidfd: Descriptor, journal: socket.socket) -> str:
    """Kills the process at the other end of *journal*, and says how it died. When this returns, all
    that it ever writes to us is there to be read, and it does nothing else any more; `has_ended`
    says whether it has closed what it had open."""
    try:
        signal.pidfd_send_signal(pidfd.fileno(), signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        # What it has sent stays; a system call that it is in may send no more (unix_shutdown()).
        journal.shutdown(socket.SHUT_RD)
    except OSError:
        pass  # its end is closed
    if not has_ended(pidfd, _END):
        return "it was killed, but hangs in its end: some file system does not answer"
    return reap(pidfd)


def live(life: Life) -> None:
    """Runs *life*, and each life that follows; returns only in the process that called it.

    A half forks the other in the middle of its own life. The child returns its new life up to here
    instead of calling it there: else each generation would run on the stack of the one before, and
    after two hundred deaths no stack would be left.
    """
    root = os.getpid()
    status = 1
    try:
        next: Life | None = life
        while next is not None:
            next = next()
        status = 0
    except BaseException:
        if os.getpid() == root:
            raise
        log.exception("process %d failed", os.getpid())
    if os.getpid() != root:  # the caller's stack is the parent's: nothing may return into it
        logs.flush()
        os._exit(status)


class Forked(NamedTuple):
    """One end of a new journal, and the pidfd and pid of the other half, which has the other end.
    *born*: this process is the child. The caller owns all."""

    born: bool
    journal: socket.socket
    other: Descriptor
    pid: int


def fork_half(lanes: Lanes, *, orphan: bool = False) -> Forked:
    """Forks the other half. Returns in both; *lanes* are the parent's, and `SIGNALS` are blocked in
    the child. Raises: OSError: nothing was forked.

    With *orphan* it is no child of ours when this returns, but of init or the nearest subreaper: a
    service manager hears of the end of its own children alone. systemd kills a main process that is
    another's at every orderly stop.
    """
    me = os.getpid()
    lanes.rest()
    logs.rest()
    # One that is sent to both halves must not come to the child before it has its handlers.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return _fork_half(orphan)
    finally:
        if os.getpid() == me:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        logs.resume()  # its thread has the mask that this one has now
        if os.getpid() == me:
            lanes.resume()


def _fork_half(orphan: bool) -> Forked:
    ours, theirs = stream_pair(socket.SOCK_SEQPACKET)
    me = os.getpid()
    try:
        us = Descriptor(os.pidfd_open(me))
        try:
            with warnings.catch_warnings():
                # From Python 3.12 on, it is about threads. Those that have not ended touch nothing
                # that a child needs; 3.12 also counts one that was joined, for a moment.
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
        except BaseException:
            close_quietly(us)
            raise
        if pid == 0:
            close_quietly(ours)
            if orphan:
                _fork_again(theirs)
            return Forked(True, theirs, us, me)
        close_quietly(us)  # only now: its number is free for the child's pidfd
        if orphan:
            close_quietly(theirs)
            return Forked(False, ours, *_await_orphan(ours, pid))
        return Forked(False, ours, Descriptor(os.pidfd_open(pid)), pid)
    except BaseException:
        close_quietly(ours)
        raise
    finally:
        if os.getpid() == me:
            close_quietly(theirs)


def _fork_again(theirs: socket.socket) -> None:
    """In a forked child: returns in a child of its own, when that is an orphan."""
    pid = -1
    try:
        pid = os.fork()
        if pid:
            # Nobody but its parent knows for certain whose number it is.
            with Descriptor(os.pidfd_open(pid)) as child:
                send_message(theirs, (str(pid).encode(),), [child.fileno()])
            os._exit(0)
    except BaseException:
        if pid:
            os._exit(1)
        raise
    # The end of the stream is the death of the process that forked us: we are to take over.
    if theirs.recv(1) == _UNWANTED:
        os._exit(1)


def _await_orphan(ours: socket.socket, middle: int) -> tuple[Descriptor, int]:
    """The pidfd and pid of the orphan that *middle*, a child of ours, has forked. The caller owns
    the result. Raises: OSError."""
    try:
        with Descriptor(os.pidfd_open(middle)) as child:
            # A process hands its children on before its end is seen (kernel/exit.c, exit_notify).
            # One that hangs in its end does so later; what it says it has said by then.
            ended = has_ended(child, _END)
        if ended and os.waitpid(middle, 0)[1]:
            raise ChildProcessError(errno.ECHILD, "it was forked, but not forked again")
        ours.settimeout(_END)
        got = recv_fds(ours, 16, 1)
        ours.settimeout(None)
        (pidfd,) = got.descriptors
    except BaseException:
        with suppress(OSError):
            ours.send(_UNWANTED)
        raise
    ours.send(_WANTED)
    return pidfd, int(got.data)
