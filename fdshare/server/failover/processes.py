"""What the two halves of a server have in common: what both hold, how one is told apart from its
own death, and how a forked half starts clean.

Rules found by killing a prototype a thousand times. EOF is not death: whoever takes over first
kills the other by pidfd and waits for the pidfd. A new process closes every descriptor that is not
in its table: one copy of a lease's other end that is left open, and the lease never ends.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeAlias

import msgspec

from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.endpoint import Listener
from fdshare.server.core.records import Record
from fdshare.server.core.table import Table
from fdshare.server.loop.closing import close_quietly
from fdshare.server.settings import Settings

__all__ = [
    "BACK_OFF",
    "DEATHS",
    "WITHIN",
    "Forked",
    "Holdings",
    "Life",
    "Note",
    "decode_letter",
    "encode_letter",
    "fence",
    "fork_half",
    "live",
]

log = logging.getLogger("fdshare.server")

# A half that dies so many times within so many seconds has a reason that will not go away: the
# survivor keeps the table and waits a while before it makes the next.
DEATHS: Final = 5
WITHIN: Final = 10.0
BACK_OFF: Final = 5.0


@dataclass(slots=True)
class Holdings:
    """What survives either half. *control*: the owner's socket, whose end is the server's end.
    *fdstore*: the memfd of the table in the service manager's store (fdstore.py)."""

    settings: Settings
    listener: Listener
    table: Table
    epoch: str
    control: socket.socket | None = None
    fdstore: Descriptor | None = None

    def descriptors(self) -> set[int]:
        """Every number that a new half must keep."""
        kept = {self.listener.fileno(), *(handle.fd for handle in self.table.handles())}
        if (lock := self.listener.lock_fileno()) is not None:
            kept.add(lock)
        if self.control is not None:
            kept.add(self.control.fileno())
        if self.fdstore is not None:
            kept.add(self.fdstore.fileno())
        return kept

    def forget_other_half(self) -> None:
        """In the forked process: the handles were watched and pinned over there."""
        for handle in self.table.handles():
            handle.key, handle.pins, handle.closing = None, 0, False

    def take_listener(self) -> None:
        """Makes this process the one that is seen to listen, and that removes the path.

        A Listener removes its path only in the process that made it, so it is made anew; and
        SO_PEERCRED of a listening socket is whoever called listen(2) last.
        """
        address, inode = self.listener.address, self.listener.inode
        sock, lock = self.listener.detach()
        self.listener = Listener(address, sock, lock, inode)
        sock.listen(self.settings.backlog)


class Note(msgspec.Struct, tag="note"):
    """Between the halves, beside the records.

    From the server: "hello" (it serves), "policy" (*data* is the text of a new one), "shutdown" and
    "upgrade" (a client's request, (*session*, *id*)). From the keeper: "hello" (it holds what the
    server holds), "drain" (answer and end), "reload", "upgrading" (it will say hello again soon, or
    is dead), "failed" (the upgrade, and why).
    """

    verb: Literal[
        "hello", "policy", "shutdown", "upgrade", "drain", "reload", "upgrading", "failed"
    ]
    session: str = ""
    id: int = 0
    data: bytes | None = None


Letter: TypeAlias = Record | Note
# What a process is for, until it returns what it is for from then on.
Life: TypeAlias = "Callable[[], Life | None]"

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Letter)

encode_letter = _encoder.encode
decode_letter = _decoder.decode


def fence(pidfd: Descriptor) -> str:
    """Returns when the process is dead, by our hand if need be; says how it died. Then, and not
    before, what it wrote to us is all there is."""
    try:
        signal.pidfd_send_signal(pidfd.fileno(), signal.SIGKILL)
    except ProcessLookupError:
        pass
    wait = select.poll()
    wait.register(pidfd.fileno(), select.POLLIN)
    wait.poll()
    return _reap(pidfd)


def _reap(pidfd: Descriptor) -> str:
    """Takes the exit status of a process that has ended; only a parent learns it."""
    try:
        ended = os.waitid(os.P_PIDFD, pidfd.fileno(), os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        ended = None
    if ended is None:
        return "it is not known how, for it was no child of ours"
    if ended.si_code == os.CLD_EXITED:
        return f"it ended with status {ended.si_status}"
    return f"it was killed by signal {ended.si_status}"


def live(life: Life) -> None:
    """Lives *life*, and the ones after it; returns only in the process that called it.

    A half makes the other by fork, and the child returns from wherever that was up to here, to
    begin a life of its own. Were it to begin it right there, each generation would stand on the
    stack of the one before, and after two hundred deaths there would be no stack left.
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
    if os.getpid() != root:  # what called us is not ours to return to
        sys.stderr.flush()
        os._exit(status)


class Forked(NamedTuple):
    """One end of a new journal, and the pidfd and pid of the other half, who has the other end.
    *born*: this process is the child. The caller owns all."""

    born: bool
    journal: socket.socket
    other: Descriptor
    pid: int


def fork_half() -> Forked:
    """Forks the other half. Returns in both. Raises: OSError: there is no child then."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    me = os.getpid()
    try:
        us = Descriptor(os.pidfd_open(me))
        try:
            pid = os.fork()
        except BaseException:
            close_quietly(us)
            raise
        if pid == 0:
            close_quietly(ours)
            return Forked(True, theirs, us, me)
        close_quietly(us)  # not before: so a number is free for the child's
        return Forked(False, ours, Descriptor(os.pidfd_open(pid)), pid)
    except BaseException:
        close_quietly(ours)
        raise
    finally:
        if os.getpid() == me:
            close_quietly(theirs)
