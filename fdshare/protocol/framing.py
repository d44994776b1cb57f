"""The framing: (bytes, descriptors) in, frames out, and back. No I/O.

A frame is a header of 12 bytes and a body of msgpack::

    offset  size  big-endian
         0     4  length of the body in bytes, at most MAX_FRAME
         4     2  number of descriptors that came with the frame, at most 253
         6     1  protocol version
         7     1  0
         8     4  id of the request that this frame is, or answers; 0 for events and the greeting

Theory of operation. On a stream the kernel merges bytes that were sent *before* a
descriptor-bearing message into one read with it, and never bytes that were sent after (unix_stream_
read_generic: a skb with other credentials or descriptors ends the read). So the descriptors of one
read belong to its *last* message, and a reader cannot know from the read alone to which frame. The
header's count decides: bytes and descriptors go into two queues, and a frame whose body is complete
draws its count from the front of the second. A sender must pass all descriptors of a frame with the
frame's first byte, in one sendmsg(2). Where the kernel dropped those of a read, the reason takes
their place in the second queue: the frame to which they belonged draws it.

When the automaton stops, `drain()` returns the descriptors that belong to no frame.
"""

from __future__ import annotations

import struct
from collections import deque
from itertools import islice
from typing import Final, Generic, NamedTuple, TypeVar

from fdshare.errors import FdshareError, ProtocolError, VersionMismatch
from fdshare.protocol.messages import VERSION

__all__ = [
    "HEADER",
    "MAX_FRAME",
    "MAX_FRAME_DESCRIPTORS",
    "MAX_GREETING",
    "MAX_REQUEST",
    "Frame",
    "Receiver",
    "header",
    "only_frame",
]

HEADER: Final = struct.Struct(">IHBBI")
# A thousand names of 255 bytes fit; a peer cannot make us keep more than this for one frame.
MAX_FRAME: Final = 1 << 20
# From a client: 253 names of 255 bytes fit, and a register with all that it may have.
MAX_REQUEST: Final = 1 << 17
MAX_GREETING: Final = 1 << 12  # the first frame of a client, of whom nothing is known yet
MAX_FRAME_DESCRIPTORS: Final = 253  # SCM_MAX_FD

D = TypeVar("D")


class Frame(NamedTuple, Generic[D]):
    """One frame. *lost* says why the descriptors that it announced are missing."""

    id: int
    body: bytes
    descriptors: list[D]
    lost: FdshareError | None


def header(length: int, descriptors: int, id: int) -> bytes:
    """The 12 bytes before a body of *length* bytes."""
    return HEADER.pack(length, descriptors, VERSION, 0, id)


def only_frame(data: bytes | memoryview, descriptors: int) -> int:
    """The id of the one frame that *data* is, with exactly so many *descriptors*; else -1.

    This is the common case, which needs no automaton. The body is data[HEADER.size:].
    """
    if len(data) < HEADER.size:
        return -1
    length, count, version, reserved, id = HEADER.unpack_from(data)
    if (
        length != len(data) - HEADER.size
        or count != descriptors
        or version != VERSION
        or reserved
        or length > MAX_FRAME
    ):
        return -1
    return int(id)


class Receiver(Generic[D]):
    """Turns what recvmsg(2) returned into frames, whatever it was cut into.

    The descriptors may be of any type: the automaton only counts them.
    """

    def __init__(self, max_frame: int = MAX_FRAME, max_first: int | None = None) -> None:
        """Bytes of a body, and of the first one."""
        self._max_frame = max_frame
        self._most = max_frame if max_first is None else max_first  # of the next one
        self._bytes = bytearray()
        # The length that _bytes needs before it is looked at again: a frame that comes byte by byte
        # costs no more than one that comes whole.
        self._need = HEADER.size
        self._descriptors: deque[D | FdshareError] = deque()
        self.idle = True  # between two frames: an end of stream here is a clean one
        self.failure: ProtocolError | None = None

    def feed(
        self,
        data: bytes | memoryview,
        descriptors: list[D] | tuple[()] = (),
        lost: FdshareError | None = None,
    ) -> list[Frame[D]]:
        """The frames that *data* completes. Never raises: anything else is a bug.

        *lost* is the reason if the kernel dropped the descriptors of this read, which has none
        then: the frame that announced them has it instead. If the peer broke the framing, `failure`
        says how; the frames before it are good, and `drain()` returns the descriptors that belong
        to none. Feed no more then.
        """
        if self.idle and lost is None:
            id = only_frame(data, len(descriptors))
            if id >= 0 and len(data) <= self._most + HEADER.size:  # nearly always
                self._most = self._max_frame
                return [Frame(id, bytes(data[HEADER.size :]), list(descriptors), None)]
        self._descriptors += descriptors
        if lost is not None:
            self._descriptors.append(lost)
        if self._bytes:
            self._bytes += data
            if len(self._bytes) < self._need:
                self._check_rest()
                return []
            data = bytes(self._bytes)  # the frames outlive our buffer, which is used again
        frames: list[Frame[D]] = []
        view = memoryview(data)
        at = 0
        try:
            while (end := self._frame_end(view, at)) is not None:
                frames.append(self._draw(view, at, end))
                at = end
        except ProtocolError as failure:
            self.failure = failure.with_traceback(None)  # which has *self*, and would be kept by it
            return frames
        self._bytes[:] = view[at:]
        self.idle = not self._bytes
        self._check_rest()
        if self.failure is not None and self.idle and frames:
            # The last frame came with too many: nobody knows which of them are its own.
            self._descriptors.extendleft(reversed(frames.pop().descriptors))
        return frames

    @property
    def held(self) -> int:
        """How many bytes of a frame are here that is not complete."""
        return len(self._bytes)

    def waiting(self) -> list[D]:
        """The descriptors that belong to no frame yet; they stay."""
        return [each for each in self._descriptors if not isinstance(each, FdshareError)]

    def drain(self) -> list[D]:
        """The descriptors that belong to no frame yet; the caller owns them."""
        left = self.waiting()
        self._descriptors.clear()
        return left

    def _frame_end(self, view: memoryview, at: int) -> int | None:
        """Where the frame that starts at *at* ends, or None where more bytes are needed."""
        self._need = HEADER.size
        if len(view) - at < HEADER.size:
            return None
        length, count, version, reserved, _ = HEADER.unpack_from(view, at)
        if version != VERSION:
            raise VersionMismatch(version, VERSION)
        if reserved:
            raise ProtocolError(f"byte 7 of a header is {reserved}, not 0")
        if length > self._most:
            raise ProtocolError(f"a frame has {length} bytes, at most {self._most} are allowed")
        if count > MAX_FRAME_DESCRIPTORS:
            raise ProtocolError(f"a frame has {count} descriptors, at most 253 are allowed")
        self._need = HEADER.size + length
        end = at + self._need
        if end > len(view):
            return None
        self._most = self._max_frame
        return end

    def _draw(self, view: memoryview, at: int, end: int) -> Frame[D]:
        _, count, _, _, id = HEADER.unpack_from(view, at)
        # A copy: msgspec.Raw keeps a view of what it was decoded from, and *view* is used again.
        body = bytes(view[at + HEADER.size : end])
        if not count:
            return Frame(id, body, [], None)
        queue = self._descriptors
        if queue and isinstance(lost := queue[0], FdshareError):
            queue.popleft()
            return Frame(id, body, [], lost)
        mine = [each for each in islice(queue, count) if not isinstance(each, FdshareError)]
        if len(mine) < count:
            raise ProtocolError(f"a frame announced {count} descriptors, {len(mine)} came")
        for _ in mine:
            queue.popleft()
        return Frame(id, body, mine, None)

    def _check_rest(self) -> None:
        """Descriptors left over must belong to the frame that has begun, if there is one."""
        queued = len(self._descriptors)
        if not queued:
            return
        if len(self._bytes) >= HEADER.size:
            announced = HEADER.unpack_from(self._bytes)[1]
        else:
            announced = MAX_FRAME_DESCRIPTORS if self._bytes else 0
        if queued > announced:
            self.failure = ProtocolError(
                f"{queued} descriptors came where {announced} were announced"
            )
