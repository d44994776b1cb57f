"""Messages on a stream socket: multiprocessing's framing, and one more form for descriptors.

A message without descriptors is what multiprocessing sends: its length in 4 bytes, or -1 and the
length in 8, then the data. A message with descriptors is two sends:

    announcement    4 bytes: -3 - (length of the body), or -2 where that does not say it all
    body            form, count, length of the data; the data. The descriptors are on its first
                    byte

They are two sends because a reader that reads the length with read(2) would lose the descriptors on
it, and one that peeks first (MSG_PEEK) would pay for it with each message of a queue: a peek walks
over all that is queued. After an announcement the reader peeks, since nothing is before the body. A
reader that received descriptors several times in a row peeks at both at once; and where all readers
of a queue do, both are sent at once (peek_level.py).

Nothing is lost at the receiver's descriptor limit: the peek fails and the body stays. But the
announcement may have been read, so it is recorded on the socket itself: SO_PRIORITY, which has no
effect on an AF_UNIX socket, is shared by every process that reads from it. A reader that finds this
mark knows that a body is next.

More than 253 descriptors are sent in boxes: sockets with up to 253 in the queue of each. One peek
at one message then finds all of them, and either all or none are received.

An announcement is void if another message follows it, and not a body: its sender was refused
(ETOOMANYREFS), or a signal's handler raised between the two sends. A reader sees that at the next
byte: the first byte of a body is its form, which no length and no announcement begins with. So a
message is sent as a whole or not at all, wherever its sender stops; but what is larger than JOINED
takes several sends, and who has begun it must go on.

sending.py has the sends of a message, incoming.py what was read of one. sender.py and feeder.py
send, receiving.py receives.
"""

from __future__ import annotations

import struct
from typing import Final

from fdshare.kernel import system
from fdshare.kernel.ancillary import Bytes

__all__ = [
    "BODY",
    "BODY_FOLLOWS",
    "BOXED",
    "JOINED",
    "LARGEST",
    "LARGEST_SHORT",
    "LENGTH",
    "LONG",
    "LONG_FOLLOWS",
    "PLAIN",
    "SHORT_BODY",
    "WHOLE",
    "framed",
    "headed",
]

LENGTH: Final = struct.Struct("!i")
LONG: Final = struct.Struct("!Q")
BODY: Final = struct.Struct("!BIQ")

LONG_FOLLOWS: Final = -1
BODY_FOLLOWS: Final = -2
SHORT_BODY: Final = -3
LARGEST: Final = 0x7FFFFFFF
# The largest body that its announcement tells: so all announcements begin with 0xFF.
LARGEST_SHORT: Final = (1 << 24) + SHORT_BODY

# The form of a body. No length begins with one of these (0x00 to 0x7F), and no announcement.
PLAIN: Final = 0x81
BOXED: Final = 0x82

JOINED: Final = 16384  # below, one copy is cheaper than a second buffer (connection.py, 3.11)
# Up to this, a send takes all of a message or nothing (unix_stream_sendmsg of Linux: one skb up to
# 32 KiB). Another system promises that for nothing.
WHOLE: Final = JOINED if system.LINUX else -1


def framed(data: Bytes, count: int) -> tuple[bytes, bytes]:
    """(announcement, body) of *data* with *count* descriptors: at most JOINED bytes and 253."""
    body = BODY.pack(PLAIN, count, len(data)) + data
    return LENGTH.pack(SHORT_BODY - len(body)), body


def headed(data: Bytes) -> bytes:
    """*data*, at most JOINED bytes, as a message without descriptors."""
    return LENGTH.pack(len(data)) + data
