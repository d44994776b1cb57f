"""Receives the messages of one socket, one after the other, and loses none of their descriptors.

framing.py has the form of a message, and says why it is peeked at before it is read. A handler of
the signal module may raise after any call, so what was read is in a list in the instruction that
reads it (kernel/ancillary.py), and the next call goes on from there.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, Final

from fdshare.errors import InvalidArgument, ProtocolError
from fdshare.kernel.ancillary import Look, close_looks, look_into, looking, numbers_in, truncation
from fdshare.kernel.descriptor import Descriptor, Spare
from fdshare.mp.channels.framing import (
    BODY,
    BODY_FOLLOWS,
    BOXED,
    JOINED,
    LENGTH,
    LONG,
    LONG_FOLLOWS,
    PLAIN,
    SHORT_BODY,
    WHOLE,
)
from fdshare.mp.channels.peek_level import AT_ONCE, PeekLevel
from fdshare.mp.pickling.bundle import Arrived, Bundle, made_at_once

__all__ = ["MessageReceiver"]

_HEAD: Final = LENGTH.size
# Any user may set 0 to 6; socket(7). Where there is none, only the connection object has the mark.
_MARK: Final[int | None] = getattr(socket, "SO_PRIORITY", None)
_SOCKET: Final = int(socket.SOL_SOCKET)
_WAITALL: Final = int(socket.MSG_WAITALL)
_DONTWAIT: Final = int(socket.MSG_DONTWAIT)
_CTRUNC: Final = int(socket.MSG_CTRUNC)
_PEEK_ALL: Final = int(socket.MSG_PEEK | socket.MSG_WAITALL)
_PLAIN: Final = bytes([PLAIN])
_BOXED: Final = bytes([BOXED])

# Bodies of pickles that are `made_at_once`, with the announcement and without, and the function
# that builds the object.
_bodies: Final[dict[bytes, Callable[[int], Any]]] = {}
_SHORT: Final = 512  # bytes; none of their bodies is longer

_WAIT: Final = (_WAITALL,)
_unpack: Final = LENGTH.unpack
_NOTHING: Final = object()
# Longer than what is read: of the same type, it is compared sooner than None.
_NEVER: Final = bytes(_HEAD + 1)


class MessageReceiver:
    """Receives messages from a socket, which stays the connection's.

    A reader calls `fetch`, and takes what is in `message` then, with no call in between.
    """

    __slots__ = (
        "_data",
        "_head",
        "_heads",
        "_in_a_row",
        "_level",
        "_looking",
        "_looks",
        "_mark_of_all",
        "_marked",
        "_recv",
        "_shared",
        "_size",
        "_sock",
        "_start",
        "given_back",
        "holds_lock",
        "message",
        "parts",
    )

    def __init__(self, sock: socket.socket, shared: bool, level: PeekLevel | None) -> None:
        """*shared*: several processes read from this socket, each under a lock."""
        self._sock = sock
        self._recv = sock.recv
        # Each step reads a length, or peeks at announcement and body (kernel/ancillary.py).
        self._heads: Iterator[bytes] = iter(partial(sock.recv, _HEAD), _NEVER)
        self._looking = looking(sock, _HEAD + 1)
        self._shared = shared
        # What another reader of the socket may have marked it with.
        self._mark_of_all = (
            partial(sock.getsockopt, _SOCKET, _MARK) if shared and _MARK is not None else None
        )
        self._level = level
        # How many messages with descriptors came last, one after the other.
        self._in_a_row = 0
        self.message: Arrived | None = None
        # True if the lock under which it is read was kept, since a message has begun.
        self.holds_lock = False
        # Messages that were taken and not handed out.
        self.given_back: list[Arrived] = []
        # What was read of the message. After its announcement, which says *_size*, this is the
        # body, after *_start* bytes of the announcement. *_looks* has what peeks gave. While there
        # is something in *parts* nobody else may read.
        self.parts: list[bytes] = []
        self._head = self._data = b""  # of `_read_plain`
        self._looks: list[Look] = []
        self._size: int | None = None
        self._start = 0
        self._marked = False  # whether the socket has the mark; not where it is shared
        if not shared and _is_marked(sock):
            self._size, self._marked = BODY_FOLLOWS, True

    def fetch(self) -> None:
        """The next message is in `message`; unless there was an announcement that was void: then it
        has to be called again. Blocks.

        Raises: EOFError; OSError: the end came in the middle; BlockingIOError, if the program has
        made the socket non-blocking; DescriptorLimit (EMFILE): the message is still there. Whatever
        is raised, the next call goes on with it.
        """
        try:
            if not self.parts:
                if self._mark_of_all is not None:
                    self._marked = self._mark_of_all() != 0
                    self._size = BODY_FOLLOWS if self._marked else None
                if self._size is None:
                    shared = self._level
                    level = self._in_a_row > 1 if shared is None else shared.level()
                    if level and self._read_expected():
                        if level != AT_ONCE:
                            self._count()
                        return
                    # A message without descriptors, as in `_go_on`.
                    for self._head in self._heads:
                        break
                    head = self._head
                    size = _unpack(head)[0] if len(head) == _HEAD else 0
                    if 0 < size <= WHOLE:
                        # Its sender has sent all of it in one send: no need for MSG_WAITALL.
                        (self._data,) = map(self._recv, (size,))
                        if len(self._data) == size:
                            self.message, self._head, self._data = self._data, b"", b""
                            self._in_a_row = 0
                            if level and shared is not None:
                                shared.plain(self._sock)
                            return
            self._go_on(0)
            if self.message is not None and type(self.message) is not bytes:
                self._count()
        except BaseException:
            self._pause()
            raise

    def _count(self) -> None:
        """One more message with descriptors came: after two, the next one is peeked at."""
        self._in_a_row += 1
        if self._in_a_row > 1 and self._level is not None:
            self._level.begin()

    def _collect(self) -> None:
        """What was read is in *parts*."""
        if self._head or self._data:
            parts = self.parts + [part for part in (self._head, self._data) if part]
            self.parts, self._head, self._data = parts, b"", b""

    def _go_on(self, flags: int) -> None:
        """Reads the rest of the message, from whatever was read. After an announcement that was
        void there is none: the next message may have to be peeked at."""
        self._collect()
        if self._size is None and not self._read_head(flags):
            return
        if self.parts or self._look_at_body(flags):
            self._read_body(flags)

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
        self.message, self.parts = data, []
        return False

    def _fill(self, size: int, flags: int) -> None:
        """Reads until *size* bytes of the message are there."""
        parts = self.parts
        while (have := sum(map(len, parts))) < size:
            # One buffer of the final size, which the kernel fills: no copy, whatever the size.
            parts.extend(map(self._sock.recv, (size - have,), (_WAITALL | flags,)))
            if not parts[-1]:
                self._drop()
                raise OSError("got end of file during message") if have else EOFError

    def _look_ahead(self) -> bool:
        """Peeks at announcement and body. False if the next message is another."""
        for look in self._looking:
            self._looks.append(look)  # no handler comes in between
            break
        head, control, flags, _ = look
        if len(head) == _HEAD:  # the body is being sent
            close_looks(self._looks)
            look_into(self._looks, self._sock, _HEAD + 1)
            head, control, flags, _ = look = self._looks[0]
        if len(head) > _HEAD and head[_HEAD] == PLAIN:
            size = _unpack(head[:_HEAD])[0]
            if size <= SHORT_BODY:
                if flags & _CTRUNC and (missing := truncation(look)) is not None:
                    raise missing
                if control:
                    self._size, self._start = size, _HEAD
                    return True
        close_looks(self._looks)  # they are a later message's
        return False

    def _read_expected(self) -> bool:
        """Reads the next message if it has descriptors, in one peek and one read, where `_go_on`
        needs one read more. False: it is another.

        To be called where descriptors are likely: for a message without any the peek is wasted, and
        walks on to the next that has some.
        """
        if not self._look_ahead():
            return False
        size = SHORT_BODY - (self._size or 0)
        # Without a control buffer: the kernel drops its references, the copies are ours.
        (self._data,) = map(self._recv, (_HEAD + size,), _WAIT)
        if size <= _SHORT:
            build = _bodies.get(self._data)
            numbers = numbers_in(self._looks[0])
            if build is not None and len(numbers) == 1:
                self._build(build, numbers)
                return True
        self._collect()
        self._read_body(0)
        return True

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

    def _read_body(self, flags: int) -> None:
        start, size = self._start, self._size
        assert size is not None
        if size <= SHORT_BODY:
            size = SHORT_BODY - size
        else:
            self._fill(BODY.size, flags)
            if len(self.parts[0]) < BODY.size:
                self.parts[:] = (b"".join(self.parts),)
            size = BODY.size + BODY.unpack_from(self.parts[0])[2]
        # Without a control buffer: the kernel drops its references, the copies are ours.
        self._fill(start + size, flags)
        self._unmark()
        parts, looks = self.parts, self._looks
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        numbers = numbers_in(looks[0]) if len(looks) == 1 else _in_boxes(looks)
        if size <= _SHORT and len(numbers) == 1:
            build = _bodies.get(body)
            if build is not None:
                self._build(build, numbers)
                return
        self._bundle(body, start, numbers)

    def _build(self, build: Callable[[int], Any], numbers: list[int]) -> None:
        """The message is an object that *build* makes of one descriptor."""
        made: Any = _NOTHING
        try:
            (made,) = map(build, numbers)
        except Exception as error:  # to be raised where the message is opened
            bundle = Bundle(b"")
            bundle.missing = error
            self._drop()
            self.message = bundle
        finally:
            if made is not _NOTHING:
                self.message, self.parts, self._looks = (made,), [], []
                self._size, self._start, self._data = None, 0, b""

    def _bundle(self, body: bytes, start: int, numbers: list[int]) -> None:
        """The message is a bundle."""
        _, count, _ = BODY.unpack_from(body, start)
        if len(numbers) != count:
            self._drop()
            raise ProtocolError(f"{len(numbers)} descriptors arrived with a message of {count}")
        first = start + BODY.size
        size = len(body) - start
        data: bytes | memoryview = memoryview(body)[first:] if size > JOINED else body[first:]
        if count == 1 and size <= _SHORT and data in made_at_once:
            _bodies[body] = made_at_once[bytes(data)]
        boxes = self._looks[:1] if len(self._looks) > 1 else []
        owned: list[Descriptor] = []
        try:
            owned.extend(map(Spare, numbers))
            bundle = Bundle(data, owned=owned)
        except BaseException:  # they are still in _looks
            for descriptor in owned:
                descriptor.detach()
            raise
        # Without a call in between.
        self.message, self.parts, self._looks = bundle, [], boxes
        self._size, self._start = None, 0
        if boxes:
            close_looks(self._looks)

    def _pause(self) -> None:
        """After an exception: leaves the message so that whoever comes next goes on with it."""
        self._collect()
        if self.parts:
            with suppress(Exception):
                self._go_on(_DONTWAIT)
        if self.parts:
            return
        close_looks(self._looks)
        if self._start:  # the announcement was peeked at
            self._size, self._start = None, 0
        elif self._size is not None:
            if not self._marked:
                _mark(self._sock, True)
                self._marked = True
            if self._shared:
                self._size = None

    def _unmark(self) -> None:
        if self._marked:
            _mark(self._sock, False)
            self._marked = False

    def _drop(self) -> None:
        """Forgets what was read of the message."""
        close_looks(self._looks)
        self.parts, self._size, self._start = [], None, 0
        self._head = self._data = b""

    def receive_bytes(self, limit: int | None) -> bytes | None:
        """The next message's bytes; None if they are more than *limit*, and then only its head is
        read. Raises: as `fetch`; InvalidArgument: it has descriptors; it is still there."""
        try:
            if self.message is None and not self._plain_is_next():
                raise InvalidArgument(
                    "recv_bytes",
                    "the next message has descriptors, which bytes cannot hold; recv() takes it",
                )
            if self.message is None:
                size = _unpack(self.parts[0][:_HEAD])[0]
                if limit is not None and size > limit:
                    return None
                self._go_on(0)
            if not isinstance(self.message, bytes):
                raise InvalidArgument("recv_bytes", "it was received with recv() before")
        except BaseException:
            self._pause()
            raise
        data, self.message = self.message, None
        return data

    def _plain_is_next(self) -> bool:
        """True when the head of a message without descriptors is read. False: the next has some."""
        while True:
            if self._shared and not self.parts and _is_marked(self._sock):
                self._size, self._marked = BODY_FOLLOWS, True
            if self._size is not None:
                if self.parts or self._look_at_body(0):
                    return False
                continue
            if not self.parts and self._level is not None and self._level.level():
                head = self._sock.recv(_HEAD, _PEEK_ALL)
                is_announced = len(head) == _HEAD and _unpack(head)[0] < LONG_FOLLOWS
                if is_announced and self._look_ahead():  # the body may have been sent with it
                    return False
            self._fill(_HEAD, 0)
            if len(self.parts[0]) < _HEAD:
                self.parts[:] = (b"".join(self.parts),)
            size = _unpack(self.parts[0][:_HEAD])[0]
            if size >= LONG_FOLLOWS:
                return True
            self._size, self.parts = size, []

    def receive_without(self) -> bytes | None:
        """The data of the message left at the limit; its descriptors are lost. None: the next
        message is another."""
        if self.message is not None:
            return None
        try:
            if self._shared and not self.parts and _is_marked(self._sock):
                self._size, self._marked = BODY_FOLLOWS, True
            if self._size is None and not self._read_head(0):
                return None
            if not self.parts and self._sock.recv(1, _PEEK_ALL)[:1] not in (_PLAIN, _BOXED):
                self._unmark()
                self._size = None
                return None
            self._fill(BODY.size, 0)
            size = BODY.unpack_from(b"".join(self.parts))[2]
            self._fill(BODY.size + size, 0)
            self._unmark()
        except BaseException:
            self._pause()
            raise
        data = b"".join(self.parts)[BODY.size :]
        self._drop()
        return data

    def close(self) -> None:
        """Closes what was received and nobody has taken."""
        self._drop()
        self.message = None
        self.given_back.clear()


def _in_boxes(looks: list[Look]) -> list[int]:
    return [number for look in looks[1:] for number in numbers_in(look)]


def _is_marked(sock: socket.socket) -> bool:
    """True if a reader of this socket has read an announcement and left the body."""
    return _MARK is not None and sock.getsockopt(_SOCKET, _MARK) != 0


def _mark(sock: socket.socket, value: bool) -> None:
    if _MARK is not None:
        sock.setsockopt(_SOCKET, _MARK, value)
