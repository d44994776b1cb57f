"""BlockingConnection: one connection to the server, on a socket that blocks.

Where the answer comes soon, a request and its answer are one sendmsg(2) and one recvmsg(2), without
a poll between them; see kernel/socket_wait.py.
"""

from __future__ import annotations

import errno
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NoReturn, TypeVar

from fdshare.client.conversation import Answer, Conversation, Exchange, Read, WholeAnswer
from fdshare.client.fetch_cache import FetchCache
from fdshare.client.settings import Dialer, Search
from fdshare.errors import ClosedDescriptor, FdshareError, NoServer, ServerGone, ServerTimeout
from fdshare.kernel import system
from fdshare.kernel.ancillary import discard_all, receive_into, rights, send_rights
from fdshare.kernel.socket_wait import FIRST_WAIT, wait_readable, wait_writable
from fdshare.protocol import messages as m

__all__ = ["BlockingConnection", "ConnectionLost"]

T = TypeVar("T")

_BUFFER: Final = 1 << 16
_FIRST_PAUSE: Final = 0.005  # seconds between attempts to reconnect, doubled each time ...
_LONGEST_PAUSE: Final = 0.2  # ... up to this


class ConnectionLost(Exception):
    """The connection ended, or was never made; another one may do."""


class BlockingConnection:
    """One connection to the server, and the conversation that outlives it. For one caller.

    *patience*: seconds that the server may say nothing, None for ever.
    """

    def __init__(self, dialer: Dialer, authkey: bytes | None, patience: float | None) -> None:
        self._dialer = dialer
        self._authkey = authkey
        self._patience = patience
        self._sock: socket.socket | None = None
        self._greeting = b""
        self._conversation = Conversation(authkey)
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._cache = FetchCache()
        self.opened = 0  # how many connections there were

    def open(self, deadline: float | None) -> None:
        """Connects, unless it is connected. The Hello goes out with the first request.

        Raises: NoServer, UntrustedServer, ServerTimeout, AuthenticationFailed.
        """
        if self._sock is not None:
            return
        left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        sock = self._dialer.dial(left)
        try:
            self._sock = sock
            self.opened += 1
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                sock.setsockopt(socket.SOL_SOCKET, option, FIRST_WAIT)
            self._greeting = self._conversation.hello()
            if self._authkey is not None:
                self._authenticate(sock, deadline)
        except BaseException:
            self._sock = None
            sock.close()
            raise

    def close(self) -> None:
        """The next `open` makes a new connection, in the same session."""
        # Forgotten first: a signal's handler may raise in close(), and a closed socket is no use.
        sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()
            self._conversation.hello()  # drops what was half received

    def persist(self, attempt: Callable[[], T], deadline: float | None, reconnect: float) -> T:
        """What *attempt* returns while this is open.

        If the connection ends, it is made again and *attempt* called again; a server that is lost
        is looked for during *reconnect* seconds.
        Raises: ServerGone: it was not found again; NoServer: there never was one; and what
        *attempt* raises.
        """
        search = Search(reconnect)
        pause, losses = _FIRST_PAUSE, 0
        while True:
            before, welcomes = self.opened, self._conversation.welcomes
            was_there = self._dialer.reached
            try:
                self.open(deadline)
                if self.opened != before:
                    search.found()
                return attempt()
            except (ConnectionLost, NoServer) as error:
                if isinstance(error, NoServer) and not was_there:
                    raise
                late = deadline is not None and time.monotonic() >= deadline
                if self._conversation.welcomes != welcomes:
                    search.answered()
                if search.missed() or late:
                    raise ServerGone(self._dialer.address, str(error)) from None
                losses += 1
                if isinstance(error, NoServer) or losses > 1:
                    time.sleep(pause)
                    pause = min(pause * 2, _LONGEST_PAUSE)

    def repeat(
        self, exchange: Exchange, started: float, deadline: float | None, reconnect: float
    ) -> WholeAnswer:
        """The answer to *exchange*, begun at *started*, whose connection ended or was never made.

        Raises: as `persist` and `exchange`.
        """

        def attempt() -> WholeAnswer:
            if exchange.id:  # it was sent before: of the wait for a name, the rest is left
                exchange.shorten(started)
            return self.exchange(exchange, deadline)

        return self.persist(attempt, deadline, reconnect)

    def exchange(self, exchange: Exchange, deadline: float | None) -> WholeAnswer:
        """The whole answer to *exchange*, which gets an id and keeps it when it is repeated.

        Raises: ConnectionLost, ServerTimeout, or the refusal.
        """
        sock = self._sock
        if sock is None:
            raise ConnectionLost("not connected")
        try:
            id = exchange.id = exchange.id or self._conversation.next_id()
            frame = self._conversation.frame(id, exchange.request, len(exchange.fds))
            self._write(sock, frame, exchange.fds, deadline)
            read = self._read(sock, deadline)
            parts = self._conversation.whole(*read, id)
            if parts is None:
                return self._collect(sock, id, read, deadline)
            self._cache.learn(exchange, frame, read[0], parts)
            return parts
        except BaseException as error:
            self._end_unless_refused(error)
            raise

    @property
    def server(self) -> m.Welcome:
        """Who has answered. Raises: ConnectionLost: nobody has."""
        welcome = self._conversation.welcome
        if welcome is None:
            raise ConnectionLost("it has not answered")
        return welcome

    def reaches(self, server: m.Welcome) -> bool:
        """Whether this is a connection to *server* that has not ended; asks the kernel alone."""
        welcome, sock = self._conversation.welcome, self._sock
        if sock is None or welcome is None:
            return False
        if (welcome.pid, welcome.epoch) != (server.pid, server.epoch):
            return False
        try:
            sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False  # it is at its end, or the server says why it closes it

    def fetch(self, name: str | tuple[str, ...], timeout: float | None) -> WholeAnswer | None:
        """The answer to a fetch of a name, or of some together, that was made before, in the
        shortest way (see fetch_cache.py).

        That is one send, one receive, and an answer that need not be decoded. None: use `exchange`;
        to ask once more does no harm. Raises: as `exchange`, but not ConnectionLost.
        """
        known, sock = self._cache.get(name), self._sock
        if known is None or sock is None or self._greeting:
            return None
        deadline = None if timeout is None else time.monotonic() + timeout
        id = self._conversation.next_id()
        request, expected = known.stamped(id)
        try:
            try:
                if sock.send(request, system.NOSIGNAL) < len(request):
                    raise ConnectionLost("half a request went")
            except OSError:
                return None  # `exchange` knows what each of them means
            read = data, descriptors, lost = self._read(sock, deadline)
            if data.tobytes() == expected and len(descriptors) == known.count and lost is None:
                return WholeAnswer([known.reply], descriptors)
            whole = self._conversation.whole(*read, id)
            return whole or self._collect(sock, id, read, deadline)
        except ConnectionLost:
            self.close()
            return None
        except ServerTimeout:
            self.close()
            raise ServerTimeout(self._dialer.address, timeout or 0.0) from None
        except BaseException as error:
            self._end_unless_refused(error)
            raise

    def send(self, exchange: Exchange, deadline: float | None) -> None:
        """Sends a request whose answers the caller will `receive`.

        Raises: ConnectionLost, ServerTimeout.
        """
        exchange.id = exchange.id or self._conversation.next_id()
        frame = self._conversation.frame(exchange.id, exchange.request, len(exchange.fds))
        try:
            self._write(self._connected(), frame, exchange.fds, deadline)
        except BaseException:
            self.close()  # it may have gone in part
            raise

    def receive(self, deadline: float | None) -> list[Answer]:
        """The next answers and events, at least one.

        Raises: ConnectionLost, ServerTimeout: none came.
        """
        sock = self._connected()
        while not (answers := self._receive(sock, deadline)):
            pass
        return answers

    def _connected(self) -> socket.socket:
        if self._sock is None:
            raise ConnectionLost("not connected")
        return self._sock

    def _collect(
        self, sock: socket.socket, id: int, read: Read, deadline: float | None
    ) -> WholeAnswer:
        """The whole answer to request *id*, which begins in *read* or comes after it."""
        answers = deque(self._conversation.feed(*read))
        parts = WholeAnswer()
        try:
            while True:
                while answers:
                    if _belongs(answer := answers.popleft(), id) and parts.add(answer):
                        return parts.finish()
                answers += self._receive(sock, deadline)
        except BaseException:
            discard_all(parts.descriptors)
            raise
        finally:
            for answer in answers:  # to what was not asked
                discard_all(answer.descriptors)

    def _end_unless_refused(self, error: BaseException) -> None:
        """Closes the connection unless *error* is a refusal: an answer could still come later."""
        if not isinstance(error, FdshareError) or isinstance(
            error, (ConnectionError, ServerTimeout)
        ):
            self.close()

    def _authenticate(self, sock: socket.socket, deadline: float | None) -> None:
        self._write(sock, b"", (), deadline)
        while self._conversation.welcome is None:
            for answer in self._receive(sock, deadline):
                _belongs(answer, -1)
        self._write(sock, self._conversation.proof(), (), deadline)
        while not (answers := self._receive(sock, deadline)):
            pass
        self._conversation.check_proof(answers[0])

    def _write(
        self,
        sock: socket.socket,
        data: bytes | memoryview,
        fds: Sequence[int],
        deadline: float | None,
    ) -> None:
        """Sends all of *data*, after the greeting if that has not gone yet."""
        if self._greeting:
            if fds and data:  # descriptors go with the first byte of their own frame
                self._write(sock, b"", (), deadline)
            data = self._greeting + data
        control = rights(fds)
        while data:
            try:
                sent = send_rights(sock, (data,), control)
            except BlockingIOError:  # SO_SNDTIMEO has passed
                if not wait_writable(sock, deadline):
                    raise ServerTimeout(self._dialer.address, 0.0) from None
                continue
            except (BrokenPipeError, ConnectionResetError) as error:
                # What the server said before it closed the connection can still be read.
                self._last_words(sock, error, deadline)
            except OSError as error:
                if error.errno == errno.EBADF and control:
                    raise ClosedDescriptor(f"one of {list(fds)} is not open") from None
                raise
            self._greeting = b""  # not before: what was refused for its descriptors has not gone
            if sent == len(data):
                return
            data, control = memoryview(data)[sent:], ()

    def _last_words(self, sock: socket.socket, error: OSError, deadline: float | None) -> NoReturn:
        try:
            for answer in self._receive(sock, deadline):
                _belongs(answer, -1)
        except OSError as reading:
            if isinstance(reading, FdshareError):
                raise
        raise ConnectionLost(str(error)) from None

    def _receive(self, sock: socket.socket, deadline: float | None) -> list[Answer]:
        return self._conversation.feed(*self._read(sock, deadline))

    def _read(self, sock: socket.socket, deadline: float | None) -> Read:
        """What one recvmsg(2) brought: bytes, at least one, descriptors, why some are missing."""
        while True:
            try:
                count, descriptors, lost = receive_into(sock, self._buffer)
                break
            except BlockingIOError:  # SO_RCVTIMEO has passed
                self._wait(sock, deadline)
            except ConnectionResetError as error:
                raise ConnectionLost(str(error)) from None
        if not count:
            raise ConnectionLost("it closed the connection")
        return self._view[:count], descriptors, lost

    def _wait(self, sock: socket.socket, deadline: float | None) -> None:
        """Returns when there is something to read.

        A server that has said nothing for long is asked whether it is there: one that was killed
        can hang in its end, and never close the connection. Raises: ServerTimeout; ConnectionLost:
        it does not answer that either.
        """
        due = self._due(deadline)
        if wait_readable(sock, due):
            return
        if due != deadline and self._conversation.welcome is not None:
            due = self._due(deadline)
            ping = self._conversation.frame(self._conversation.next_id(), m.Ping(), 0)
            self._write(sock, ping, (), due)
            if wait_readable(sock, due):
                return
        if deadline is None or time.monotonic() < deadline:
            raise ConnectionLost("it says nothing")
        raise ServerTimeout(self._dialer.address, 0.0) from None

    def _due(self, deadline: float | None) -> float | None:
        """When the server must have said something, at the latest at *deadline*."""
        if self._patience is None:
            return deadline
        due = time.monotonic() + self._patience
        return due if deadline is None else min(due, deadline)


def _belongs(answer: Answer, id: int) -> bool:
    """Whether *answer* is to request *id*; the descriptors of any other are closed.

    Raises: the reason, where the server says why it closes the connection.
    """
    if answer.id == id:
        return True
    discard_all(answer.descriptors)
    if answer.id == 0 and type(answer.reply) is m.Refused:
        raise m.refusal_error(answer.reply)
    return False
