"""Closing: the one place where a descriptor that came from outside is closed, in every process.

close(2) may block: a TCP socket with SO_LINGER and unsent data, a file on FUSE or NFS (which is
asked at *every* close, not only the last), a UNIX socket with such a descriptor unread in it, a
pipe whose other end is in a write(2) that waits for a page. All but the first cannot be told
beforehand, and whoever has another copy may change them between a look and the close. So what
belongs to a user is closed in that user's lane (lanes.py). It is closed at once where nobody but
root and our own uid is served, who could stop the server anyway, and the kernel says that it does
not block; and where we made it ourselves.

A handle that is queued to be sent is pinned; closing it then waits for the last pin.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct
import termios
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from fdshare.errors import FdshareError
from fdshare.kernel.ancillary import MAX_DESCRIPTORS, receive_numbers
from fdshare.kernel.borrowed_socket import AnySocket, borrowed_socket
from fdshare.server.loop.lanes import Lanes

if TYPE_CHECKING:  # the private server of a process tree starts without the table
    from fdshare.server.core.table import Entry

__all__ = [
    "OURS",
    "UNKNOWN",
    "Closer",
    "Handle",
    "assign_owners",
    "close_in_order",
    "close_quietly",
    "close_within",
    "receive_handles",
]

OURS: Final = -1  # the owner of what the server made itself, and gave to nobody who may change it
UNKNOWN: Final = -2  # the owner of a connection that was gone before the kernel could name it
_PATIENCE: Final = 0.25  # seconds for which an answer waits for a close
_AT_A_TIME: Final = 32  # descriptors that one call in a lane closes
_AGAIN: Final = 1.0  # seconds until the next attempt to start a thread
_LINGER: Final = struct.Struct("@ii")  # struct linger
# Blocks of 512 bytes in a memfd: to free 1 MiB takes 0.1 ms, of 64 MiB 30.
_SMALL: Final = 2048
# What epoll, eventfd and the like are in /proc; other anonymous inodes may wait for something.
_HARMLESS: Final = frozenset(
    f"anon_inode:[{name}]" for name in ("eventfd", "eventpoll", "pidfd", "signalfd", "timerfd")
)


class Closable(Protocol):
    def close(self) -> None: ...


def close_quietly(*owners: Closable) -> None:
    """Closes each, of those that are the server's own. What close(2) reports is somebody else's
    loss: the number is free."""
    for owner in owners:
        try:
            owner.close()
        except OSError:
            pass


class Handle:
    """One descriptor that came from outside, or of the table. It has no finalizer: only a `Closer`,
    or the end of the process, closes it. *key* is what the poller reports of it.

    *uid*: whose it is, so that a close that blocks keeps nobody else's waiting. *unsent*: the
    connections in whose queues it is, and how often.
    """

    __slots__ = ("batch", "closing", "fd", "key", "pins", "uid", "unsent")

    def __init__(self, fd: int, uid: int = OURS) -> None:
        """Takes *fd* over."""
        self.fd = fd
        self.uid = uid
        self.pins = 0
        self.closing = False
        self.batch: _Batch | None = None
        self.key: object = None  # not None: registered with the poller
        self.unsent: dict[object, int] | None = None

    def __repr__(self) -> str:
        return f"<Handle fd={self.fd} of uid {self.uid}{' closing' if self.closing else ''}>"


def _close_number(fd: int) -> None:
    try:
        os.close(fd)
    except OSError:
        pass  # the number is free whatever close(2) returned; EIO is the writer's loss


def receive_handles(
    sock: socket.socket, buffer: bytearray, uid: int, flags: int = 0, most: int = MAX_DESCRIPTORS
) -> tuple[int, list[Handle], FdshareError | None]:
    """As `receive_numbers`, with handles of *uid*: a Closer closes all of them in the end."""
    count, fds, lost = receive_numbers(sock, buffer, flags, most)
    return count, [Handle(fd, uid) for fd in fds], lost


class _Batch:
    """Handles that are closed together: *then* is called when none is *left*, or *until* then."""

    __slots__ = ("left", "then", "until")

    def __init__(self, then: Callable[[], None], until: float) -> None:
        self.left = 0
        self.then = then
        self.until = until


class Closer:
    """Closes handles, in the lanes of their owners. For one thread, whose `collect` makes the calls
    that wait for closes; *notify* is called by the lanes' threads when there is something for it.

    *alone*: nobody but root and our own uid is served.
    """

    def __init__(self, lanes: Lanes, notify: Callable[[], None], *, alone: bool) -> None:
        self.lanes = lanes
        self.alone = alone
        self._notify = notify
        self._at_once = frozenset((0, os.geteuid(), OURS)) if alone else frozenset((OURS,))
        # What is in the lanes: numbers, until just before they are closed, and their owner.
        self._handed_over: dict[int, tuple[deque[int], int]] = {}
        # How many were put into the lane of a uid, and how many of them are closed; nothing where
        # all are. One thread writes each number: this one, and the one that serves the lane.
        self.given: dict[int, int] = {}
        self._closed_of: dict[int, int] = {}
        self._last = 0
        self._try_at = 0.0  # when to try to start a thread, where none could be
        self._pinned: dict[Handle, None] = {}  # to be closed, but still in use
        self._pinned_of: dict[int, int] = {}  # how many of a uid
        self._done: deque[tuple[_Batch, int]] = deque()  # so many of it are closed
        self.waiting: dict[_Batch, None] = {}  # in the order of `until`

    def close(
        self,
        handles: Iterable[Handle],
        then: Callable[[], None] | None = None,
        *,
        elsewhere: bool = False,
    ) -> Callable[[], None]:
        """Closes *handles*, soon, and then calls *then*, if it is given: at once, if they are
        closed by then, or from `collect`. What hangs is not waited for, nor what is still pinned
        after a moment. With *elsewhere* the call also waits for that of what is returned."""
        batch = None
        if then is not None:
            batch = _Batch(then, time.monotonic() + _PATIENCE)
            batch.left = 1 + elsewhere
            self.waiting[batch] = None
        others: dict[tuple[int, _Batch | None], list[int]] = {}
        for handle in handles:
            if batch is not None and handle.fd >= 0:
                handle.batch = batch
                batch.left += 1
            if handle.pins:
                self._pin(handle)
            else:
                self._let_go(handle, others)
        for (uid, waits), fds in others.items():
            self._put(fds, uid, waits)
        if batch is None:
            return _nothing
        self._closed(batch)
        return partial(self._closed, batch)

    def at_once(self, fd: int, uid: int) -> bool:
        """Whether *fd* of *uid* is closed by whoever asks for it, without a lane."""
        # Without threads what cannot block is better closed here than never.
        mine = uid in self._at_once or not self.lanes.has_threads
        return mine and (uid == OURS or _cannot_block(fd))

    def hanging(self, uid: int) -> int:
        """How many descriptors of *uid* are not closed, because one of them hangs."""
        return self.left(uid) if self.lanes.hangs(uid) else 0

    def all_hanging(self) -> int:
        """How many of all users."""
        return sum(map(self.left, self.lanes.hanging()))

    def left(self, uid: int) -> int:
        """How many descriptors of *uid* are not closed yet."""
        given = self.given.get(uid, 0)
        left = given - self._closed_of.get(uid, 0)
        if given and not left:
            del self.given[uid], self._closed_of[uid]
        return left + self._pinned_of.get(uid, 0)

    def owners(self) -> set[int]:
        """The uids of all of whom something is not closed yet."""
        return set(filter(self.left, {*self.given, *self._pinned_of}))

    @property
    def is_done(self) -> bool:
        """True if there is nothing that is not closed yet, as far as is known."""
        return not self.given and not self._pinned

    def unfinished(self) -> list[tuple[int, int]]:
        """(number, owner) of what is still to be closed: a forked child has copies of it, which it
        must not wait for either."""
        pinned = [(handle.fd, handle.uid) for handle in self._pinned]
        given = list(self._handed_over.values())
        return [*((fd, uid) for fds, uid in given for fd in list(fds)), *pinned]

    def take_over(self, unfinished: Iterable[tuple[int, int]]) -> None:
        """Closes what a parent's closer had not yet closed when we were forked."""
        for fd, uid in unfinished:
            self._put([fd], uid, None)

    def collect(self, now: float) -> None:
        """Makes the calls that waited for closes which are done by now, or hang; sees whether there
        is room for a thread again, where none could be started."""
        if self.lanes.starved and now >= self._try_at:
            self._try_at = now + _AGAIN
            _ = self.lanes.has_threads
        while self._done:
            self._closed(*self._done.popleft())
        while (first := next(iter(self.waiting), None)) is not None and first.until <= now:
            del self.waiting[first]
            first.then()

    @property
    def due(self) -> float | None:
        """When to `collect` at the latest."""
        first = next(iter(self.waiting), None)
        if self.lanes.starved:
            return self._try_at if first is None else min(self._try_at, first.until)
        return None if first is None else first.until

    # One of them.

    def _pin(self, handle: Handle) -> None:
        """It is closed when it is not in use any more."""
        handle.closing = True
        if handle not in self._pinned:
            self._pinned[handle] = None
            self._pinned_of[handle.uid] = self._pinned_of.get(handle.uid, 0) + 1

    def _unpin(self, handle: Handle) -> None:
        if handle in self._pinned:
            del self._pinned[handle]
            self._pinned_of[handle.uid] -= 1
            if not self._pinned_of[handle.uid]:
                del self._pinned_of[handle.uid]

    def _let_go(self, handle: Handle, others: dict[tuple[int, _Batch | None], list[int]]) -> None:
        """Closes it, or adds it to *others*, which are to be closed in lanes."""
        self._unpin(handle)
        fd, handle.fd = handle.fd, -1
        batch, handle.batch = handle.batch, None
        if fd < 0:
            return
        uid = handle.uid
        if self.at_once(fd, uid):
            _close_number(fd)
        elif batch is not None and not self.lanes.hangs(uid):
            others.setdefault((uid, batch), []).append(fd)
            return
        else:
            others.setdefault((uid, None), []).append(fd)
        if batch is not None:
            self._closed(batch)

    def _put(self, fds: list[int], uid: int, batch: _Batch | None) -> None:
        for at in range(0, len(fds), _AT_A_TIME):
            part = deque(fds[at : at + _AT_A_TIME])
            self._last += 1
            self._handed_over[self._last] = part, uid
            self.given[uid] = self.given.get(uid, 0) + len(part)
            self._closed_of.setdefault(uid, 0)
            self.lanes.put(uid, partial(self._close, self._last, part, uid, batch))

    def _closed(self, batch: _Batch, count: int = 1) -> None:
        batch.left -= count
        if not batch.left and batch in self.waiting:
            del self.waiting[batch]
            batch.then()

    def _close(self, token: int, fds: deque[int], uid: int, batch: _Batch | None) -> None:
        """In a thread of the owner's lane."""
        count = len(fds)
        while fds:
            _no_linger(fds[0])
            _close_number(fds.popleft())
            self._closed_of[uid] += 1
        del self._handed_over[token]
        if batch is not None:
            self._done.append((batch, count))
            self._notify()


def _nothing() -> None:
    pass


def _no_linger(fd: int) -> None:
    """Takes SO_LINGER from a socket: nobody may wait for an unknown peer to read."""
    try:
        sock = borrowed_socket(fd)
    except OSError:
        return  # it is no socket
    try:
        on, seconds = _LINGER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
        if on and seconds:  # with 0 seconds it is the reset that its owner wants
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER.pack(0, 0))
    except OSError:
        pass
    finally:
        sock.detach()


def _cannot_block(fd: int) -> bool:
    """True for what close(2) does not wait for, as long as nobody means harm."""
    try:
        target = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return False
    if target.startswith(("pipe:", "pidfd:")) or target in _HARMLESS:
        return True
    if target.startswith("/memfd:"):
        return os.fstat(fd).st_blocks <= _SMALL
    return target.startswith("socket:") and _closes_quickly(fd)


def _closes_quickly(fd: int) -> bool:
    """Of a socket: it does not linger, and no descriptor is unread in it."""
    try:
        sock = borrowed_socket(fd)
    except OSError:
        return False
    try:
        on, seconds = _LINGER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
        if on and seconds:
            return False
        if sock.family == socket.AF_UNIX:
            return _is_drained(sock)
        return sock.family in (socket.AF_INET, socket.AF_INET6)
    except OSError:
        return False
    finally:
        sock.detach()


def _is_drained(sock: AnySocket) -> bool:
    """True if nothing is unread in a UNIX socket; False of a listener, whose connections may have
    something. Raises: OSError."""
    unread = array.array("i", [0])
    fcntl.ioctl(sock, termios.FIONREAD, unread)  # EINVAL for a listener
    return not unread[0]


def close_in_order(
    closer: Closer,
    handles: Iterable[Handle],
    ends: Iterable[Handle],
    then: Callable[[], None] | None = None,
    *,
    elsewhere: bool = False,
) -> Callable[[], None]:
    """As `Closer.close`; the *ends* of leases are closed after *handles*, before *then* is called.
    So a taker sees the end of its lease when both halves have closed what it took."""

    def close_ends() -> None:
        closer.close(ends)
        if then is not None:
            then()

    return closer.close(handles, close_ends, elsewhere=elsewhere)


def close_within(seconds: float, handles: Collection[Handle]) -> None:
    """Closes *handles*; returns when that is done, or after *seconds*: what hangs stays open. For a
    process that does not serve yet."""
    if handles:
        lanes = Lanes()
        Closer(lanes, _nothing, alone=False).close(handles)
        lanes.stop(seconds)


def assign_owners(entry: Entry) -> None:
    """Says whose the handles of *entry* are, which the other half received, or the server made."""
    for handle in entry.handles:
        handle.uid = entry.put.registrant.uid
    if entry.guard is not None and entry.put.lifetime == "connection":
        entry.guard.uid = entry.put.registrant.uid
    if entry.lease is not None:  # a taker may send something on it
        entry.lease.handle.uid = entry.lease.uid
