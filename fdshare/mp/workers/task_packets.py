"""TaskPackets: the small tasks of a pool are packets, which need no lock and are never torn.

The kernel gives each packet of a SOCK_SEQPACKET pair to one reader, whole, and wakes one of those
that wait. So a worker takes a task with one read(2), where a stream takes two, a lock, and a look
for the mark of a reader that was killed. A worker that is killed has had all of a task or nothing.

A worker waits in a peek. In a read, one that is being killed would take a packet that comes then,
for the kernel looks for packets before it looks for signals (unix_dgram_recvmsg of Linux).

Any other task, with descriptors or longer, goes over the stream, which loses nothing at a
descriptor limit (mp/channels/framing.py). Its head follows as a packet, and whoever receives that
looks at the stream. There every message is whole, or its rest is being sent, so a look does not
wait for a next one. It may find nothing, since another worker has taken the task, or another task.
Then it is repeated after that task, until it finds its own or nothing: a worker that was killed
between packet and look has left one task more than there are packets.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any, Final

from fdshare.kernel import system
from fdshare.kernel.plain_socket import stream_pair
from fdshare.mp.channels.connection import ConnectionMixin
from fdshare.mp.channels.peek_level import AlwaysPeek
from fdshare.mp.channels.sending import Outgoing, patiently, push_short, short
from fdshare.mp.pickling.bundle import Arrived
from fdshare.mp.workers.tasks import HEAD_SIZE, Pickled, head_of, receive_patiently

__all__ = ["TaskPackets"]

_read: Final[Callable[[Any, int], bytes]] = os.read
_DONTWAIT: Final = int(socket.MSG_DONTWAIT)
_PEEK: Final = int(socket.MSG_PEEK)

# Bytes of a packet. Each is read into a new buffer of this size: from 128 KiB on malloc(3) would
# map one each time.
_LONGEST: Final = 120 << 10
# What is sent in place of the rest of a message that failed. No task is so short.
_VOID: Final = b"\0"
_ONE_SECOND: Final = 1000  # milliseconds


class TaskPackets:
    """The packets of a pool's tasks, beside the stream."""

    _writer: ConnectionMixin | None = None  # not in workers

    def __init__(
        self,
        stream_reader: ConnectionMixin,
        stream_writer: ConnectionMixin,
        lock: AbstractContextManager[Any],
    ) -> None:
        """*lock* is that of the stream's readers. Raises: OSError (EMFILE)."""
        self._stream = stream_writer._carrier()
        connection = type(stream_reader)
        reader, writer = stream_pair(socket.SOCK_SEQPACKET)
        self._reader = connection(reader.detach(), writable=False)
        self._writer = connection(writer.detach(), readable=False)
        self._packets = self._writer._carrier()
        self._adopt(stream_reader, lock)
        # No packet may be longer than the buffer, but for 32 bytes (unix_dgram_sendmsg of Linux).
        room = self._packets.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        self._longest = min(_LONGEST, room - 1024)
        connection._family.util.register_after_fork(self, _close_writer)

    def __getstate__(self) -> Any:
        return self._reader, self._stream_reader, self._lock

    def __setstate__(self, state: Any) -> None:
        self._reader, *stream = state
        self._adopt(*stream)

    def _adopt(self, stream_reader: ConnectionMixin, lock: AbstractContextManager[Any]) -> None:
        self._stream_reader, self._lock = stream_reader, lock
        stream_reader._peek_level = AlwaysPeek()
        self._wait = partial(self._reader._carrier().recv, 1, _PEEK)
        self._due = b""  # the head of a task that was not found yet

    def send(self, message: Pickled) -> None:
        """Sends *message*, which has a head. For one thread.

        Raises: DescriptorLimit (ETOOMANYREFS), after 10 seconds; any other OSError of sendmsg(2).
        """
        if type(message) is bytes and len(message) <= self._longest:
            self._packets.send(message, system.NOSIGNAL)
            return
        head, parts = head_of(message), short(message, at_once=True)
        if parts is None:
            self._send_long(Outgoing(message), head)
            return
        patiently(lambda: push_short([False], self._stream, parts))
        self._tell(head)

    def _send_long(self, outgoing: Outgoing, head: bytes) -> None:
        def send() -> None:
            if not self._push(outgoing, head):
                self._tell(head)

        try:
            patiently(send)
        except BaseException:
            # A worker may be waiting for the rest.
            with suppress(OSError):
                self._push(outgoing if outgoing.begun else Outgoing(_VOID), head)
            raise
        finally:
            outgoing.close()

    def _push(self, outgoing: Outgoing, head: bytes) -> bool:
        """Sends what is left of *outgoing* on the stream. True if there was no room for all of it,
        so that its *head* was sent before the rest."""
        told = False
        while True:
            with suppress(BlockingIOError):
                outgoing.push(self._stream, _DONTWAIT)
                return told
            # If it has not begun, those before it fill the stream, of which workers know.
            if outgoing.begun and not told:
                with suppress(BlockingIOError):
                    self._tell(head, _DONTWAIT)
                    told = True
            room = select.poll()
            room.register(self._stream, select.POLLOUT)
            if outgoing.begun and not told:
                room.register(self._packets, select.POLLOUT)
            # A worker that has received the head and does not read was killed.
            if not room.poll(_ONE_SECOND) and not self._reader._poll(0):
                told = False

    def _tell(self, head: bytes, flags: int = 0) -> None:
        self._packets.send(head, system.NOSIGNAL | flags)

    def receive(self) -> Arrived:
        """The next task. Raises: EOFError; of what is on the stream, as `receive_patiently`."""
        while True:
            packet = self._due
            if not packet:
                self._wait()
                packet = _read(self._reader._handle, _LONGEST)
            if len(packet) > HEAD_SIZE:
                return packet
            self._due = b""
            try:
                message = receive_patiently(self._stream_reader, self._lock)
            except BlockingIOError:
                if not packet:
                    raise EOFError from None
                continue
            head = head_of(message)
            if head != packet:
                self._due = packet
            if head != _VOID:
                return message

    def finish(self) -> None:
        """Ends the packets, after the stream; what was sent is still received. Never waits."""
        self._packets.shutdown(socket.SHUT_WR)

    def abandon(self) -> None:
        """Ends them in every process. Never waits."""
        for end in (self._reader, self._writer):
            if end is not None and not end.closed:
                end._carrier().shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes both ends, in this process."""
        self._reader.close()
        _close_writer(self)


def _close_writer(packets: TaskPackets) -> None:
    """In a forked child, too: a worker sees the end when the pool's process is gone."""
    if packets._writer is not None:
        packets._writer.close()
