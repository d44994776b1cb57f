"""The private server of a process tree: takes descriptors in, gives them out once, and goes home.

What is parked for a pickle needs no names, no policy, no lists and no keeper, but every time that
one process has to wake another is felt by whoever puts a socket into a queue. So this is not the
rendezvous but a room of its own: packets of one byte and a key, one system call each.

=======  ==================================================  ===================================
request                                                      answer
=======  ==================================================  ===================================
``P``    key, seconds, uses; with 1..253 descriptors: keep   ``P`` with a credit, or ``E`` with
                                                             limit and used
``L``    with one end of a pair: the guest's *hatch*         ``L``
``T``    key: give                                           ``T`` with the descriptors, or ``N``
``R``    key: let go                                         ``R``
=======  ==================================================  ===================================

The socket is SOCK_SEQPACKET: a packet arrives whole, with its own descriptors and no others. What
is given is gone: the pickle that it belongs to is in the hands of whoever asks, and of nobody else.
Only processes of our uid, and root's, are let in.

A guest may put through its hatch, too: the body of a ``P``, without an answer, for as many
descriptors as its credit says. The server does not wait for that; it looks into the hatches when it
is asked for a key that it does not have, when the guest puts openly or leaves, and now and then.
What was sent there was sent before anybody could ask for it, so nothing is missed; until then it
waits in the kernel, like a letter in a box, and survives its sender. A credit has been set aside
for, so what is put on it cannot be refused. It saves two of the four wake-ups.

The server ends when no process is connected and nothing is kept. Everything kept has a time to
live, so a tree whose processes are all gone takes it along in the end.
"""

from __future__ import annotations

import heapq
import os
import resource
import shutil
import socket
import struct
import threading
import time
from typing import Final

from fdshare.errors import DescriptorLimit, FdshareError
from fdshare.kernel.ancillary import close_all, receive_into, send_message
from fdshare.kernel.credentials import peer_credentials
from fdshare.kernel.descriptor import Descriptor
from fdshare.server.loop.poller import READ, Poller

__all__ = ["CREDIT", "FULL", "KEY", "LOOKS", "PUT", "serve"]

KEY: Final = 18  # bytes: 16 that nobody can guess, 2 for the part of a large pickle
PUT: Final = struct.Struct("=dI")  # seconds, uses
FULL: Final = struct.Struct("=II")  # limit, used
CREDIT: Final = struct.Struct("=I")  # descriptors
LOOKS: Final = 5.0  # seconds between looks into the hatches; by as much what is there may outlive
_PACKET: Final = 256  # bytes, more than any request has
_KEY: Final = slice(1, 1 + KEY)
_PUT_SIZE: Final = 1 + KEY + PUT.size
_P, _L, _T, _R = b"PLTR"
_AHEAD: Final = 2  # puts that are taken in before anybody asks
_MOST_CREDIT: Final = 32  # descriptors of one guest; they count as in flight until they are read
_EVER: Final = float("inf")
_BACKLOG: Final = 4096
_LINGER: Final = 1.0  # seconds that it waits for somebody else after the last has gone
_RETRY: Final = 0.005  # seconds until what found too many descriptors in flight is tried again
_RESERVE: Final = 16  # descriptors for the listener, the epoll, and those that are being received


class _Kept:
    """What is kept under one key. *uses*: how often it may still be given."""

    __slots__ = ("descriptors", "expires", "fds", "uses")

    def __init__(self, descriptors: list[Descriptor], uses: int, expires: float) -> None:
        self.descriptors = descriptors
        self.fds = [descriptor.fileno() for descriptor in descriptors]
        self.uses = uses
        self.expires = expires


class _Guest:
    """One connection, its hatch, and how many descriptors may still come through that."""

    __slots__ = ("credit", "hatch", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.hatch: socket.socket | None = None
        self.credit = 0


class _Room:
    """All of it: the guests and what is kept for them."""

    def __init__(self, listener: socket.socket, nofile: int) -> None:
        self.listener = listener
        # Of *nofile* descriptors five eighths are for what is kept, an eighth for what may be put
        # on credit beyond that, the rest for the guests, their hatches and ourselves.
        self.limit = max(nofile * 5 // 8 - _RESERVE, 1)
        self.most_credit = nofile // 8
        self.count = 0  # descriptors kept
        self.credit = 0  # that all guests have together
        self.kept: dict[bytes, _Kept] = {}
        self.guests: dict[_Guest, None] = {}  # in the order of their last request
        self.deadlines: list[tuple[float, bytes]] = []
        self.waiting: list[tuple[_Guest, bytes]] = []
        self.poller = Poller()
        self.hatches = Poller()  # asked, never waited for
        self.buffer = bytearray(_PACKET)
        self.now = time.monotonic()  # when this turn began
        self.looked = self.now  # into the hatches
        self.given = False  # something in this turn

    # The turn of the loop.

    def run(self) -> None:
        """Serves until nobody needs it."""
        self.poller.register(self.listener.fileno(), READ, self)
        while True:
            timeout = self._timeout()
            ready = self.poller.wait(timeout)
            self.now = time.monotonic()
            for key, _ in ready:
                if type(key) is _Guest:
                    self._serve(key)
                else:
                    self._admit()
            if self.given:
                self._look_ahead()
            if self.now >= self.looked + LOOKS:
                self._look()
            if self.deadlines and self.deadlines[0][0] <= self.now:
                self._expire()
            if self.waiting:
                self._try_again()
            if not ready and timeout == _LINGER and self._idle():
                return

    def _idle(self) -> bool:
        return not self.guests and not self.kept

    def _timeout(self) -> float | None:
        if self.waiting:
            return _RETRY
        if self._idle():
            return _LINGER
        due = self.looked + LOOKS if self.guests else _EVER
        if self.deadlines:
            due = min(due, self.deadlines[0][0])
        return max(due - self.now, 0.0)

    def _expire(self) -> None:
        gone: list[Descriptor] = []
        while self.deadlines and self.deadlines[0][0] <= self.now:
            _, key = heapq.heappop(self.deadlines)
            kept = self.kept.get(key)
            if kept is not None and kept.expires <= self.now:
                del self.kept[key]
                self.count -= len(kept.fds)
                gone += kept.descriptors
        if gone:
            # Ours may be the last reference, and close(2) may take its time over that (SO_LINGER).
            threading.Thread(target=close_all, args=(gone,), daemon=True).start()

    # The door.

    def _admit(self) -> None:
        try:
            sock, _ = self.listener.accept()
        except BlockingIOError:
            return
        except OSError:  # EMFILE: the guest that was idle longest goes, and comes back some time
            if self.guests:
                self._drop(next(iter(self.guests)))
            else:
                time.sleep(_RETRY)
            return
        try:
            sock.setblocking(False)
            if peer_credentials(sock).uid not in (0, os.geteuid()):
                sock.close()
                return
        except OSError:  # it has gone again
            sock.close()
            return
        guest = _Guest(sock)
        self.guests[guest] = None
        self.poller.register(sock.fileno(), READ, guest)

    def _drop(self, guest: _Guest) -> None:
        if self.guests.pop(guest, self) is self:
            return
        self.poller.unregister(guest.sock.fileno())
        guest.sock.close()
        self._empty(guest)
        self._close_hatch(guest)
        self.credit -= guest.credit
        self.waiting = [(other, key) for other, key in self.waiting if other is not guest]

    # The hatches.

    def _look(self, wanted: bytes | None = None) -> None:
        """Takes in all that was put through a hatch until now, or until it finds *wanted*."""
        if wanted is None:
            self.looked = self.now
        while ready := self.hatches.wait(0):
            for guest, _ in ready:
                assert isinstance(guest, _Guest)
                self._empty(guest, wanted)
                if wanted in self.kept:
                    return

    def _look_ahead(self) -> None:
        """Takes a little in, while whoever was given something just now has to do with that: what
        comes next is likely to be asked for next."""
        self.given = False
        for guest, _ in self.hatches.wait(0):
            assert isinstance(guest, _Guest)
            self._empty(guest, most=_AHEAD)
            return

    def _empty(self, guest: _Guest, wanted: bytes | None = None, most: int | None = None) -> None:
        while guest.hatch is not None and wanted not in self.kept and most != 0:
            most = most and most - 1
            try:
                size, descriptors, lost = receive_into(guest.hatch, self.buffer)
            except BlockingIOError:
                return
            except OSError:
                self._close_hatch(guest)
                return
            if size != _PUT_SIZE or not self._put(guest, descriptors, lost, guest.credit):
                close_all(descriptors)
            if not size:  # its other end is closed: the guest goes, too
                self._close_hatch(guest)

    def _close_hatch(self, guest: _Guest) -> None:
        if guest.hatch is not None:
            self.hatches.unregister(guest.hatch.fileno())
            guest.hatch.close()
            guest.hatch = None

    # Requests.

    def _serve(self, guest: _Guest) -> None:
        if guest not in self.guests:
            return  # dropped in this very turn
        try:
            size, descriptors, lost = receive_into(guest.sock, self.buffer)
        except BlockingIOError:
            return
        except OSError:
            self._drop(guest)
            return
        del self.guests[guest]
        self.guests[guest] = None  # to the end of the order
        try:
            if not self._answer(guest, size, descriptors, lost):
                self._drop(guest)
        except Exception:
            # It has gone, or reads no answers. Whatever else it is costs this guest alone: what is
            # kept here for the others has nobody else to keep it.
            self._drop(guest)

    def _answer(
        self, guest: _Guest, size: int, descriptors: list[Descriptor], lost: FdshareError | None
    ) -> bool:
        """Carries a request out; False at the end of the stream, and for nonsense."""
        verb = self.buffer[0] if size else 0
        if verb == _P and size == _PUT_SIZE and (descriptors or lost):
            return self._put_openly(guest, descriptors, lost)
        if verb == _L and size == 1 and len(descriptors) == 1 and guest.hatch is None:
            return self._open_hatch(guest, descriptors[0])
        if descriptors:
            close_all(descriptors)
        if verb not in (_T, _R) or size != 1 + KEY:
            return False
        key = bytes(self.buffer[_KEY])
        if key not in self.kept:
            self._look(key)
        if verb == _T:
            self._give(guest, key)
        else:
            self._let_go(key)
            guest.sock.send(b"R")
        return True

    def _open_hatch(self, guest: _Guest, descriptor: Descriptor) -> bool:
        try:
            guest.hatch = descriptor.socket()
        except OSError:
            descriptor.close()
            return False
        guest.hatch.setblocking(False)
        self.hatches.register(guest.hatch.fileno(), READ, guest)
        guest.sock.send(b"L")
        return True

    def _put_openly(
        self, guest: _Guest, descriptors: list[Descriptor], lost: FdshareError | None
    ) -> bool:
        request = bytes(self.buffer[:_PUT_SIZE])
        self._empty(guest)
        self.buffer[:_PUT_SIZE] = request
        self.credit -= guest.credit
        guest.credit = 0
        if not self._put(guest, descriptors, lost, self.limit - self.count):
            close_all(descriptors)
            guest.sock.send(b"E" + FULL.pack(self.limit, self.count))
            return True
        guest.credit = min((self.most_credit - self.credit) // 4, _MOST_CREDIT)
        self.credit += guest.credit
        guest.sock.send(b"P" + CREDIT.pack(guest.credit))
        return True

    def _put(
        self, guest: _Guest, descriptors: list[Descriptor], lost: FdshareError | None, room: int
    ) -> bool:
        """Keeps *descriptors* as the buffer says; False where it cannot: they are the caller's."""
        seconds, uses = PUT.unpack_from(self.buffer, 1 + KEY)
        count = len(descriptors)
        if lost is not None or not 0 < count <= room or not 0 < seconds < _EVER:
            return False
        key = bytes(self.buffer[_KEY])
        if key in self.kept:  # the answer to a first attempt was lost
            self._let_go(key)
        used = min(count, guest.credit)
        guest.credit -= used
        self.credit -= used
        expires = self.now + seconds
        self.kept[key] = _Kept(descriptors, uses, expires)
        self.count += count
        heapq.heappush(self.deadlines, (expires, key))
        if len(self.deadlines) > 2 * len(self.kept) + 64:
            self.deadlines = [(kept.expires, key) for key, kept in self.kept.items()]
            heapq.heapify(self.deadlines)
        return True

    def _give(self, guest: _Guest, key: bytes) -> None:
        kept = self.kept.get(key)
        if kept is None:
            guest.sock.send(b"N")
            return
        try:
            send_message(guest.sock, (b"T",), kept.fds)
        except DescriptorLimit:  # too many in flight: they will be read soon
            self._look()
            self.waiting.append((guest, key))
            return
        self.given = True
        kept.uses -= 1
        if kept.uses <= 0:
            self._let_go(key)

    def _try_again(self) -> None:
        waiting, self.waiting = self.waiting, []
        for guest, key in waiting:
            try:
                self._give(guest, key)
            except OSError:
                self._drop(guest)

    def _let_go(self, key: bytes) -> None:
        kept = self.kept.pop(key, None)
        if kept is not None:
            self.count -= len(kept.fds)
            close_all(kept.descriptors)


def serve(fd: int, folder: str | None = None) -> None:
    """Serves on the listener *fd*, which it takes over, until nobody needs it; then removes
    *folder*, where its socket has one."""
    _be_alone()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with socket.socket(fileno=fd) as listener:
        listener.set_inheritable(False)
        listener.setblocking(False)
        # Once more, for SO_PEERCRED names whoever called listen(2) last: the starter may be gone.
        listener.listen(_BACKLOG)
        _Room(listener, hard).run()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _be_alone() -> None:
    """Keeps nothing of the starter's: its standard streams may be pipes that somebody reads to the
    end, its folder a mount that somebody wants to leave."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    if nothing > 2:
        os.close(nothing)
    os.chdir("/")
