"""The private server of a process tree: it holds descriptors until they are taken, and ends when
nobody is connected and nothing is held.

A parked descriptor needs no name, policy, listing or keeper, but whoever puts a socket into a queue
pays each time that one process wakes another. So this is not the rendezvous server: protocol.py has
its few packets, one system call each. Only processes of its own uid may connect.

Everything held has a time to live, so the server of a tree whose processes are all dead ends, too.
"""

from __future__ import annotations

import heapq
import os
import resource
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from fdshare.errors import DescriptorLimit, FdshareError
from fdshare.kernel import system
from fdshare.kernel.ancillary import send_message
from fdshare.kernel.credentials import peer_credentials
from fdshare.kernel.imports import import_all
from fdshare.kernel.path_lock import Inode
from fdshare.parking.private_address import is_ours, leave, remove_dead
from fdshare.parking.protocol import (
    CREDIT,
    FULL,
    KEY_SIZE,
    ONE_WAY,
    PUT,
    PUT_SIZE,
    READ_INTERVAL,
    REMOVE,
    TAKE,
    TERMS,
    UNKNOWN,
    USAGE,
)
from fdshare.server.loop import closing
from fdshare.server.loop.closing import Closer, Handle, receive_handles
from fdshare.server.loop.lanes import Lanes
from fdshare.server.loop.poller import READ, Poller

__all__ = ["serve"]

_PACKET: Final = 256  # bytes, more than any request has
_KEY: Final = slice(1, 1 + KEY_SIZE)
_READ_AHEAD: Final = 2  # puts that are read before anybody asks for them
_MOST_CREDIT: Final = 32  # descriptors of one client; they count as in flight until they are read
_NEVER: Final = float("inf")
_BACKLOG: Final = 4096
_LINGER: Final = 1.0  # seconds that it waits for another client after the last has gone
_RETRY: Final = 0.005  # seconds until what found too many descriptors in flight is tried again
_RESERVE: Final = 16  # descriptors for the listener, the epoll, and those that are being received


class _Stored:
    """What is held under one key. *uses*: how often it may still be taken."""

    __slots__ = ("expires", "fds", "handles", "uses")

    def __init__(self, handles: list[Handle], uses: int, expires: float) -> None:
        self.handles = handles
        self.fds = [handle.fd for handle in handles]
        self.uses = uses
        self.expires = expires


class _Client:
    """One connection, and its one-way socket, which may bring *credit* descriptors more."""

    __slots__ = ("credit", "one_way", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.one_way: socket.socket | None = None
        self.credit = 0


class _Server:
    """The clients, and what is held for them."""

    def __init__(self, listeners: Sequence[socket.socket], nofile: int) -> None:
        self.listeners = listeners
        # Of *nofile* descriptors five eighths are for what is held, an eighth for what may be put
        # on credit beyond that, a quarter for the clients' sockets, and the reserve is our own.
        self.limit = max(nofile * 5 // 8 - _RESERVE, 1)
        self.most_credit = nofile // 8
        self.most_sockets = nofile // 4
        self.sockets = 0  # of clients: connections and one-way sockets
        self.count = 0  # descriptors held
        self.credit = 0  # that all clients have together
        self.stored: dict[bytes, _Stored] = {}
        self.clients: dict[_Client, None] = {}  # in the order of their last request
        self.deadlines: list[tuple[float, bytes]] = []
        self.waiting: list[tuple[_Client, bytes]] = []  # for fewer descriptors in flight
        self.poller = Poller()
        self.one_way = Poller()  # of one-way sockets; asked, never waited for
        # Ours may be the last copy of what is let go of, and its close may block.
        self.uid = os.geteuid()
        self.closer = Closer(Lanes(), lambda: None, alone=True)
        self.buffer = bytearray(_PACKET)
        self.now = time.monotonic()  # when this turn of the loop began
        self.all_read = self.now  # when all one-way sockets were read
        self.gave = False  # something in this turn

    # The loop

    def run(self) -> None:
        """Serves until no client is connected and nothing is held."""
        for listener in self.listeners:
            self.poller.register(listener.fileno(), READ, listener)
        while True:
            timeout = self._timeout()
            ready = self.poller.wait(timeout)
            self.now = time.monotonic()
            for key, _ in ready:
                if type(key) is _Client:
                    self._serve(key)
                else:
                    assert isinstance(key, socket.socket)
                    self._accept(key)
            if self.gave:
                self._read_ahead()
            if self.now >= self.all_read + READ_INTERVAL:
                self._read_one_way_sockets()
            if self.deadlines and self.deadlines[0][0] <= self.now:
                self._expire()
            if self.waiting:
                self._try_again()
            if not ready and timeout == _LINGER and self._is_idle():
                return

    def _is_idle(self) -> bool:
        return not self.clients and not self.stored

    def _timeout(self) -> float | None:
        if self.waiting:
            return _RETRY
        if self._is_idle():
            return _LINGER
        due = self.all_read + READ_INTERVAL if self.clients else _NEVER
        if self.deadlines:
            due = min(due, self.deadlines[0][0])
        return max(due - self.now, 0.0)

    def _expire(self) -> None:
        while self.deadlines and self.deadlines[0][0] <= self.now:
            _, key = heapq.heappop(self.deadlines)
            stored = self.stored.get(key)
            if stored is not None and stored.expires <= self.now:
                del self.stored[key]
                self.count -= len(stored.fds)
                self.closer.close(stored.handles)

    # Connections

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError:  # EMFILE: the client that was idle longest has to connect again
            if self.clients:
                self._drop(next(iter(self.clients)))
            else:
                time.sleep(_RETRY)
            return
        uid = closing.UNKNOWN
        try:
            who = peer_credentials(sock)
            uid = who.uid
            sock.setblocking(False)
            if not is_ours(who):
                self._close(sock, uid)
                return
            client = _Client(sock)
            self.poller.register(sock.fileno(), READ, client)
        except OSError:  # it has gone again, or the poller has no room for it
            self._close(sock, uid)
            return
        self.clients[client] = None
        self._count_socket(client)

    def _count_socket(self, client: _Client) -> None:
        """Counts one more of *client*, and drops those that have been idle for longest if there are
        too many: what is put on credit has to find room."""
        self.sockets += 1
        while self.sockets > self.most_sockets and (idle := next(iter(self.clients))) is not client:
            self._drop(idle)

    def _drop(self, client: _Client) -> None:
        if self.clients.pop(client, self) is self:
            return
        self.poller.unregister(client.sock.fileno())
        self._close(client.sock, self.uid)
        self.sockets -= 1
        if client.one_way is not None and system.LINUX:  # elsewhere it may drop what is unread
            # Nothing is put any more, so nothing is put between the last read and the close.
            with suppress(OSError):  # it is no UNIX socket
                client.one_way.shutdown(socket.SHUT_RD)
        self._read_one_way(client)
        self._close_one_way(client)
        self.credit -= client.credit
        self.waiting = [(other, key) for other, key in self.waiting if other is not client]

    def _close(self, sock: socket.socket, uid: int) -> None:
        """Closes a socket of *uid*, in which something may be unread."""
        self.closer.close((Handle(sock.detach(), uid),))

    # One-way sockets

    def _read_one_way_sockets(self, wanted: bytes | None = None) -> None:
        """Reads all that was put there until now, or until *wanted* is found."""
        if wanted is None:
            self.all_read = self.now
        while ready := self.one_way.wait(0):
            for client, _ in ready:
                assert isinstance(client, _Client)
                self._read_one_way(client, wanted)
                if wanted in self.stored:
                    return

    def _read_ahead(self) -> None:
        """Reads a little while the taker of this turn is busy with what it took: what was put next
        is likely to be asked for next."""
        self.gave = False
        for client, _ in self.one_way.wait(0):
            assert isinstance(client, _Client)
            self._read_one_way(client, most=_READ_AHEAD)
            return

    def _read_one_way(
        self, client: _Client, wanted: bytes | None = None, most: int | None = None
    ) -> None:
        while client.one_way is not None and wanted not in self.stored and most != 0:
            most = most and most - 1
            try:
                size, handles, lost = receive_handles(client.one_way, self.buffer, self.uid)
            except BlockingIOError:
                return
            except OSError:
                self._close_one_way(client)
                return
            if size != PUT_SIZE or not self._put(client, handles, lost, client.credit):
                self.closer.close(handles)
            if not size:  # its other end is closed: the client leaves
                self._close_one_way(client)

    def _close_one_way(self, client: _Client) -> None:
        if client.one_way is not None:
            self.one_way.unregister(client.one_way.fileno())
            self._close(client.one_way, self.uid)
            client.one_way = None
            self.sockets -= 1

    # Requests

    def _serve(self, client: _Client) -> None:
        if client not in self.clients:
            return  # dropped in this very turn
        try:
            size, handles, lost = receive_handles(client.sock, self.buffer, self.uid)
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)
            return
        del self.clients[client]
        self.clients[client] = None  # to the end of the order
        try:
            if not self._answer(client, size, handles, lost):
                self._drop(client)
        except Exception:
            # It has gone, or does not read its answers. Whatever else it is ends this client alone:
            # nobody else holds what is held here for the others.
            self._drop(client)

    def _answer(
        self, client: _Client, size: int, handles: list[Handle], lost: FdshareError | None
    ) -> bool:
        """Carries a request out; False at the end of the stream, and for what is no request."""
        verb = self.buffer[:1] if size else b""
        if verb == PUT and size == PUT_SIZE and (handles or lost):
            return self._put_and_answer(client, handles, lost)
        if verb == ONE_WAY and size == 1 and len(handles) == 1 and client.one_way is None:
            return self._open_one_way(client, handles[0])
        self.closer.close(handles)
        if verb not in (TAKE, REMOVE) or size != 1 + KEY_SIZE:
            return False
        key = bytes(self.buffer[_KEY])
        if key not in self.stored:
            self._read_one_way_sockets(key)
        if verb == TAKE:
            self._give(client, key)
        else:
            self._remove(key)
            client.sock.send(REMOVE)
        return True

    def _open_one_way(self, client: _Client, handle: Handle) -> bool:
        try:
            client.one_way = socket.socket(fileno=handle.fd)
        except OSError:
            self.closer.close((handle,))
            return False
        self._count_socket(client)
        client.one_way.setblocking(False)
        self.one_way.register(client.one_way.fileno(), READ, client)
        client.sock.send(ONE_WAY)
        return True

    def _put_and_answer(
        self, client: _Client, handles: list[Handle], lost: FdshareError | None
    ) -> bool:
        request = bytes(self.buffer[:PUT_SIZE])
        self._read_one_way(client)  # what it put before
        self.buffer[:PUT_SIZE] = request
        self.credit -= client.credit
        client.credit = 0
        used = self.count + self.closer.left(self.uid)  # a close that hangs keeps its number
        if not self._put(client, handles, lost, self.limit - used):
            self.closer.close(handles)
            client.sock.send(FULL + USAGE.pack(self.limit, used))
            return True
        client.credit = min((self.most_credit - self.credit) // 4, _MOST_CREDIT)
        self.credit += client.credit
        client.sock.send(PUT + CREDIT.pack(client.credit))
        return True

    def _put(
        self, client: _Client, handles: list[Handle], lost: FdshareError | None, most: int
    ) -> bool:
        """Holds *handles* as the buffer says; False where it cannot: they are the caller's."""
        seconds, uses = TERMS.unpack_from(self.buffer, 1 + KEY_SIZE)
        count = len(handles)
        key = bytes(self.buffer[_KEY])
        if (former := self.stored.get(key)) is not None:  # the answer to a first attempt was lost
            most += len(former.fds)
        if lost is not None or not 0 < count <= most or not 0 < seconds < _NEVER:
            return False
        self._remove(key)
        used = min(count, client.credit)
        client.credit -= used
        self.credit -= used
        expires = self.now + seconds
        self.stored[key] = _Stored(handles, uses, expires)
        self.count += count
        heapq.heappush(self.deadlines, (expires, key))
        if len(self.deadlines) > 2 * len(self.stored) + 64:
            self.deadlines = [(stored.expires, key) for key, stored in self.stored.items()]
            heapq.heapify(self.deadlines)
        return True

    def _give(self, client: _Client, key: bytes) -> None:
        stored = self.stored.get(key)
        if stored is None:
            client.sock.send(UNKNOWN)
            return
        try:
            send_message(client.sock, (TAKE,), stored.fds)
        except DescriptorLimit:  # too many in flight: they will be read soon
            self._read_one_way_sockets()
            self.waiting.append((client, key))
            return
        self.gave = True
        stored.uses -= 1
        if stored.uses <= 0:
            self._remove(key)

    def _try_again(self) -> None:
        waiting, self.waiting = self.waiting, []
        for client, key in waiting:
            try:
                self._give(client, key)
            except OSError:
                self._drop(client)

    def _remove(self, key: bytes) -> None:
        stored = self.stored.pop(key, None)
        if stored is not None:
            self.count -= len(stored.fds)
            self.closer.close(stored.handles)


def serve(fds: Sequence[int], address: str, inode: Inode | None = None) -> None:
    """Serves on the listeners *fds*, which it takes over, until nobody needs it; then removes the
    path *address* if that is *inode*."""
    import_all()
    _leave_starter()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    listeners = [socket.socket(fileno=fd) for fd in fds]
    for listener in listeners:
        listener.set_inheritable(False)
        listener.setblocking(False)
        # Once more, for SO_PEERCRED names whoever called listen(2) last: the starter may be gone.
        listener.listen(_BACKLOG)
    remove_dead(address)
    _Server(listeners, hard).run()
    leave(address, inode)
    for listener in listeners:
        listener.close()


def _leave_starter() -> None:
    """Keeps nothing of the starter's: its standard streams may be pipes that somebody reads to the
    end, its working directory a mount that somebody wants to unmount."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    if null > 2:
        os.close(null)
    os.chdir("/")
