"""Disconnecting: closes the sockets of clients, and never waits.

The close(2) of a socket lets go of the descriptors that are unread in it, and one of them may
block. So what brings no descriptor is read first; then nothing is left that could block. A socket
with descriptors in it is closed in the lane of its user (lanes.py). There may be thousands of them
where closes of that user hang, for whoever may connect can connect again. So they wait without a
number each: as messages in a socket pair whose other end is closed in the lane, with all that is in
it.
"""

from __future__ import annotations

import os
import socket
import threading
from functools import partial
from typing import Final

from fdshare.kernel.ancillary import read_to_descriptors, send_message
from fdshare.server.loop.closing import Closer, Handle, close_quietly
from fdshare.server.loop.poller import Poller

__all__ = ["Disconnector"]

_BUFFER: Final = 1 << 16  # bytes of one read; some 200 KiB can be unread in a socket
_NO_LIMIT: Final = 1 << 62


class _Pair:
    """Our *end* of a socket pair, and how many sockets wait in the other one."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.count = 0
        self._sealed = False
        self._lock = threading.Lock()

    def take(self, sock: socket.socket) -> bool:
        """Sends *sock*, and closes it here; False if it takes no more."""
        # In one step: were the other end closed in between, ours would be the last close.
        with self._lock:
            if self._sealed:
                return False
            try:
                send_message(self.end, (b"\0",), (sock.fileno(),))
            except OSError:  # it is full, or too much is in flight
                return False
            close_quietly(sock)
        self.count += 1
        return True

    def seal(self) -> None:
        """It takes no more: the other end is about to be closed. In a thread."""
        with self._lock:
            self._sealed = True


class Disconnector:
    """Closes the sockets of clients; *closer* those that may block."""

    def __init__(self, closer: Closer, poller: Poller, most: int) -> None:
        """*most*: how many may wait in pairs where this process has no privileges: there the kernel
        counts them as it counts what is in flight to clients (unix(7), ETOOMANYREFS)."""
        self._closer = closer
        self._poller = poller
        self._room = most if os.geteuid() else _NO_LIMIT
        self._last: dict[int, _Pair] = {}  # uid -> the pair that may still have room
        self._pairs: dict[_Pair, None] = {}
        self._buffer = bytearray(_BUFFER)

    def disconnect(self, sock: socket.socket, uid: int) -> None:
        """Closes *sock*, of a client of *uid*, now or later. The client sees its end at once."""
        try:
            sock.shutdown(socket.SHUT_RDWR)  # after this nothing more arrives
            empty = read_to_descriptors(sock, self._buffer)
        except OSError:
            empty = False
        if empty:
            close_quietly(sock)
        elif not self._put_aside(sock, uid):
            self._closer.close((Handle(sock.detach(), uid),))

    def abandon(self) -> None:
        """In a forked child: our ends are the parent's."""
        for pair in self._pairs:
            pair.end.detach()

    def close(self) -> None:
        """Closes our ends."""
        close_quietly(*(pair.end for pair in self._pairs))

    def _put_aside(self, sock: socket.socket, uid: int) -> bool:
        """Has a pair of *uid* take *sock*; False if none does."""
        if not self._room:
            return False
        pair = self._last.get(uid)
        taken = (pair is not None and pair.take(sock)) or self._taken_by_new(sock, uid)
        self._room -= taken
        return taken

    def _taken_by_new(self, sock: socket.socket, uid: int) -> bool:
        try:
            end, other = socket.socketpair()
        except OSError:
            return False
        end.setblocking(False)
        pair = _Pair(end)
        try:
            self._poller.register(end.fileno(), 0, partial(self._on_closed, uid, pair))
        except OSError:  # ENOSPC, epoll_ctl(2)
            close_quietly(end, other)
            return False
        self._pairs[pair] = None
        self._last[uid] = pair
        taken = pair.take(sock)
        self._closer.lanes.put(uid, pair.seal)  # before the close, in the same lane
        self._closer.close((Handle(other.detach(), uid),))
        return taken

    def _on_closed(self, uid: int, pair: _Pair, events: int, now: float) -> None:
        """The other end is closed, and all that waited in it."""
        self._poller.unregister(pair.end.fileno())
        close_quietly(pair.end)
        self._room += pair.count
        del self._pairs[pair]
        if self._last.get(uid) is pair:
            del self._last[uid]
