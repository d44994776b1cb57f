"""What a private server and its clients send each other: packets, and no I/O.

A request is one packet and has one answer, which begins with the byte of the request or says why
not:

==========  ====================================================  =============================
request     body                                                  answer
==========  ====================================================  =============================
PUT         key, seconds, uses; with 1 to 253 descriptors         PUT with a credit, or FULL
                                                                  with limit and used
ONE_WAY     none; with one end of a socket pair                   ONE_WAY
TAKE        key                                                   TAKE with the descriptors, or
                                                                  UNKNOWN
REMOVE      key                                                   REMOVE
==========  ====================================================  =============================

The sockets are SOCK_SEQPACKET: a packet arrives whole, with its own descriptors and no others. What
has been taken *uses* times is removed: only who loads the pickle knows its key.

**Puts without an answer.** A client may also put through a second socket, its *one-way socket*, for
as many descriptors as its last credit says. The server reads that socket when it is asked for a key
that it does not have, when the client puts with an answer or leaves, and every READ_INTERVAL
seconds. A put is sent before its key can be known to anybody, so none is missed; until it is read
it is in the kernel, and survives its sender. A credit has been reserved, so a put within it is not
refused. It saves two of the four times that one process wakes another.
"""

from __future__ import annotations

import struct
from typing import Final

__all__ = [
    "CREDIT",
    "FULL",
    "KEY_SIZE",
    "MOST_USES",
    "ONE_WAY",
    "PUT",
    "PUT_SIZE",
    "READ_INTERVAL",
    "REMOVE",
    "TAKE",
    "TERMS",
    "UNKNOWN",
    "USAGE",
    "put_packet",
]

PUT: Final = b"P"
ONE_WAY: Final = b"O"
TAKE: Final = b"T"
REMOVE: Final = b"R"
FULL: Final = b"F"
UNKNOWN: Final = b"U"

KEY_SIZE: Final = 18  # bytes: 16 that nobody can guess, 2 for the part of a large pickle
TERMS: Final = struct.Struct("=dI")  # of a put: seconds, uses
MOST_USES: Final = (1 << 32) - 1  # that fit there
CREDIT: Final = struct.Struct("=I")  # descriptors
USAGE: Final = struct.Struct("=II")  # descriptors: limit, used
PUT_SIZE: Final = 1 + KEY_SIZE + TERMS.size  # bytes of a PUT packet

# Seconds. What waits in a one-way socket may stay there so much longer than its time to live.
READ_INTERVAL: Final = 5.0


def put_packet(key: bytes, seconds: float, uses: int) -> bytes:
    """The packet that puts what is sent with it."""
    return PUT + key + TERMS.pack(seconds, uses)
