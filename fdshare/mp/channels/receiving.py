"""Receives the messages of one socket, one after the other, and loses none of their descriptors.

framing.py has the form of a message, and says why it is peeked at before it is read. A handler of
the signal module may raise after any call, so what was read is in a list in the instruction that
reads it (kernel/ancillary.py), and the next call goes on from there.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, Final

from fdshare.errors import DescriptorRefused, InvalidArgument, ProtocolError
from fdshare.kernel.ancillary import (
    Look,
    close_looks,
    close_steps,
    look_into,
    looking,
    numbers_in,
    truncation,
)
from fdshare.kernel.descriptor import Descriptor, Spare
from fdshare.mp.channels.framing import (
    BODY,
    BODY_FOLLOWS,
    BOXED,
    JOINED,
    LENGTH,
    LONG_FOLLOWS,
    PLAIN,
    SHORT_BODY,
    WHOLE,
)
from fdshare.mp.channels.incoming import MARK, TORN, Incoming, TornMessage
from fdshare.mp.channels.peek_level import AT_ONCE, PeekLevel
from fdshare.mp.pickling.array_pickles import array_maps
from fdshare.mp.pickling.bundle import Arrived, Bundle, made_at_once

__all__ = ["MessageReceiver"]

_HEAD: Final = LENGTH.size
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
# The same of large arrays, and the function that maps the memory.
_arrays: Final[dict[bytes, Callable[[int], Any]]] = {}
_SHORT: Final = 512  # bytes; none of their bodies is longer

_WAIT: Final = (_WAITALL,)
_unpack: Final = LENGTH.unpack
_NOTHING: Final = object()
# Longer than what is read: of the same type, it is compared sooner than None.
_NEVER: Final = bytes(_HEAD + 1)


class MessageReceiver(Incoming):
    """Receives messages from a socket, which stays the connection's.

    A reader calls `fetch`, and takes what is in `message` then, with no call in between.
    """

    __slots__ = (
        "_heads",
        "_in_a_row",
        "_level",
        "_looking",
        "_mark_of_all",
        "_recv",
        "given_back",
        "holds_lock",
    )

    def __init__(self, sock: socket.socket, shared: bool, level: PeekLevel | None) -> None:
        """*shared*: several processes read from this socket, each under a lock."""
        super().__init__(sock, shared)
        self._recv = sock.recv
        # Each step reads a length, or peeks at announcement and body (kernel/ancillary.py).
        self._heads: Iterator[bytes] = iter(partial(sock.recv, _HEAD), _NEVER)
        self._looking = looking(sock, _HEAD + 1, 0 if level is None else level.flags)
        # What another reader of the socket may have marked it with.
        self._mark_of_all = (
            partial(sock.getsockopt, _SOCKET, MARK) if shared and MARK is not None else None
        )
        self._level = level
        # How many messages with descriptors came last, one after the other.
        self._in_a_row = 0
        # True if the lock under which it is read was kept, since a message has begun.
        self.holds_lock = False
        # Messages that were taken and not handed out.
        self.given_back: list[Arrived] = []

    def fetch(self) -> None:
        """The next message is in `message`; unless there was an announcement that was void: then it
        has to be called again. Blocks.

        Raises: EOFError; OSError: the end came in the middle; BlockingIOError, if the program has
        made the socket non-blocking, or with AlwaysPeek; DescriptorLimit (EMFILE): the message is
        still there. Whatever is raised, the next call goes on with it.

        A message of which a security module refuses a descriptor raises DescriptorRefused where it
        is opened: it would be refused for ever.
        """
        try:
            if not self.parts:
                ask = self._mark_of_all
                if ask is not None:
                    mark = ask()
                    if mark or self._marked:
                        if mark == TORN:
                            raise TornMessage
                        self._marked = mark != 0
                        self._size = BODY_FOLLOWS if self._marked else None
                if self._size is None:
                    shared = self._level
                    level = self._in_a_row > 1 if shared is None else shared.level()
                    if level and self._read_expected():
                        if level != AT_ONCE:
                            self._count()
                        return
                    # A message without descriptors, as in `_go_on`.
                    for head in self._heads:
                        self._head = head
                        break
                    size = _unpack(head)[0] if len(head) == _HEAD else 0
                    if 0 < size <= WHOLE:
                        # Its sender has sent all of it in one send: no need for MSG_WAITALL.
                        (self._data,) = map(self._recv, (size,))
                    elif size > WHOLE > 0:
                        self._read_large(size)
                    if len(self._data) == size > 0:
                        self.message, self._head, self._data = self._data, b"", b""
                        self._in_a_row = 0
                        if level and shared is not None:
                            shared.plain(self._sock)
                        return
            self._go_on(0)
            if self.message is not None and type(self.message) is not bytes:
                self._count()
        except DescriptorRefused as refused:
            self._pause()
            data = self.receive_without()
            if data is not None:
                self._fail(refused, data)
        except BaseException:
            self._pause()
            raise

    def _read_large(self, size: int) -> None:
        """Reads the *size* bytes that follow the head of a message without descriptors."""
        self._mark_torn(size)
        (self._data,) = map(self._recv, (size,), _WAIT)
        if len(self._data) == size:
            self._unmark()

    def _count(self) -> None:
        """One more message with descriptors came: after two, the next one is peeked at."""
        self._in_a_row += 1
        if self._in_a_row > 1 and self._level is not None:
            self._level.begin()

    def _go_on(self, flags: int) -> None:
        """Reads the rest of the message, from whatever was read. After an announcement that was
        void there is none: the next message may have to be peeked at."""
        self._collect()
        if self._size is None and not self._read_head(flags):
            return
        if self.parts or self._look_at_body(flags):
            self._read_body(flags)

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
                if (
                    flags & _CTRUNC
                    and (missing := truncation(look, self._sock, _HEAD + 1)) is not None
                ):
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
        if len(self._data) == _HEAD + size <= JOINED:
            numbers = numbers_in(self._looks[0])
            if size <= _SHORT and len(numbers) == 1:
                build = _bodies.get(self._data)
                if build is not None:
                    self._build(build, numbers)
                    return True
                map_array = _arrays.get(self._data)
                if map_array is not None:
                    self._map(map_array, numbers)
                    return True
            self._bundle(self._data, _HEAD, numbers)
            return True
        self._collect()
        self._read_body(0)
        return True

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
        parts = self.parts
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        numbers = self._numbers()
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
        except Exception as error:
            self._fail(error)
        finally:
            if made is not _NOTHING:
                self.message, self.parts, self._looks = (made,), [], []
                self._size, self._start, self._data = None, 0, b""

    def _fail(self, error: Exception, data: bytes = b"") -> None:
        """The message is gone, but for its *data*, and raises *error* where it is opened."""
        bundle = Bundle(data)
        bundle.missing = error
        self._drop()
        self.message = bundle

    def _map(self, map_array: Callable[[int], Any], numbers: list[int]) -> None:
        """The message is an array in the memory *numbers*, which *map_array* maps."""
        try:
            made = map_array(numbers[0])
        except Exception as error:
            self._fail(error)
            return
        steps = close_steps(numbers)
        self.message, self.parts, self._looks = (made,), [], []
        self._size, self._start, self._data = None, 0, b""
        deque(steps, 0)  # one call, and none since they were forgotten

    def _bundle(self, body: bytes, start: int, numbers: list[int]) -> None:
        """The message is a bundle."""
        _, count, _ = BODY.unpack_from(body, start)
        if len(numbers) != count:
            self._drop()
            raise ProtocolError(f"{len(numbers)} descriptors arrived with a message of {count}")
        first = start + BODY.size
        size = len(body) - start
        data: bytes | memoryview = memoryview(body)[first:] if size > JOINED else body[first:]
        if count == 1 and size <= _SHORT:
            if data in made_at_once:
                _bodies[body] = made_at_once[bytes(data)]
            elif data in array_maps:
                _arrays[body] = array_maps[bytes(data)]
        self._own(data, numbers, self._looks[:1] if len(self._looks) > 1 else [])

    def _own(self, data: bytes | memoryview, numbers: list[int], boxes: list[Look]) -> None:
        """The message is a bundle of *data* and the descriptors *numbers*, which came in *boxes*,
        if any."""
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
        self._size, self._start, self._data = None, 0, b""
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
            self._mark()
            if self._shared:
                self._size = None

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
            if self._shared and not self.parts:
                self._recall()
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
            if self._shared and not self.parts:
                self._recall()
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
