"""Connections that carry descriptors beside the bytes, and Pipe, Listener and Client of them.

Over multiprocessing/connection.py of CPython 3.11 to 3.13: the classes derive from the package's
own and keep everything that they promise. What changes: a message may have descriptors (framing.py
has its form), `Pipe(duplex=False)` is a socket pair, too (a pipe carries none), large messages are
read into one buffer, and a connection is pickled through the transit of the pickle. Over a pipe or
TCP a connection does what the package's own does.

stock.py has the private names that are used.
"""

from __future__ import annotations

import errno
import io
import math
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from queue import Empty
from typing import Any, ClassVar, Protocol, TypeVar

from fdshare.errors import DescriptorLimit, NoTransit
from fdshare.kernel import system
from fdshare.kernel.at_fork import forget_after_fork
from fdshare.kernel.plain_socket import WITHOUT_TIMEOUT, stream_pair
from fdshare.mp.channels.peek_level import PeekLevel
from fdshare.mp.channels.receiving import MessageReceiver
from fdshare.mp.channels.sender import Sender
from fdshare.mp.family import Family
from fdshare.mp.pickling.bundle import Arrived, Bundle, Reduced, open_arrived
from fdshare.mp.pickling.memfd_cache import MemfdCache
from fdshare.mp.pickling.reducers import encode
from fdshare.mp.stock import Address, Duplicate, RawLock, StockConnection, StockListener

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


class _View(socket.socket):
    """A socket object on the descriptor of a connection, which stays the connection's."""

    __slots__ = ()

    def __del__(self) -> None:
        pass  # the class above would close


class ConnectionMixin(StockConnection):
    """A Connection that carries descriptors beside the bytes."""

    _family: ClassVar[Family]
    _socket: _View | None = None
    _is_foreign = False  # a pipe, or TCP
    # None unless the other end is known to be one of ours: Pipe has made both.
    _cache: MemfdCache | None = None
    # True where several processes read from this socket, each under a lock: that a body was left
    # is then marked on the socket alone.
    _shared = False
    # Of a queue: it is shared with the other readers.
    _peek_level: PeekLevel | None = None
    _sender: Sender | None = None
    _receiver: MessageReceiver | None = None
    _locking: Iterator[bool] | None = None  # each step acquires the lock that `_take` is given

    def send(self, obj: Any) -> None:
        """Sends *obj* with its descriptors. It is safe to close *obj* after this call.

        Raises: what pickling raises; DescriptorLimit (ETOOMANYREFS): too many descriptors were in
        flight for 10 seconds; BlockingIOError: the program has made the connection non-blocking.
        Whatever is raised, none of *obj* is sent; or all of it, and what is missing with the next
        send(), or close() if that takes no time.
        """
        self._check_closed()
        self._check_writable()
        if self._socket is None and self._open() is None:
            super().send(obj)
            return
        (self._sender or self._open_sender()).send(encode(self._family, obj, self._cache))

    def recv(self) -> Any:
        """The next object. The caller owns the result.

        Raises: EOFError; DescriptorLimit: at this process's limit; the object is still there, and
        comes with the next recv() once descriptors are free, unless a part of it was made already
        when a module for another part could not be imported. If a signal's handler raises, the
        object comes with the next recv(), unless it was being unpickled by code in Python.
        """
        self._check_closed()
        self._check_readable()
        if self._socket is None and self._open() is None:
            return super().recv()
        return self._take()

    def _take(
        self,
        lock: RawLock | None = None,
        block: bool = True,
        timeout: float | None = None,
        received: Callable[[], object] | None = None,
    ) -> Any:
        """The next object, received under *lock*; *received* is called once for each message, under
        it too. *block* and *timeout* are those of `Queue.get`. The caller owns the result.

        Raises: as `recv`; Empty.
        """
        receiver = self._receiver or self._open_receiver()
        taken: list[Arrived | None] = [None]  # what the next call hands out if this one raises
        try:
            if receiver.given_back:
                taken[0] = receiver.given_back[0]
                del receiver.given_back[0]
            elif lock is None:
                while receiver.message is None:
                    receiver.fetch()
                taken[0], receiver.message = receiver.message, None
            else:
                self._take_locked(taken, lock, block, timeout, received)
            return self._load_taken(taken)
        except BaseException:
            if taken[0] is not None:
                receiver.given_back.append(taken[0])
            raise

    def _take_locked(
        self,
        taken: list[Arrived | None],
        lock: RawLock,
        block: bool,
        timeout: float | None,
        received: Callable[[], object] | None,
    ) -> None:
        """Stores the next message in ``taken[0]``, without a call after it left the receiver. The
        rest is as in `_take`.

        Raises: as `MessageReceiver.fetch`; Empty.
        """
        receiver = self._receiver or self._open_receiver()
        locked = False
        waits = block and timeout is None
        deadline = 0.0 if waits else time.monotonic() + (timeout or 0.0)
        try:
            # Stored at once, as in kernel/ancillary.py.
            if receiver.holds_lock:
                locked, receiver.holds_lock = True, False
            elif waits:
                for locked in self._locking or self._open_locking(lock):  # noqa: B007
                    break
            else:
                (locked,) = map(lock.acquire, (block,), (timeout,))
            if not locked:
                raise Empty
            while receiver.message is None:
                if not waits and not self._poll(deadline - time.monotonic() if block else 0.0):
                    raise Empty
                receiver.fetch()
            taken[0], receiver.message = receiver.message, None
            if received is not None:
                received()
        finally:
            # A handler may raise in any function in Python: none is called before the lock is free.
            if locked:
                if receiver.parts:
                    receiver.holds_lock = True
                else:
                    lock.release()

    def _load_taken(self, taken: list[Arrived | None]) -> Any:
        """The object in the message ``taken[0]``, which is None as soon as the message is gone:
        while a bundle is loaded, and after an error of unpickling, unless the bundle can be loaded
        again."""
        message, bundle = taken[0], None
        assert message is not None
        if type(message) is tuple:
            return message[0]
        if isinstance(message, Bundle):
            bundle, loading = message, map(message.load, (self._family.loads,))
            message = taken[0] = None  # without a call before it is loaded
        else:
            loading = map(self._family.loads, (message,))
        try:
            (made,) = loading
        except Exception as error:  # not one such as Ctrl-C
            taken[0] = None
            if type(error) is DescriptorLimit and bundle is not None and bundle.numbers:
                taken[0] = bundle
            raise
        return made

    def poll(self, timeout: float | None = 0.0) -> bool:
        """True if something can be read within *timeout* seconds; None: no limit."""
        self._check_closed()
        self._check_readable()
        return self._poll(timeout)

    def _carrier(self) -> socket.socket:
        """The AF_UNIX socket below, borrowed from the connection. Raises: NoTransit: none."""
        sock = self._socket or self._open()
        if sock is None:
            raise NoTransit("a descriptor")
        return sock

    def _own_sender(self) -> Sender:
        """What sends on `_carrier`. Raises: as that."""
        return self._sender or self._open_sender()

    def _receive(self) -> Arrived:
        """The next message, for `open_arrived`. Raises: as `recv`."""
        if self._handle is None:
            self._check_closed()
        receiver = self._receiver or self._open_receiver()
        if receiver.given_back:
            return receiver.given_back.pop(0)
        while receiver.message is None:
            receiver.fetch()
        message, receiver.message = receiver.message, None
        return message

    def _decode(self, message: Arrived) -> Any:
        """What is in a received message. The caller owns the result."""
        return open_arrived(message, self._family.loads)

    def _receive_without(self, reason: BaseException) -> Arrived:
        """The message that was left at the limit, without its descriptors, which are lost: *reason*
        is raised when it is opened."""
        data = self._open_receiver().receive_without()
        if data is None:
            return self._receive()
        message = Bundle(data)
        message.missing = reason
        return message

    def _discard(self) -> None:
        """Drops the message that was left at the limit."""
        receiver = self._open_receiver()
        if receiver.given_back:
            del receiver.given_back[-1]
        else:
            receiver.receive_without()

    def _after_fork(self) -> None:
        """In a forked child: what was begun to send or to receive is the parent's."""
        sender: Sender | None = vars(self).pop("_sender", None)
        if sender is not None:
            sender.forget()
        receiver: MessageReceiver | None = vars(self).pop("_receiver", None)
        if receiver is not None:
            receiver.close()

    def _open(self) -> socket.socket | None:
        """The socket below, if it carries descriptors."""
        if self._is_foreign:
            return None
        try:
            # Without a family the kernel is asked for it: that is how a pipe is found out. It may
            # be non-blocking, as any other Connection: a send or a recv raises BlockingIOError.
            view = _View(-1, socket.SOCK_STREAM | WITHOUT_TIMEOUT, 0, self.fileno())
        except OSError as error:
            if error.errno != errno.ENOTSOCK:
                raise
            self._is_foreign = True
            return None
        if not WITHOUT_TIMEOUT and view.gettimeout() is not None:
            view.settimeout(None)
        if view.family != socket.AF_UNIX:
            self._is_foreign = True
            return None
        if _has_no_name(view):
            self._open_cache()
        # In one step: there must not be two, whatever comes in between.
        opened: _View = vars(self).setdefault("_socket", view)
        return opened

    def _open_cache(self) -> None:
        if system.HAS_MEMFD:
            vars(self).setdefault("_cache", MemfdCache())

    def _open_locking(self, lock: RawLock) -> Iterator[bool]:
        self._locking = locking = iter(lock.acquire, 2)
        return locking

    def _open_sender(self) -> Sender:
        forget_after_fork(self)
        sender: Sender = vars(self).setdefault("_sender", Sender(self._carrier()))
        return sender

    def _open_receiver(self) -> MessageReceiver:
        if self._receiver is not None:
            return self._receiver
        forget_after_fork(self)
        new = MessageReceiver(self._carrier(), self._shared, self._peek_level)
        receiver: MessageReceiver = vars(self).setdefault("_receiver", new)
        return receiver

    def _send_bytes(self, buf: bytes | memoryview) -> None:
        if self._socket is None and self._open() is None:
            super()._send_bytes(buf)
        else:
            self._own_sender().send(Bundle(buf))

    def _recv_bytes(self, maxsize: int | None = None) -> io.BytesIO | None:
        if self._socket is None and self._open() is None:
            return super()._recv_bytes(maxsize)
        data = self._open_receiver().receive_bytes(maxsize)
        if data is None:
            return None
        buffer = io.BytesIO(data)  # shares *data*, until one of them is changed
        buffer.seek(0, io.SEEK_END)  # recv_bytes_into() takes the length from there
        return buffer

    def _poll(self, timeout: float | None) -> bool:
        receiver = self._receiver
        if receiver is not None and (receiver.given_back or receiver.message is not None):
            return True
        # wait([self]) makes a selector for it, which takes three times as long.
        poller = select.poll()
        poller.register(self.fileno(), select.POLLIN)
        # poll(2) takes a negative number for no limit; here that is None, and less than 0 is 0.
        limit = None if timeout is None else max(0, math.ceil(timeout * 1000))
        return bool(poller.poll(limit))

    def _close(self, _close: Callable[[int], None] = os.close) -> None:
        if self._sender is not None:
            self._sender.close()
        if self._receiver is not None:
            self._receiver.close()
        self._cache = None
        if self._handle is not None:
            _close(self._handle)
        if self._socket is not None:
            self._socket.detach()  # its number may soon be that of another descriptor

    def __reduce__(self) -> Reduced:
        # Called only by a pickler that is neither ours nor patched by install().
        if not self._family.is_spawning:
            raise NoTransit("Connection")
        copy = self._family.reduction.DupFd(self.fileno())
        return _inherited, (type(self), copy, self.readable, self.writable)


def _has_no_name(sock: socket.socket) -> bool:
    """True if *sock* is of socketpair(2), and not one that was connected to a Listener's."""
    try:
        return not sock.getsockname() and not sock.getpeername()
    except OSError:  # the other end is closed
        return False


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
