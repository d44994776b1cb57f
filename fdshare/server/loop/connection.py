"""Connection: one client's socket in the server, its queue of frames, and its state."""

from __future__ import annotations

import array
import errno
import fcntl
import socket
from collections import deque
from typing import Final

from fdshare.kernel import system
from fdshare.kernel.ancillary import send_message
from fdshare.protocol.framing import MAX_GREETING, MAX_REQUEST, Frame, Receiver
from fdshare.server.core.ports import Session
from fdshare.server.loop.closing import Handle

__all__ = ["NO_MEMORY", "Connection", "QueuedFrame"]

# The kernel has no memory for a message now; to be tried again.
NO_MEMORY: Final = (errno.ENOBUFS, errno.ENOMEM)


class QueuedFrame:
    """A frame, or the rest of one, and the handles that are sent with its first byte."""

    __slots__ = ("data", "handles")

    def __init__(self, data: bytes | memoryview, handles: tuple[Handle, ...]) -> None:
        self.data = data
        self.handles = handles


class Connection:
    """The state of one client, which the loop changes; sending is done here."""

    __slots__ = (
        "aside",
        "buffered",
        "closed",
        "counterproof",
        "draining",
        "greeted",
        "in_flight",
        "inspecting",
        "interest",
        "look_at",
        "output",
        "output_bytes",
        "overflowed",
        "paused",
        "pending",
        "proof",
        "received",
        "receiver",
        "reported",
        "reserved",
        "session",
        "slow_since",
        "sock",
        "stale",
        "stalled_since",
        "throttled",
        "unread_since",
        "unread_size",
        "watched",
    )

    def __init__(self, sock: socket.socket, session: Session, now: float) -> None:
        self.sock = sock
        self.session = session
        self.receiver: Receiver[Handle] = Receiver(MAX_REQUEST, MAX_GREETING)
        self.output: deque[QueuedFrame] = deque()
        self.output_bytes = 0
        self.pending: deque[Frame[Handle]] = deque()
        self.buffered = 0  # bytes that are kept for it: see buffers.py
        self.reserved = 0  # ... of these, for answers that are being made
        self.aside = False  # not among those that are idle, until it is answered: see idle.py
        self.received = 0  # descriptors of it that are in no entry: see intake.py
        self.in_flight = 0  # descriptors sent and, as far as is known, not read: see in_flight.py
        self.unread_since = 0.0  # when it was last seen to read while something was in flight
        self.unread_size = 0  # what the kernel said then of what is unread
        self.look_at = 0.0  # when the kernel is asked next
        self.throttled = False  # what is in flight leaves no room for its next frame
        self.greeted = False
        self.proof: bytes | None = None  # the MAC that the client still has to send
        self.counterproof = b""  # ... and the one that it is answered with
        self.draining = False  # to be closed when the queue is sent
        self.overflowed = False  # events were not sent
        self.stale: list[int] = []  # watches that need a fresh snapshot after that
        self.inspecting = 0  # its `info` requests that worker threads answer now
        self.closed = False
        self.paused = False  # nothing is read of it for a moment
        self.interest = 0
        self.reported = 0  # events that are still to be handled
        self.watched = True  # by the poller
        self.slow_since: float | None = now  # it owes the Hello
        self.stalled_since: float | None = None  # the first of `pending` waits for the keeper

    def fileno(self) -> int:
        return self.sock.fileno()

    def queue(self, data: bytes, handles: tuple[Handle, ...]) -> None:
        """Appends a frame. Its handles are pinned until they are sent."""
        for handle in handles:
            handle.pins += 1
            if handle.unsent is None:
                handle.unsent = {}
            handle.unsent[self] = handle.unsent.get(self, 0) + 1
        self.output.append(QueuedFrame(data, handles))
        self.output_bytes += len(data)

    def send_next(self) -> tuple[Handle, ...] | None:
        """Sends from the first frame of the queue. The handles that were sent; None if the socket
        is full.

        Raises: DescriptorLimit (ETOOMANYREFS): this user's receivers, here or elsewhere, have to
        read first; OSError: NO_MEMORY, or the connection is gone.
        """
        front = self.output[0]
        try:
            sent = send_message(self.sock, (front.data,), [handle.fd for handle in front.handles])
        except BlockingIOError:
            return None
        gone, front.handles = front.handles, ()
        self.not_unsent(gone)
        self.output_bytes -= sent
        if sent == len(front.data):
            self.output.popleft()
        else:
            front.data = memoryview(front.data)[sent:]
        return gone

    def not_unsent(self, handles: tuple[Handle, ...]) -> None:
        """A frame with *handles* is in the queue no more."""
        for handle in handles:
            assert handle.unsent is not None
            handle.unsent[self] -= 1
            if not handle.unsent[self]:
                del handle.unsent[self]

    def unread(self) -> int:
        """How much the peer has not read, in the kernel's measure; 0 if it has read all."""
        count = array.array("i", [0])
        try:
            fcntl.ioctl(self.sock, system.UNREAD, count)
        except OSError:
            count[0] = 0
        self.unread_size = count[0]
        return self.unread_size
