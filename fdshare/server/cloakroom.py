"""The private server of a process tree: takes descriptors in, gives them out once, and goes home.

What is parked for a pickle needs no names, no policy, no lists and no keeper, but every round trip
and every millisecond of the start is felt by whoever puts a socket into a queue. So this is not the
rendezvous but a room of its own: packets of one byte and a key, one system call each.

=======  ==================================================  ===================================
request                                                      answer
=======  ==================================================  ===================================
``P``    key, seconds, uses; with 1..253 descriptors: keep   ``P`` with a credit, or ``E`` with
                                                             limit and used
``Q``    the same, on credit                                 none
``T``    key: give                                           ``T`` with the descriptors, or ``N``
``R``    key: let go                                         ``R``
=======  ==================================================  ===================================

A credit is a number of descriptors for which there will be room: what is put on credit cannot be
refused, so nobody waits for the answer, which costs both sides as much again as the request. Who
has sent it may end: it waits in the socket. What it names may be asked for, by somebody else's
connection, before it was read here; so a key that is not known is looked for in all that has been
sent until now before the answer is no.

The socket is SOCK_SEQPACKET: a packet arrives whole, with its own descriptors and no others. What
is given is gone: the pickle that it belongs to is in the hands of whoever asks, and of nobody else.
Only processes of our uid, and root's, are let in.

It ends when no process is connected and nothing is kept. Everything kept has a time to live, so a
tree whose processes are all gone takes it along in the end.
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
from fdshare.server.poller import READ, Poller

__all__ = ["CREDIT", "FULL", "KEY", "PUT", "serve"]

KEY: Final = 18  # bytes: 16 that nobody can guess, 2 for the part of a large pickle
PUT: Final = struct.Struct("=dI")  # seconds, uses
FULL: Final = struct.Struct("=II")  # limit, used
CREDIT: Final = struct.Struct("=I")  # descriptors
_PACKET: Final = 256  # bytes, more than any request has
_KEY: Final = slice(1, 1 + KEY)
_PUT_SIZE: Final = 1 + KEY + PUT.size
_P, _Q, _T, _R = b"PQTR"
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
    """One connection, and what it may still put without asking."""

    __slots__ = ("credit", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.credit = 0


class _Room:
    """All of it: the guests and what is kept for them."""

    def __init__(self, listener: socket.socket, nofile: int) -> None:
        self.listener = listener
        # Of *nofile* descriptors three quarters are for what is kept, an eighth for what may be put
        # on credit beyond that, the rest for the guests and ourselves.
        self.limit = max(nofile * 3 // 4 - _RESERVE, 1)
        self.most_credit = nofile // 8
        self.count = 0  # descriptors kept
        self.credit = 0  # that all guests have together
        self.kept: dict[bytes, _Kept] = {}
        self.guests: dict[_Guest, None] = {}  # in the order of their last request
        self.deadlines: list[tuple[float, bytes]] = []
        self.waiting: list[tuple[_Guest, bytes]] = []
        self.missing: list[tuple[_Guest, int, bytes]] = []
        self.poller = Poller()
        self.buffer = bytearray(_PACKET)
        self.now = time.monotonic()  # when this turn began

    # The turn of the loop.

    def run(self) -> None:
        """Serves until nobody needs it."""
        self.poller.register(self.listener.fileno(), READ, self)
        while True:
            timeout = self._timeout()
            ready = self.poller.wait(timeout)
            self.now = time.monotonic()
            self._serve_all(ready)
            if self.missing:
                self._look_for_missing()
            if self.deadlines and self.deadlines[0][0] <= self.now:
                self._expire()
            if self.waiting:
                self._try_again()
            if not ready and timeout == _LINGER and self._idle():
                return

    def _serve_all(self, ready: list[tuple[object, int]]) -> None:
        for key, _ in ready:
            if type(key) is _Guest:
                self._serve(key)
            else:
                self._admit()

    def _look_for_missing(self) -> None:
        """Reads all that was sent before the requests in `missing`, then answers those."""
        missing, self.missing = self.missing, []
        # One packet of each guest a time, 256 guests a time; none has more unread than its credit.
        for _ in range(_MOST_CREDIT * (1 + len(self.guests) // 256)):
            ready = self.poller.wait(0)
            if not ready:
                break
            self._serve_all(ready)
        for guest, verb, key in missing:
            if guest in self.guests:
                self._carry_out(guest, verb, key)

    def _idle(self) -> bool:
        return not self.guests and not self.kept

    def _timeout(self) -> float | None:
        if self.missing:
            return 0.0
        if self.waiting:
            return _RETRY
        if self._idle():
            return _LINGER
        if not self.deadlines:
            return None
        return max(self.deadlines[0][0] - self.now, 0.0)

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
        except OSError:  # EMFILE
            self._make_room()
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

    def _make_room(self) -> None:
        """The guest that was idle longest goes, and comes back some time."""
        if not self.guests:
            time.sleep(_RETRY)
            return
        guest = next(iter(self.guests))
        self._serve(guest)  # what it put on credit, if it has just become less idle
        if next(iter(self.guests), None) is guest:
            self._drop(guest)

    def _drop(self, guest: _Guest) -> None:
        if self.guests.pop(guest, self) is not self:
            self.poller.unregister(guest.sock.fileno())
            guest.sock.close()
            self.credit -= guest.credit
            self.waiting = [(other, key) for other, key in self.waiting if other is not guest]

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
            self._answer(guest, size, descriptors, lost)
        except OSError:  # it has gone, or reads no answers
            self._drop(guest)

    def _answer(
        self, guest: _Guest, size: int, descriptors: list[Descriptor], lost: FdshareError | None
    ) -> None:
        verb = self.buffer[0] if size else 0
        key = bytes(self.buffer[_KEY])
        if verb in (_P, _Q) and size == _PUT_SIZE and (descriptors or lost):
            seconds, uses = PUT.unpack_from(self.buffer, 1 + KEY)
            if 0 < seconds < _EVER:
                self._put(guest, verb, key, descriptors, lost, self.now + seconds, uses)
                return
        if descriptors:
            close_all(descriptors)
        if verb in (_T, _R) and size == 1 + KEY:
            if key in self.kept:
                self._carry_out(guest, verb, key)
            else:
                self.missing.append((guest, verb, key))
        else:  # the end, or nonsense
            self._drop(guest)

    def _carry_out(self, guest: _Guest, verb: int, key: bytes) -> None:
        try:
            if verb == _T:
                self._give(guest, key)
            else:
                self._let_go(key)
                guest.sock.send(b"R")
        except OSError:  # it has gone, or reads no answers
            self._drop(guest)

    def _put(
        self,
        guest: _Guest,
        verb: int,
        key: bytes,
        descriptors: list[Descriptor],
        lost: FdshareError | None,
        expires: float,
        uses: int,
    ) -> None:
        on_credit = verb == _Q and len(descriptors) <= guest.credit
        used = len(descriptors) if on_credit else guest.credit
        guest.credit -= used
        self.credit -= used
        if lost is not None or not (on_credit or self.count + len(descriptors) <= self.limit):
            close_all(descriptors)
            if verb == _P:
                guest.sock.send(b"E" + FULL.pack(self.limit, self.count))
            return
        self._keep(key, descriptors, uses, expires)
        if verb == _P:
            guest.credit = min((self.most_credit - self.credit) // 4, _MOST_CREDIT)
            self.credit += guest.credit
            guest.sock.send(b"P" + CREDIT.pack(guest.credit))

    def _keep(self, key: bytes, descriptors: list[Descriptor], uses: int, expires: float) -> None:
        if key in self.kept:  # the answer to a first attempt was lost
            self._let_go(key)
        self.kept[key] = _Kept(descriptors, uses, expires)
        self.count += len(descriptors)
        heapq.heappush(self.deadlines, (expires, key))
        if len(self.deadlines) > 2 * len(self.kept) + 64:
            self.deadlines = [(kept.expires, key) for key, kept in self.kept.items()]
            heapq.heapify(self.deadlines)

    def _give(self, guest: _Guest, key: bytes) -> None:
        kept = self.kept.get(key)
        if kept is None:
            guest.sock.send(b"N")
            return
        try:
            send_message(guest.sock, (b"T",), kept.fds)
        except DescriptorLimit:  # too many in flight: they will be read soon
            self.waiting.append((guest, key))
            return
        kept.uses -= 1
        if kept.uses <= 0:
            self._let_go(key)

    def _try_again(self) -> None:
        waiting, self.waiting = self.waiting, []
        for guest, key in waiting:
            self._carry_out(guest, _T, key)

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
