"""Transport: one connection of an asynchronous client: frames out, answers in, with descriptors.

The event loop only says when the socket is ready; the system calls are ours, because those of the
loops lose descriptors when control data are truncated.
"""

from __future__ import annotations

import errno
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import anyio

from fdshare.client.asynchronous.pending import Pending
from fdshare.client.conversation import Answer, Conversation
from fdshare.errors import ClosedDescriptor
from fdshare.kernel.ancillary import receive_into, send_message

__all__ = ["Transport"]

_BUFFER: Final = 1 << 16


class _Piece:
    """A frame on its way out, or what is left of it."""

    __slots__ = ("data", "fds", "pending")

    def __init__(self, data: bytes | memoryview, fds: Sequence[int], pending: Pending | None):
        self.data = data
        self.fds = fds
        self.pending = pending


class Transport:
    """One connection: sends at once what the socket takes, and the rest when it is writable."""

    def __init__(self, sock: socket.socket, refused: Callable[[Pending, Exception], None]) -> None:
        """*sock* stays the caller's. *refused* is called with what cannot be sent, and why."""
        sock.setblocking(False)
        self.sock = sock
        self.heard_at = 0.0  # when something came last
        self._refused = refused
        self._output: deque[_Piece] = deque()
        self._blocked = anyio.Event()
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)

    def queue(self, data: bytes, fds: Sequence[int] = (), pending: Pending | None = None) -> None:
        """Appends a frame; *fds* are borrowed until *pending* is sent, answered or abandoned."""
        self._output.append(_Piece(data, fds, pending))

    def flush(self) -> None:
        """Sends until the socket is full, or nothing is left."""
        output = self._output
        while output:
            piece = output[0]
            pending = piece.pending
            if pending is not None and pending.abandoned and not pending.sent:
                output.popleft()
                continue
            try:
                sent = send_message(self.sock, (piece.data,), piece.fds)
            except BlockingIOError:
                self._blocked.set()
                return
            except OSError as error:
                self._not_sent(error)
                continue
            if pending is not None:
                pending.sent = True
            if sent == len(piece.data):
                output.popleft()
            else:
                piece.data, piece.fds = memoryview(piece.data)[sent:], ()

    def _not_sent(self, error: Exception) -> None:
        """Drops the first piece if its descriptors are the cause, else the connection has ended."""
        piece = self._output[0]
        gone = isinstance(error, (BrokenPipeError, ConnectionResetError))
        if not gone and piece.pending is not None and not piece.pending.sent:
            self._output.popleft()
            if isinstance(error, OSError) and error.errno == errno.EBADF:
                error = ClosedDescriptor(f"one of {list(piece.fds)} is not open")
            self._refused(piece.pending, error)
            return
        # What the server sent before can still be read; the reader finds the end of it.
        self._output.clear()
        if not gone:
            self.hang_up()

    def hang_up(self) -> None:
        """Ends the connection; `read` tells."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has ended already

    async def write(self) -> None:
        """Sends what the socket did not take at once; until cancelled."""
        while True:
            await self._blocked.wait()
            self._blocked = anyio.Event()
            await anyio.wait_writable(self.sock)
            self.flush()

    async def read(self, conversation: Conversation) -> list[Answer] | None:
        """The answers that one recvmsg(2) completed; None at the end of the stream.

        Raises: ProtocolError, BadRequest; OSError: the connection is gone.
        """
        await anyio.wait_readable(self.sock)
        try:
            count, descriptors, lost = receive_into(self.sock, self._buffer)
        except BlockingIOError:
            return []
        if not count:
            return None
        self.heard_at = time.monotonic()
        return conversation.feed(self._view[:count], descriptors, lost)
