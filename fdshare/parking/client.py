"""The private server of a process tree, as its processes see it: an address, and a way to start it.

The first process that needs an address makes one up; its children inherit it, or learn it from what
they are sent. A process that finds nobody there binds it and has a server exec'd: of two that try
at once one is let through, and the other one's connect(2) waits in the same backlog. The
server is no child of the process that starts it: multiprocessing's daemons may have none, and no
wait(2) of the program finds it.

parking/server.py is what runs there, private_address.py says where; protocol.py has the packets.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, ParamSpec, TypeVar

from fdshare.errors import (
    AlreadyTaken,
    DescriptorLimit,
    DescriptorRefused,
    FdshareError,
    NoServer,
    ServerGone,
    ServerTimeout,
    UnsupportedPlatform,
    UntrustedServer,
)
from fdshare.kernel import system
from fdshare.kernel.ancillary import MAX_DESCRIPTORS, peek_descriptors, send_message
from fdshare.kernel.at_fork import forget_after_fork
from fdshare.kernel.descriptor import Descriptor
from fdshare.kernel.descriptor_limit import as_limit, is_descriptor_limit
from fdshare.kernel.finaliser import finaliser
from fdshare.kernel.plain_socket import above_standard, stream_pair
from fdshare.kernel.process_limit import why_not_forked
from fdshare.kernel.socket_wait import FIRST_WAIT, wait_readable
from fdshare.parking.private_address import connect_private, leave, listen_private
from fdshare.parking.protocol import (
    CREDIT,
    FULL,
    KEY_SIZE,
    ONE_WAY,
    PUT,
    READ_INTERVAL,
    REMOVE,
    TAKE,
    USAGE,
    put_packet,
)

__all__ = ["PrivateServer"]

T = TypeVar("T")
P = ParamSpec("P")

_TIMEOUT: Final = 30  # seconds that the server gets to answer; its start is in the first answer
_TIMEVAL: Final = struct.pack("@ll", _TIMEOUT, 0)  # to send; nothing waits long for that
_ATTEMPTS: Final = 4  # a server may end while we connect
_IDLE: Final = 4  # idle connections at most
_ANSWER: Final = 16  # bytes, more than any answer has
_PAUSE: Final = 0.005  # seconds, before another try
_TRIES_IN_FLIGHT: Final = 500
_NO_KEY: Final = REMOVE + bytes(KEY_SIZE)  # a request for a key that nobody has


class _Connection:
    """One connection, and its one-way socket, on which *credit* descriptors may be put."""

    __slots__ = ("credit", "one_way", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.one_way: socket.socket | None = None
        self.credit = 0

    def close(self) -> None:
        self.sock.close()
        if self.one_way is not None:
            self.one_way.close()

    def answer(self) -> bytes:
        """The next answer; b"" at the end. Raises: BlockingIOError: none came in time; OSError."""
        return self.in_time(self.sock.recv, _ANSWER)

    def in_time(self, read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What *read* of this socket returns. Raises: as `answer`."""
        try:
            return read(*args, **kwargs)
        except BlockingIOError:  # SO_RCVTIMEO has passed
            if not wait_readable(self.sock, time.monotonic() + _TIMEOUT):
                raise
        return read(*args, **kwargs)

    def open_one_way(self) -> socket.socket:
        """The one-way socket, which stays the connection's. Raises: DescriptorLimit: none is free
        for it, or too many are in flight; ConnectionResetError: the server has ended it."""
        try:
            ours, theirs = stream_pair(socket.SOCK_SEQPACKET)
        except OSError as error:
            raise as_limit(error) from None
        with theirs:
            try:
                send_message(self.sock, (ONE_WAY,), [theirs.fileno()])
            except BaseException:
                ours.close()
                raise
        self.one_way = ours
        if not self.answer():  # it may be closed with what is put there
            raise ConnectionResetError
        return ours


class PrivateServer:
    """The ParkingServer at *address*, started when it is needed."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._renew()
        forget_after_fork(self)

    def _renew(self) -> list[_Connection]:
        """Forgets its connections, and returns them."""
        former = [*self._idle, *self._unread.values()] if hasattr(self, "_idle") else []
        # Many threads append and pop; each is atomic.
        self._idle: list[_Connection] = []
        self._unread: dict[bytes, _Connection] = {}
        return former

    def check(self) -> None:
        """Returns once it runs, and is ours. Raises: UntrustedServer, UnsupportedPlatform."""
        self._give_back(self._borrow(start=True))

    def put(self, key: bytes, fds: Sequence[int], ttl: float, uses: int) -> None:
        """When this returns, the server has copies of *fds* (1 to 253), or they are in the kernel
        on their way to it; for *ttl* seconds.

        *fds* are borrowed for the call. Raises: DescriptorLimit: the server's, or of descriptors in
        flight; ServerGone, ServerTimeout; OSError of sendmsg(2).
        """
        packet = put_packet(key, ttl, uses)
        for _ in range(_ATTEMPTS):
            connection = self._borrow(start=True)
            try:
                if (
                    len(fds) <= connection.credit
                    and ttl > READ_INTERVAL
                    and self._put_one_way(connection, packet, fds)
                ):
                    return
                self._send(connection, packet, fds)
                answer = connection.answer()
            except OSError as error:
                answer = self._no_answer(connection, error)
            if self._has_put(connection, answer):
                return
        raise ServerGone(self.address, "it ended again and again")

    def _put_one_way(self, connection: _Connection, packet: bytes, fds: Sequence[int]) -> bool:
        """Puts it where the server reads it when somebody asks for it; False where it cannot."""
        try:
            one_way = connection.one_way or connection.open_one_way()
            send_message(one_way, (packet,), fds)
        except DescriptorLimit:
            # A put with an answer needs no descriptor of ours, and for it the server makes room
            # where too many are in flight.
            return False
        connection.credit -= len(fds)
        self._give_back(connection)
        return True

    def _send(self, connection: _Connection, packet: bytes, fds: Sequence[int]) -> None:
        """Raises: DescriptorLimit: too many descriptors of this user stay in flight."""
        for _ in range(_TRIES_IN_FLIGHT):
            try:
                send_message(connection.sock, (packet,), fds)
                return
            except DescriptorLimit:
                # Asked for what it does not have, the server reads all one-way sockets.
                connection.sock.send(_NO_KEY, system.NOSIGNAL)
                if not connection.answer():
                    raise ConnectionResetError from None
                time.sleep(_PAUSE)
        send_message(connection.sock, (packet,), fds)

    def _has_put(self, connection: _Connection, answer: bytes) -> bool:
        if not answer:
            self._drop(connection)
            return False
        connection.credit = CREDIT.unpack_from(answer, 1)[0] if answer[:1] == PUT else 0
        self._give_back(connection)
        if answer[:1] == FULL:
            limit, used = USAGE.unpack_from(answer, 1)
            advice = "load what was sent, or raise it"
            raise DescriptorLimit(errno.EMFILE, "RLIMIT_NOFILE", limit, used, "server", advice)
        return True

    def take(self, key: bytes) -> list[Descriptor]:
        """What was put under *key*. The caller owns the result.

        Raises: AlreadyTaken; UntrustedServer: another user's; DescriptorLimit: of this process, and
        it can be taken again; DescriptorRefused.
        """
        for _ in range(_ATTEMPTS):
            connection = self._unread.pop(key, None)
            try:
                if connection is None:
                    connection = self._borrow(start=False)
                    connection.sock.send(TAKE + key, system.NOSIGNAL)
                # Looked at first: the kernel drops those for which no number is free here.
                descriptors = connection.in_time(peek_descriptors, connection.sock, MAX_DESCRIPTORS)
                answer = connection.answer()
            except NoServer:
                break
            except OSError as error:
                if connection is None:
                    raise
                if isinstance(error, DescriptorLimit):
                    self._unread[key] = connection
                    raise
                if isinstance(error, DescriptorRefused):
                    self._drop(connection)
                    raise
                answer = self._no_answer(connection, error)
            if answer:
                self._give_back(connection)
                if answer == TAKE:
                    return descriptors
                break
            self._drop(connection)
        raise AlreadyTaken(key.hex())

    def take_back(self, key: bytes) -> None:
        """Nothing is under *key* any more. Raises: NoServer, ServerGone, ServerTimeout,
        UntrustedServer."""
        for _ in range(_ATTEMPTS):
            connection = self._borrow(start=False)
            try:
                connection.sock.send(REMOVE + key, system.NOSIGNAL)
                answer = connection.answer()
            except OSError as error:
                answer = self._no_answer(connection, error)
            if answer:
                self._give_back(connection)
                return
            self._drop(connection)
        raise ServerGone(self.address, "it ended again and again")

    def close(self) -> None:
        """Closes this process's connections."""
        for connection in self._renew():
            connection.close()

    def _after_fork(self) -> None:
        """In the child: closes its copies of the parent's connections."""
        self.close()

    @finaliser
    def __del__(self) -> None:
        if hasattr(self, "_unread"):
            self.close()

    # Connections

    def _no_answer(self, connection: _Connection, error: OSError) -> bytes:
        """b"", as at the end of a stream, where the server dropped it for being idle or has ended:
        another connection may be answered. Raises: ServerTimeout; *error*, if it is none of these.
        """
        if isinstance(error, BrokenPipeError | ConnectionResetError):
            return b""
        connection.close()
        if isinstance(error, BlockingIOError):  # none came in time
            raise ServerTimeout(self.address, _TIMEOUT) from None
        raise as_limit(error)

    def _drop(self, connection: _Connection) -> None:
        """Closes a connection that has ended, and those that are idle: they are likely to have
        ended, too, and each would cost one of the few tries."""
        connection.close()
        with suppress(IndexError):
            while True:
                self._idle.pop().close()

    def _borrow(self, start: bool) -> _Connection:
        try:
            return self._idle.pop()
        except IndexError:
            pass
        try:
            return _Connection(self._connect(start))
        except OSError as error:
            if is_descriptor_limit(error):
                raise as_limit(error) from None
            raise

    def _give_back(self, connection: _Connection) -> None:
        if len(self._idle) < _IDLE:
            self._idle.append(connection)
        else:
            connection.close()

    def _connect(self, start: bool) -> socket.socket:
        for attempt in range(_ATTEMPTS):
            try:
                sock = connect_private(self.address, _TIMEOUT)
                break
            except (NoServer, ServerTimeout, UntrustedServer):
                if not start or attempt == _ATTEMPTS - 1:
                    raise
                _start(self.address)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, FIRST_WAIT)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL)
        except BaseException:
            sock.close()
            raise
        return sock


# Starting it


def _start(address: str) -> None:
    """Starts the server at *address*, unless somebody else is doing so.

    A client can connect when this returns; the first answer takes as long as the server's start.
    Raises: UnsupportedPlatform: this Python does not say how to start another; FdshareError: too
    many processes; OSError.
    """
    if not sys.executable:
        raise UnsupportedPlatform("a private server", "sys.executable is empty; name a server")
    listeners = listen_private(address)
    if not listeners:
        time.sleep(_PAUSE)
        return
    inode = listeners[0].inode
    try:
        for listener in listeners:
            listener.socket = above_standard(listener.socket)
        fds = [listener.fileno() for listener in listeners]
        done = subprocess.run(
            _command(fds, address, inode),
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        if done.returncode == errno.EAGAIN:  # it could not fork
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        done.check_returncode()
    except BlockingIOError as error:
        leave(address, inode)
        why = why_not_forked(error)
        raise FdshareError(f"no private server can be started: {why}") from None
    except BaseException:
        leave(address, inode)
        raise
    finally:
        for listener in listeners:
            listener.leave_path()  # the server removes it
            listener.close()


def _command(fds: Sequence[int], address: str, inode: tuple[int, int] | None) -> list[str]:
    """A new interpreter that finds the modules that this one finds; it forks, so the server is a
    grandchild of this process.

    Without `site` (-S), which costs more than the rest of the start, and which this interpreter has
    run: its sys.path is the result.
    """
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = [root, *(os.path.abspath(folder) for folder in sys.path if folder)]
    code = (
        "import os, sys\n"
        "try:\n"
        "    pid = os.fork()\n"
        "except OSError as error:\n"
        "    os._exit(error.errno)\n"
        "if pid: os._exit(0)\n"
        "os.setsid()\n"
        f"sys.path[:] = {path!r}\n"
        "from fdshare.parking.server import serve\n"
        f"serve({fds!r}, {address!r}, {inode!r})\n"
    )
    return [sys.executable, "-P", "-s", "-S", "-c", code]
