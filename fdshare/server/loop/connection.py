"""Connection: one client's socket in the server, with its output queue and what is in flight."""

from __future__ import annotations

import array
import errno
import fcntl
import socket
import sys
from collections import deque
from typing import Final

from fdshare.kernel.ancillary import send_message
from fdshare.protocol.framing import Frame, Receiver
from fdshare.server.core.ports import Session
from fdshare.server.loop.closing import Handle

__all__ = ["NO_MEMORY", "Connection", "QueuedFrame"]

# What a socket says when the kernel has no memory for a message: later it may have.
NO_MEMORY: Final = (errno.ENOBUFS, errno.ENOMEM)

# Bytes that we sent and the peer has not read: SIOCOUTQ, <linux/sockios.h>; FIONWRITE elsewhere.
_UNREAD: Final = 0x5411 if sys.platform == "linux" else 0x40046677


class QueuedFrame:
    """A frame, or what is left of it, with the handles that go with its first byte."""

    __slots__ = ("data", "handles")

    def __init__(self, data: bytes | memoryview, handles: tuple[Handle, ...]) -> None:
        self.data = data
        self.handles = handles


class Connection:
    """State of one client. The loop owns the transitions; this class does the sending."""

    __slots__ = (
        "closed",
        "counterproof",
        "draining",
        "greeted",
        "in_flight",
        "inspecting",
        "interest",
        "output",
        "output_bytes",
        "overflowed",
        "pending",
        "proof",
        "receiver",
        "session",
        "slow_since",
        "sock",
        "stale",
        "stalled_since",
    )

    def __init__(self, sock: socket.socket, session: Session, now: float) -> None:
        self.sock = sock
        self.session = session
        self.receiver: Receiver[Handle] = Receiver()
        self.output: deque[QueuedFrame] = deque()
        self.output_bytes = 0
        self.pending: deque[Frame[Handle]] = deque()
        self.in_flight = 0
        self.greeted = False
        self.proof: bytes | None = None  # the MAC that the client still has to show
        self.counterproof = b""  # ... and what it is answered then
        self.draining = False  # close once the output is gone
        self.overflowed = False  # events were dropped
        self.stale: list[int] = []  # watches that need a fresh snapshot because of it
        self.inspecting = 0  # its `info` requests that worker threads answer now
        self.closed = False
        self.interest = 0
        self.slow_since: float | None = now  # until the Hello is there
        self.stalled_since: float | None = None  # the first of `pending` waits for the keeper

    def fileno(self) -> int:
        return self.sock.fileno()

    def queue(self, data: bytes, handles: tuple[Handle, ...]) -> None:
        """Appends a frame; its handles are pinned until they are sent."""
        for handle in handles:
            handle.pins += 1
        self.output.append(QueuedFrame(data, handles))
        self.output_bytes += len(data)

    def send_next(self) -> tuple[Handle, ...] | None:
        """Sends from the front of the queue. The handles that went, or None where it is full.

        Raises: DescriptorLimit (ETOOMANYREFS): somebody, perhaps elsewhere, has to read first;
        OSError: NO_MEMORY, or the connection is gone.
        """
        front = self.output[0]
        try:
            sent = send_message(self.sock, (front.data,), [handle.fd for handle in front.handles])
        except BlockingIOError:
            return None
        gone, front.handles = front.handles, ()
        self.in_flight += len(gone)
        self.output_bytes -= sent
        if sent == len(front.data):
            self.output.popleft()
        else:
            front.data = memoryview(front.data)[sent:]
        return gone

    def unread(self) -> bool:
        """True while the peer has not read all that was sent; resets `in_flight` once it has."""
        if not self.in_flight:
            return False
        count = array.array("i", [0])
        try:
            fcntl.ioctl(self.sock, _UNREAD, count)
        except OSError:
            count[0] = 0
        if count[0]:
            return True
        self.in_flight = 0
        return False
