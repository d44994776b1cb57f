"""Connections that carry descriptors beside the bytes, and Pipe, Listener and Client of them.

Over multiprocessing/connection.py of CPython 3.11 to 3.13: the classes derive from the package's
own and keep everything that they promise. What changes: a message may have descriptors (framing.py
has its form), `Pipe(duplex=False)` is a socket pair, too (a pipe carries none), large messages are
read into one buffer, and a connection is pickled through the transit of the pickle. Over a pipe or
TCP a connection does what the package's own does.

stock.py has the private names that are used.
"""

from __future__ import annotations

import io
import math
import os
import select
import socket
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TypeVar

from fdshare.errors import DescriptorLimit, InvalidArgument, NoTransit
from fdshare.kernel.plain_socket import WITHOUT_TIMEOUT, stream_pair
from fdshare.mp.channels.peek_level import AT_ONCE, PeekLevel
from fdshare.mp.channels.receiving import (
    marked,
    read_bytes,
    read_expected,
    read_message,
    read_without,
)
from fdshare.mp.channels.sending import send_now
from fdshare.mp.family import Family
from fdshare.mp.pickling.bundle import Arrived, Bundle, Encoded, Reduced, open_arrived
from fdshare.mp.pickling.bundle import loads as loads_envelope
from fdshare.mp.pickling.reducers import encode
from fdshare.mp.stock import Address, Duplicate, StockConnection, StockListener

__all__ = [
    "ClientFunction",
    "ConnectionMixin",
    "ListenerMixin",
    "PipeFunction",
    "make_client",
    "make_pipe",
    "turned_into",
]


C = TypeVar("C", bound="ConnectionMixin")


class _Channel(socket.socket):
    """The socket of a connection, which owns the descriptor from then on.

    When both are garbage, the socket may be collected first: it closes without a warning, and the
    connection finds it closed.
    """

    __slots__ = ()

    def __del__(self) -> None:
        if self.fileno() >= 0:
            self.close()


class ConnectionMixin(StockConnection):
    """A Connection that carries descriptors beside the bytes."""

    _family: ClassVar[Family]
    _socket: socket.socket | None = None
    _tried = False
    # True where several processes read from this socket, each under a lock: that a body was left
    # is then marked on the socket alone.
    _shared = False
    _announced = False
    # How many messages with descriptors came last, one after the other.
    _in_a_row = 0
    # Of a queue: it is shared with the other readers.
    _peek_level: PeekLevel | None = None

    def send(self, obj: Any) -> None:
        """Sends *obj* with its descriptors. It is safe to close *obj* after this call.

        Raises: what pickling raises; DescriptorLimit (ETOOMANYREFS): too many descriptors were in
        flight for 10 seconds.
        """
        self._check_closed()
        self._check_writable()
        sock = self._socket or self._open()
        if sock is None:
            super().send(obj)
            return
        _send(sock, encode(self._family, obj))

    def recv(self) -> Any:
        """The next object. The caller owns the result.

        Raises: EOFError; DescriptorLimit: at this process's limit; the object is still there, and
        comes with the next recv() once descriptors are free.
        """
        self._check_closed()
        self._check_readable()
        sock = self._socket or self._open()
        if sock is None:
            return super().recv()
        return self.decode(self.receive())

    def poll(self, timeout: float | None = 0.0) -> bool:
        """True if something can be read within *timeout* seconds; None: no limit."""
        self._check_closed()
        self._check_readable()
        return self._poll(timeout)

    def carrier(self) -> socket.socket:
        """The AF_UNIX socket below, borrowed from the connection. Raises: NoTransit: none."""
        sock = self._socket or self._open()
        if sock is None:
            raise NoTransit("a descriptor")
        return sock

    def send_message(self, message: Encoded) -> None:
        """Sends *message*, which is pickled already. Raises: as `send`."""
        self._check_closed()
        _send(self.carrier(), message)

    def receive(self) -> Arrived:
        """The next message, for `open_arrived`. Raises: as `recv`."""
        if self._handle is None:
            self._check_closed()
        sock = self._socket or self.carrier()
        shared = self._peek_level
        level = self._in_a_row > 1 if shared is None else shared.level()
        if level:
            expected = read_expected(sock)
            if expected is not None:
                if level != AT_ONCE:
                    self._count()
                return expected
        announced = marked(sock) if self._shared else self._announced
        try:
            message = read_message(sock, announced)
        except DescriptorLimit:
            self._announced = True
            raise
        if announced:
            self._announced = False
        if type(message) is not bytes:
            self._count()
        else:
            self._in_a_row = 0
            if level and shared is not None:
                shared.plain(sock)
        return message

    def _count(self) -> None:
        """One more message with descriptors came: after two, the next one is peeked at."""
        self._in_a_row += 1
        if self._in_a_row > 1 and self._peek_level is not None:
            self._peek_level.begin()

    def decode(self, message: Arrived) -> Any:
        """What is in a received message. The caller owns the result."""
        return open_arrived(message, self._family.loads)

    def receive_without(self, reason: BaseException) -> Any:
        """The message that was left at the limit, without its descriptors, which are lost.

        Bundles in it raise *reason* when they are opened.
        """
        data = self._without()
        if data is None:
            return self.decode(self.receive())
        return loads_envelope(self._family.loads, data, [], reason)

    def discard(self) -> None:
        """Drops the message that was left at the limit."""
        self._without()

    def _without(self) -> bytes | None:
        sock = self.carrier()
        announced = marked(sock) if self._shared else self._announced
        self._announced = False
        return read_without(sock, announced)

    def _open(self) -> socket.socket | None:
        """The socket below, if it carries descriptors."""
        if self._tried:
            return None
        try:
            # Without a family the kernel is asked for it: that is how a pipe is found out. It may
            # be non-blocking, as any other Connection: a send or a recv raises BlockingIOError.
            sock = _Channel(-1, socket.SOCK_STREAM | WITHOUT_TIMEOUT, 0, self._handle)
        except OSError:  # a pipe
            self._tried = True
            return None
        self._tried = True
        if sock.family != socket.AF_UNIX:
            sock.detach()
            return None
        if not WITHOUT_TIMEOUT and sock.gettimeout() is not None:
            sock.settimeout(None)
        if not self._shared:
            self._announced = marked(sock)
        self._socket = sock
        return sock

    def _send_bytes(self, buf: bytes | memoryview) -> None:
        sock = self._socket or self._open()
        if sock is None:
            super()._send_bytes(buf)
        else:
            _send(sock, Bundle(buf))

    def _recv_bytes(self, maxsize: int | None = None) -> io.BytesIO | None:
        sock = self._socket or self._open()
        if sock is None:
            return super()._recv_bytes(maxsize)
        announced = marked(sock) if self._shared else self._announced
        peeks = self._peek_level is not None and self._peek_level.level() > 0
        try:
            data = read_bytes(sock, announced, maxsize, peeks)
        except InvalidArgument:
            self._announced = not peeks
            raise
        if data is None:
            return None
        buffer = io.BytesIO(data)  # shares *data*, until one of them is changed
        buffer.seek(0, io.SEEK_END)  # recv_bytes_into() takes the length from there
        return buffer

    def _poll(self, timeout: float | None) -> bool:
        # wait([self]) makes a selector for it, which takes three times as long.
        poller = select.poll()
        poller.register(self.fileno(), select.POLLIN)
        # poll(2) takes a negative number for no limit; here that is None, and less than 0 is 0.
        limit = None if timeout is None else max(0, math.ceil(timeout * 1000))
        return bool(poller.poll(limit))

    def _close(self, _close: Callable[[int], None] = os.close) -> None:
        if self._socket is not None:
            self._socket.close()
        elif self._handle is not None:
            _close(self._handle)

    def __reduce__(self) -> Reduced:
        # Called only by a pickler that is neither ours nor patched by install().
        if not self._family.is_spawning:
            raise NoTransit("Connection")
        copy = self._family.reduction.DupFd(self.fileno())
        return _inherited, (type(self), copy, self.readable, self.writable)


def _send(sock: socket.socket, message: Encoded) -> None:
    rest = send_now(sock, message, 0)
    if rest is not None:
        rest.push_patiently(sock)


def _inherited(
    cls: type[ConnectionMixin], copy: Duplicate, readable: bool, writable: bool
) -> ConnectionMixin:
    return cls(copy.detach(), readable, writable)


class PipeFunction(Protocol):
    """Makes two connections, the ends of one socket pair: (reader, writer) where not *duplex*.

    The caller owns the result.
    """

    def __call__(self, duplex: bool = True) -> tuple[ConnectionMixin, ConnectionMixin]: ...


def make_pipe(connection: type[ConnectionMixin]) -> PipeFunction:
    """The Pipe that makes two of the class *connection*."""

    def Pipe(duplex: bool = True) -> tuple[ConnectionMixin, ConnectionMixin]:
        left, right = stream_pair()
        return (
            connection(left.detach(), writable=duplex),
            connection(right.detach(), readable=duplex),
        )

    return Pipe


class ListenerMixin(StockListener):
    """A Listener whose accepted connections carry descriptors, where its address is a path."""

    _connection: ClassVar[type[ConnectionMixin]]

    def accept(self) -> ConnectionMixin:
        """A connection to the next client. The caller owns the result."""
        return turned_into(self._connection, super().accept())


class ClientFunction(Protocol):
    """Makes a connection to the address of a Listener. The caller owns the result."""

    def __call__(
        self, address: Address, family: str | None = None, authkey: bytes | None = None
    ) -> ConnectionMixin: ...


def make_client(family: Family, connection: type[ConnectionMixin]) -> ClientFunction:
    """The Client that makes connections of the class *connection*."""

    def Client(
        address: Address, family: str | None = None, authkey: bytes | None = None
    ) -> ConnectionMixin:
        return turned_into(connection, stock(address, family, authkey))

    stock = family.connection.Client
    return Client


def turned_into(cls: type[C], connection: StockConnection) -> C:
    """A connection of *cls* with the descriptor of *connection*, which has none then."""
    handle, connection._handle = connection._handle, None
    assert handle is not None
    return cls(handle, connection.readable, connection.writable)
