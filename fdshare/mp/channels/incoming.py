"""What was read of the next message of a socket, and goes on from there after an exception.

framing.py has the form of a message, sending.py the other side (Outgoing). A handler of the signal
module may raise after any call, so what was read is stored in the instruction that reads it
(kernel/ancillary.py). Where it stops between announcement and body, the socket itself is marked.
"""

from __future__ import annotations

import socket
from typing import Final

from fdshare.kernel import system
from fdshare.kernel.ancillary import Look, close_looks, look_into, numbers_in
from fdshare.kernel.descriptor import Descriptor
from fdshare.mp.channels.framing import (
    BODY_FOLLOWS,
    BOXED,
    LENGTH,
    LONG,
    LONG_FOLLOWS,
    PLAIN,
    WHOLE,
)
from fdshare.mp.pickling.bundle import Arrived

__all__ = ["MARK", "TORN", "Incoming", "TornMessage"]

# Where there is none, only the connection object has the mark.
MARK: Final = system.SO_PRIORITY

# The mark while a message is read that takes more than one read. Whoever finds it comes after a
# reader that was killed, and would take data of the program for the next message.
TORN: Final = 2

_HEAD: Final = LENGTH.size
_SOCKET: Final = int(socket.SOL_SOCKET)
_WAITALL: Final = int(socket.MSG_WAITALL)
_unpack: Final = LENGTH.unpack


class TornMessage(OSError):
    """A reader was killed in the middle of a message, the rest of which is next."""


class Incoming:
    """What was read of a message, with the steps that read more."""

    __slots__ = (
        "_data",
        "_head",
        "_looks",
        "_marked",
        "_shared",
        "_size",
        "_sock",
        "_start",
        "message",
        "parts",
    )

    def __init__(self, sock: socket.socket, shared: bool) -> None:
        """*shared*: several processes read from this socket, each under a lock."""
        self._sock = sock
        self._shared = shared
        # A whole message, which nobody has taken.
        self.message: Arrived | None = None
        # What was read of the message. After its announcement, which says *_size*, this is the
        # body, after *_start* bytes of the announcement. *_looks* has what peeks gave. While there
        # is something in *parts* nobody else may read.
        self.parts: list[bytes] = []
        self._head = self._data = b""  # what goes into *parts*, if it is no message
        self._looks: list[Look] = []
        self._size: int | None = None
        self._start = 0
        self._marked = False  # whether the socket has the mark; not where it is shared
        if not shared:
            self._recall()

    def _recall(self) -> None:
        """Asks the socket for the mark: a reader has read an announcement, and left the body.

        Raises: TornMessage.
        """
        mark = 0 if MARK is None else self._sock.getsockopt(_SOCKET, MARK)
        if mark == TORN:
            raise TornMessage
        if mark:
            self._size, self._marked = BODY_FOLLOWS, True

    def _mark(self) -> None:
        if MARK is not None:
            self._sock.setsockopt(_SOCKET, MARK, True)
        self._marked = True

    def _mark_torn(self, size: int) -> None:
        """Until `_unmark` the socket has the mark TORN if *size* bytes may take several reads."""
        if self._shared and size > WHOLE and MARK is not None:
            self._marked = True
            self._sock.setsockopt(_SOCKET, MARK, TORN)

    def _unmark(self) -> None:
        if self._marked:
            if MARK is not None:
                self._sock.setsockopt(_SOCKET, MARK, False)
            self._marked = False

    def _collect(self) -> None:
        """What was read is in *parts*."""
        if self._head or self._data:
            parts = self.parts + [part for part in (self._head, self._data) if part]
            self.parts, self._head, self._data = parts, b"", b""

    def _fill(self, size: int, flags: int) -> None:
        """Reads until *size* bytes of the message are there."""
        self._mark_torn(size)
        parts = self.parts
        while (have := sum(map(len, parts))) < size:
            # One buffer of the final size, which the kernel fills: no copy, whatever the size.
            parts.extend(map(self._sock.recv, (size - have,), (_WAITALL | flags,)))
            if not parts[-1]:
                self._drop()
                raise OSError("got end of file during message") if have else EOFError

    def _read_head(self, flags: int) -> bool:
        """Reads an announcement: True. Or a message without descriptors, whole: False."""
        self._fill(_HEAD, flags)
        if len(self.parts[0]) < _HEAD:
            self.parts[:] = (b"".join(self.parts),)
        size = _unpack(self.parts[0][:_HEAD])[0]
        start = _HEAD
        if size < LONG_FOLLOWS:
            self._size, self.parts = size, []
            return True
        if size == LONG_FOLLOWS:
            start += LONG.size
            self._fill(start, flags)
            if len(self.parts[0]) < start:
                self.parts[:] = (b"".join(self.parts),)
            size = LONG.unpack_from(self.parts[0], _HEAD)[0]
        self._fill(start + size, flags)
        parts = self.parts
        data = parts[1] if len(parts) == 2 else b"".join(parts[1:])
        self._unmark()
        self.message, self.parts = data, []
        return False

    def _look_at_body(self, flags: int) -> bool:
        """Peeks at the body, for its descriptors. False if the announcement was void."""
        close_looks(self._looks)
        looks = self._looks
        missing = look_into(looks, self._sock, 1, flags)
        head = looks[0][0]
        if head and head[0] in (PLAIN, BOXED):
            if missing is not None:
                raise missing
            if head[0] == BOXED:
                for box in numbers_in(looks[0]):
                    with Descriptor.dup_of(box).socket() as inside:
                        missing = look_into(looks, inside, 1)
                    if missing is not None:
                        raise missing
            return True
        close_looks(self._looks)
        self._unmark()
        self._size = None
        if not head:
            raise EOFError
        return False

    def _numbers(self) -> list[int]:
        """The descriptors that peeks gave."""
        looks = self._looks
        if len(looks) == 1:
            return numbers_in(looks[0])
        return [number for look in looks[1:] for number in numbers_in(look)]  # in boxes

    def _drop(self) -> None:
        """Forgets what was read of the message."""
        if self._looks:  # at the interpreter's end there may be no close_looks any more
            close_looks(self._looks)
        self.parts, self._size, self._start = [], None, 0
        self._head = self._data = b""
