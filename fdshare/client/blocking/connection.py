"""Channel: one blocking connection to the server, with its timeouts kept by the kernel.

SO_RCVTIMEO and SO_SNDTIMEO bound each call, so that a request and its answer are one sendmsg(2) and
one recvmsg(2), without a poll between them.
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections.abc import Collection, Iterable
from typing import Final, NoReturn

from fdshare.client.conversation import Answer, Conversation, Exchange, Parts, Received
from fdshare.client.fetch_cache import Fetched
from fdshare.client.settings import dial
from fdshare.errors import ClosedDescriptor, FdshareError, ServerTimeout
from fdshare.kernel.ancillary import receive_into, send_message
from fdshare.protocol import messages as m

__all__ = ["Channel", "Gone"]

_BUFFER: Final = 1 << 16
_TIMEVAL: Final = struct.Struct("@ll")  # struct timeval
_LONGEST: Final = 86400.0  # seconds; struct timeval ends somewhere, and we look again after these


class Gone(Exception):
    """The connection ended; another one may do."""


class Channel:
    """One connection to the server, and the conversation that outlives it. For one caller."""

    def __init__(self, address: str, trust: Collection[int], authkey: bytes | None) -> None:
        self._address = address
        self._trust = trust
        self._authkey = authkey
        self._sock: socket.socket | None = None
        self._greeting = b""
        self._conversation = Conversation(authkey)
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._kernel_timeout = 0.0
        self._usual = False  # greeted, and the timeouts are those of a request that does not wait
        self._fetched = Fetched()
        self.opened = 0  # how many connections there were

    def open(self, deadline: float | None) -> None:
        """Connects, unless it is connected. The Hello goes out with the first request.

        Raises: NoServer, UntrustedServer, ServerTimeout, AuthenticationFailed.
        """
        if self._sock is not None:
            return
        left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        sock = dial(self._address, self._trust, left)
        try:
            self._sock = sock
            self.opened += 1
            self._kernel_timeout = 0.0
            self._usual = False
            self._greeting = self._conversation.hello()
            if self._authkey is not None:
                self._authenticate(deadline)
        except BaseException:
            self._sock = None
            sock.close()
            raise

    def close(self) -> None:
        """The next `open` makes a new connection, in the same session."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
            self._usual = False
            # What was half received belongs to nobody.
            self._conversation.hello()

    def exchange(self, exchange: Exchange, deadline: float | None, id: int) -> Parts:
        """The whole answer to *exchange*. Raises: Gone, ServerTimeout, or the refusal."""
        try:
            if self._sock is None:
                raise Gone("not connected")
            frame = self._conversation.frame(id, exchange.request, len(exchange.fds))
            if not self._sent_at_once(frame, exchange, deadline):
                self._write(frame, exchange.fds, deadline)
            received = self._read(deadline)
            parts = self._answer(id, received, deadline)
            if type(exchange.request) is m.Fetch and exchange.wait == 0:
                self._fetched.learn(exchange.request.name, frame, received[0], parts)
            return parts
        except BaseException as error:
            self._end_unless_refused(error)
            raise

    def fetch(self, name: str, timeout: float | None) -> Parts | None:
        """The answer to a fetch that was made before, by the shortest way (see fetched.py): one
        send, one receive, and the answer that was expected. None: go the long way, `exchange`; to
        ask once more does no harm. Raises: as `exchange`, but not Gone."""
        known, sock = self._fetched.get(name), self._sock
        if known is None or sock is None or not self._usual:
            return None
        started = time.monotonic()
        id = self._conversation.next_id()
        request, expected = known.stamped(id)
        try:
            try:
                if sock.send(request) < len(request):
                    raise Gone("half a request went")
            except OSError:
                return None  # the long way knows what each of them means
            deadline = None if timeout is None else started + timeout
            received = data, descriptors, lost = self._read(deadline)
            if data.tobytes() == expected and len(descriptors) == known.count and lost is None:
                return Parts([known.reply], descriptors)
            return self._answer(id, received, deadline)
        except Gone:
            self.close()
            return None
        except ServerTimeout:
            self.close()
            raise ServerTimeout(self._address, timeout or 0.0) from None
        except BaseException as error:
            self._end_unless_refused(error)
            raise

    def _answer(self, id: int, received: Received, deadline: float | None) -> Parts:
        """The whole answer to request *id*, which begins with *received*, or comes after it."""
        if (whole := self._conversation.whole(*received, id)) is not None:
            return whole
        answers = self._conversation.feed(*received)
        parts = Parts()
        while True:
            for answer in answers:
                if self._part_of(answer, id) and parts.add(answer):
                    return parts.finish()
            answers = self._receive(deadline)

    def _end_unless_refused(self, error: BaseException) -> None:
        """A refusal leaves the connection in order; after anything else an answer may come late."""
        if not isinstance(error, FdshareError) or isinstance(
            error, (ConnectionError, ServerTimeout)
        ):
            self.close()

    def _sent_at_once(self, frame: bytes, exchange: Exchange, deadline: float | None) -> bool:
        """The common case: no greeting, no descriptors, no wait, timeouts set. True: it is gone."""
        sock = self._sock
        if self._greeting or exchange.fds or exchange.wait != 0 or not self._usual:
            self._usual = exchange.wait == 0  # the next one will find the timeouts that it needs
            return False
        assert sock is not None
        try:
            sent = sock.send(frame)
        except OSError:
            return False  # the long way knows what each of them means
        if sent < len(frame):
            self._write(memoryview(frame)[sent:], (), deadline)
        return True

    def send(self, exchange: Exchange, deadline: float | None, id: int) -> None:
        """Sends a request whose answers the caller will `receive`. Raises: Gone, ServerTimeout."""
        try:
            self._send(exchange, id, deadline)
        except BaseException:
            self.close()  # it may have gone in part
            raise

    def receive(self, deadline: float | None) -> list[Answer]:
        """The next answers and events, at least one. Raises: Gone, ServerTimeout: none came."""
        if self._sock is not None:
            self._limit(deadline)  # which may be another one than that of the request
        while not (answers := self._receive(deadline)):
            pass
        return answers

    @property
    def welcomes(self) -> int:
        """On how many connections the server has said something."""
        return self._conversation.welcomes

    def new_id(self) -> int:
        """An id that no other request of this session has."""
        return self._conversation.next_id()

    def _part_of(self, answer: Answer, id: int) -> bool:
        if answer.id == id:
            return True
        for descriptor in answer.descriptors:
            descriptor.close()
        if answer.id == 0 and type(answer.reply) is m.Refused:
            raise m.refusal_error(answer.reply)  # the door, and the reason
        return False

    def _authenticate(self, deadline: float | None) -> None:
        self._write(b"", (), deadline)
        while self._conversation.welcome is None:
            for answer in self._receive(deadline):
                self._part_of(answer, -1)
        self._write(self._conversation.proof(), (), deadline)
        while not (answers := self._receive(deadline)):
            pass
        self._conversation.check_proof(answers[0])

    def _send(self, exchange: Exchange, id: int, deadline: float | None) -> None:
        frame = self._conversation.frame(id, exchange.request, len(exchange.fds))
        self._write(frame, exchange.fds, deadline)

    def _write(self, data: bytes | memoryview, fds: Iterable[int], deadline: float | None) -> None:
        sock = self._connected()
        numbers = list(fds) if fds else []
        if self._greeting:
            if numbers and data:  # descriptors go with the first byte of their own frame
                self._write(b"", (), deadline)
            data = self._greeting + data
        while data:
            self._limit(deadline)
            try:
                sent = send_message(sock, (data,), numbers)
                if sent == len(data):
                    self._greeting = b""
                    return
            except BlockingIOError:
                self._check_time(deadline)
                continue
            except (BrokenPipeError, ConnectionResetError) as error:
                # What the server said before it closed the door is still there to be read.
                self._last_words(error, deadline)
            except OSError as error:
                if error.errno == errno.EBADF and numbers:
                    raise ClosedDescriptor(f"one of {numbers} is not open") from None
                raise
            numbers = []
            self._greeting = b""  # not before: what was refused for its descriptors has not gone
            data = memoryview(data)[sent:]

    def _last_words(self, error: OSError, deadline: float | None) -> NoReturn:
        try:
            for answer in self._receive(deadline):
                self._part_of(answer, -1)
        except OSError as reading:
            if isinstance(reading, FdshareError):
                raise
        raise Gone(str(error)) from None

    def _receive(self, deadline: float | None) -> list[Answer]:
        return self._conversation.feed(*self._read(deadline))

    def _read(self, deadline: float | None) -> Received:
        """What one recvmsg(2) brought: bytes, at least one, descriptors, why some are missing."""
        sock = self._connected()
        while True:
            try:
                count, descriptors, lost = receive_into(sock, self._buffer)
                break
            except BlockingIOError:  # the kernel's timeout
                self._check_time(deadline)
                self._limit(deadline)
            except ConnectionResetError as error:
                raise Gone(str(error)) from None
        if not count:
            raise Gone("it closed the connection")
        return self._view[:count], descriptors, lost

    def _connected(self) -> socket.socket:
        if self._sock is None:
            raise Gone("not connected")
        return self._sock

    def _check_time(self, deadline: float | None) -> None:
        if deadline is not None and time.monotonic() >= deadline:
            raise ServerTimeout(self._address, 0.0)

    def _limit(self, deadline: float | None) -> None:
        """Sets the kernel's timeouts, unless what is set still fits."""
        assert self._sock is not None
        left = 0.0 if deadline is None else max(deadline - time.monotonic(), 0.001)
        left = min(left, _LONGEST)
        # Waking too early or a little late is harmless, for the deadline is looked at again then;
        # a system call for every request is not.
        if left / 2 <= self._kernel_timeout <= left * 1.5 + 1 and self._kernel_timeout:
            return
        self._kernel_timeout = left or _LONGEST
        value = _TIMEVAL.pack(int(self._kernel_timeout), int(self._kernel_timeout % 1 * 1e6))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
