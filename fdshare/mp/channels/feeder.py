"""Sends what is put into a queue: at once where that does not block, else in a thread.

After multiprocessing/queues.py of CPython 3.11 to 3.13 (`Queue.put`, `_feed`, `_start_thread`).
What changes: it is given pickles. The thread that calls `put` sends, without waiting, if the pipe
has room, no other process writes and nothing is waiting: what it has sent survives even kill -9 of
its process. Only what does not fit is left to the feeder thread, with duplicated descriptors.

`put` may be called during a `put` of the same thread, at any instruction: by a finaliser that the
collector runs, or by a handler of the signal module, to log through the queue for instance. So the
lock is reentrant, and an inner call leaves its message to the outer one. A handler may also raise
at any instruction; sending.py has what is needed then.
"""

from __future__ import annotations

import _thread
import errno
import queue
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from fdshare.errors import DescriptorLimit
from fdshare.kernel import system
from fdshare.mp.channels.framing import JOINED, LENGTH, WHOLE, headed
from fdshare.mp.channels.peek_level import AT_ONCE
from fdshare.mp.channels.sending import Outgoing, push_short, short
from fdshare.mp.pickling.bundle import Bundle, Encoded

if TYPE_CHECKING:
    from multiprocessing.synchronize import Lock

__all__ = ["READER_GONE", "Feeder"]

_DONTWAIT: Final = int(socket.MSG_DONTWAIT)  # an operation on an IntFlag takes a microsecond
_NOW: Final = _DONTWAIT | system.NOSIGNAL
_pack: Final = LENGTH.pack
_WITHOUT_WAITING: Final = (False,)
_MOMENT: Final = 5  # milliseconds
_PAUSE: Final = 0.005  # seconds between two attempts
# ECONNRESET where a socket's reader left something unread (unix_release_sock, net/unix/af_unix.c).
READER_GONE: Final = frozenset({errno.EPIPE, errno.ECONNRESET})


# A message, what `failed` is told of it, and `accepted` of its put(); None: stop.
Item: TypeAlias = tuple[bytes | Outgoing, Any, list[Any]]


def _nothing() -> None:
    """Refers to nothing, as a weak reference that is dead."""


class Feeder:
    """Sends the messages of one process, in order, to the writing end of one queue.

    It has no reference to the queue, so that one nobody uses is collected.
    """

    def __init__(
        self,
        sock: socket.socket,
        write_lock: Lock,
        closing: Callable[[], None],
        ended: Callable[[], None],
        failed: Callable[[BaseException, Any], None],
        level: Callable[[], int] | None = None,
        starting: Callable[[], Callable[[], None] | None] = _nothing,
    ) -> None:
        """`stop` calls *closing* at once, and *ended* when all is sent. *failed* is called with the
        error and the object of a message that was not sent. *level* is that of peek_level.py.
        *starting* is a weak reference to what is called before the thread is started."""
        self._sock = sock
        # Each step sends what is in _sent: only one put() at a time is there.
        self._sent: list[bytes] = [b""]
        self._sending: Iterator[int] = map(
            sock.send, map(itemgetter(0), repeat(self._sent)), repeat(_NOW)
        )
        self._acquire = write_lock.acquire
        # Each step tries to acquire it (kernel/ancillary.py).
        self._locking: Iterator[bool] = iter(partial(write_lock.acquire, False), 2)
        self._release = write_lock.release
        self._closing = closing
        self._ended = ended
        self._stopping = False
        self._failed = failed
        self._level = level
        self._start_hook = starting
        self._lock = threading.RLock()
        self._waiting: deque[Item | None] = deque()
        self._putting = False  # true while a put() sends
        self._delivering = False  # true while the thread sends what is no longer in _waiting
        # Wakes the thread. A SimpleQueue may be put into at any instruction.
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread: list[int] = []
        self._starting = threading.Lock()  # whoever has it starts the thread; nobody waits for it
        self.thread_ended = threading.Lock()  # free if there is no thread
        self._room = select.poll()
        self._room.register(sock, select.POLLOUT)
        # False after a full pipe did not drain in a moment, until nothing is waiting any more.
        self._drains = True

    @property
    def has_thread(self) -> bool:
        """True once the thread was started."""
        return bool(self._thread)

    def put(
        self,
        message: Encoded,
        accepted: list[Any],
        obj: Any = None,
        patience: float | None = None,
    ) -> None:
        """Sends *message*, or keeps it for the thread.

        It is safe to close what was pickled after this call. *obj* is for `failed`. *patience*: the
        seconds that it may take if no descriptor is free for a duplicate, or the kernel refuses
        more in flight; None: until there is room, and 10 seconds.

        Raises: DescriptorLimit, or any OSError of sendmsg(2). Whatever is raised, there is
        false in ``accepted[0]`` if the message will not arrive.
        """
        mine = False
        locked = False
        rest: Outgoing | None = None
        why: OSError | None = None
        try:
            with self._lock:
                if self._waiting or self._delivering or self._putting:
                    self._keep(_independent(message), accepted, obj)
                else:
                    mine = self._putting = True
                    # Stored at once, as in kernel/ancillary.py.
                    for locked in self._locking:  # noqa: B007
                        break
                    if not locked:
                        self._keep(_independent(message), accepted, obj)
                    elif type(message) is bytes and len(message) <= WHOLE:
                        self._sent[0] = _pack(len(message)) + message
                        try:
                            for accepted[0] in self._sending:
                                break
                        except BlockingIOError:
                            self._keep(message, accepted, obj)
                    elif not self._send_short(message, accepted):
                        rest = Outgoing(message)
                        why = self._begin(rest, accepted, obj)
            if rest is not None and not accepted[0]:
                self._send_here(rest, patience, why)
                accepted[0] = True
            if self._waiting:
                self._wake(accepted)
        except BaseException:
            if rest is not None and not rest.given:
                rest.settle(self._sock)
                if not rest.unsent:
                    self._hand_over(rest, accepted, obj)
            if self._waiting and accepted[0]:
                self._wake(accepted)
            raise
        finally:
            if mine:
                self._putting = False
                if locked and (rest is None or not rest.holds_lock):
                    self._release()

    def _send_short(self, message: Encoded, accepted: list[Any]) -> bool:
        """Sends a short *message* with descriptors; False if it is another, or has to wait."""
        try:
            parts = short(message, self._level is not None and self._level() == AT_ONCE)
            if parts is not None:
                push_short(accepted, self._sock, parts, _DONTWAIT)
                if type(message) is Bundle:
                    message.close()  # a handler may raise in a finaliser, and end it
        except (BlockingIOError, DescriptorLimit):
            pass
        return bool(accepted[0])

    def _begin(self, rest: Outgoing, accepted: list[Any], obj: Any) -> OSError | None:
        """Sends what the socket takes of *rest*, and keeps what is left for the thread; or returns
        why that cannot be."""
        if self._drains and rest.has_descriptors:
            # A reader may make room: to keep it would need a duplicate of each descriptor.
            self._room.poll(_MOMENT)
        try:
            rest.push(self._sock, _DONTWAIT)
            accepted[0] = True
        except BlockingIOError:
            if rest.begun:
                self._hand_over(rest, accepted, obj)
                return None
            self._drains = False
            try:
                rest.own()
            except OSError as error:  # EMFILE
                return error
            self._keep(rest, accepted, obj)
        except DescriptorLimit as error:
            return error
        return None

    def _send_here(self, rest: Outgoing, patience: float | None, why: OSError | None) -> None:
        """Sends *rest* in this thread: it cannot be kept, or its error is the caller's.

        Raises: *why*, after *patience* seconds.
        """
        if patience is None:
            self._push(rest)
            return
        deadline = time.monotonic() + patience
        while not rest.push_now(self._sock):
            if rest.begun:
                self._push(rest)
                return
            left = deadline - time.monotonic()
            if left <= 0:
                raise why or DescriptorLimit
            time.sleep(min(left, _PAUSE))

    def _push(self, message: Outgoing) -> None:
        while True:
            try:
                message.push_patiently(self._sock)
                return
            except BlockingIOError:  # the program has made the socket non-blocking
                room = select.poll()
                room.register(self._sock, select.POLLOUT)
                room.poll()

    def _keep(self, message: bytes | Outgoing, accepted: list[Any], obj: Any) -> None:
        item = message, obj, accepted
        if isinstance(message, Outgoing):
            message.given = True
        accepted[0] = True
        self._waiting.append(item)  # no handler comes in between

    def _hand_over(self, rest: Outgoing, accepted: list[Any], obj: Any) -> None:
        """Has the thread send the rest of what has begun, with the write lock."""
        accepted[0] = True
        if not rest.begun:
            return
        with self._lock:
            if self._delivering:  # it waits for the write lock, for what came after this
                self._push(rest)
            elif not rest.given:
                item = rest, obj, accepted
                rest.given = rest.holds_lock = True
                self._waiting.appendleft(item)  # no handler comes in between

    def stop(self) -> None:
        """Calls `ended` when all that was accepted is sent: at once if there is no thread.

        What no process can receive any more is dropped. If no thread can be started, what waits is
        dropped, too, and `failed` is told.
        """
        self._stopping = True
        self._closing()
        if self._waiting and not self._thread:  # no put() could start one
            try:
                self._start()
            except RuntimeError as error:
                self._drop_waiting(error)
        with self._lock:
            if self._thread:
                self._waiting.append(None)
                self._bell.put(None)
                return
        self._ended()

    # The thread.

    def _wake(self, accepted: list[Any]) -> None:
        if not self._thread:
            try:
                self._start()
            except RuntimeError:  # too many, or (3.12 and later) the interpreter ends
                if self._withdraw(accepted):
                    accepted[0] = False
                    raise
        self._bell.put(None)

    def _start(self) -> None:
        mine: list[bool] = []
        try:
            mine.extend(map(self._starting.acquire, _WITHOUT_WAITING))
            if not mine[0]:
                return
            starting = self._start_hook()
            if starting is not None:
                starting()
            self.thread_ended.acquire(False)
            # Not threading.Thread: if its start() is interrupted nobody knows whether it runs.
            self._thread.extend(map(_thread.start_new_thread, (self._run,), ((),)))
        finally:
            if mine and mine[0] and not self._thread:
                if self.thread_ended.locked():
                    self.thread_ended.release()
                self._starting.release()

    def _withdraw(self, accepted: list[Any]) -> bool:
        """Takes out the message of the put() that has *accepted*, if that cannot be sent now: True
        if it was there. The others wait: their put() has returned, or may."""
        with self._lock:
            self._deliver_now()
            # A copy: a handler may put, behind all that is there.
            for index, item in enumerate(list(self._waiting)):
                if item is not None and item[2] is accepted:
                    del self._waiting[index]
                    _close(item)
                    return True
        return False

    def _deliver_now(self) -> None:
        """Sends, in this thread, what has begun, and what waits while the pipe has room and nobody
        else writes."""
        while self._waiting and (first := self._waiting[0]) is not None:
            message = first[0]
            if isinstance(message, bytes):  # of at most JOINED bytes, for which there is room
                if not self._room.poll(0) or not self._lock_now():
                    return
            elif not message.holds_lock:
                if not self._lock_now():
                    return
                message.holds_lock = True
                if not message.push_now(self._sock):
                    if not message.begun:
                        message.holds_lock = False
                        self._release()
                    return  # the rest of what has begun is sent when this is called again
            self._deliver(self._next_batch(), locked=True)

    def _lock_now(self) -> bool:
        """True if nobody else writes; this process has the write lock then."""
        locked = False
        for locked in self._locking:  # noqa: B007
            break
        return bool(locked)

    def _drop_waiting(self, error: RuntimeError) -> None:
        dropped = []
        with self._lock:
            while self._waiting:
                dropped.append(self._waiting.popleft())
        for item in dropped:
            if item is not None:
                _close(item)
                self._failed(error, item[1])

    def _run(self) -> None:
        try:
            while True:
                self._bell.get()
                if not self._deliver_all():
                    self._ended()
                    return
        finally:
            self.thread_ended.release()

    def _deliver_all(self) -> bool:
        """Sends all that waits. False: stop."""
        while True:
            with self._lock:
                self._delivering = bool(self._waiting)
                if not self._waiting:
                    self._drains = True
                    return True
                batch = self._next_batch()
            if not batch:
                return False
            self._deliver(batch)
            del batch

    def _next_batch(self) -> list[Item]:
        """The next message; with those after it that fit into the same send, if all are bytes.
        Nothing: stop."""
        first = self._waiting.popleft()
        if first is None:
            return []
        batch = [first]
        if type(first[0]) is not bytes:
            return batch
        size = len(first[0])
        while self._waiting and (item := self._waiting[0]) is not None and type(item[0]) is bytes:
            size += len(item[0])
            if size > JOINED:
                break
            batch.append(item)
            self._waiting.popleft()
        return batch

    def _deliver(self, batch: list[Item], *, locked: bool = False) -> None:
        first = batch[0][0]
        message = first
        if isinstance(message, bytes):
            small = [headed(data) for data, *_ in batch if isinstance(data, bytes)]
            message = Outgoing.joined(small)
        try:
            if not (locked or message.holds_lock):
                self._acquire()
            try:
                self._push(message)
            finally:
                self._release()
        except Exception as error:
            unwanted = self._stopping and getattr(error, "errno", 0) in READER_GONE
            for _, obj, _ in () if unwanted else batch:
                self._failed(error, obj)
        finally:
            message.close()


def _close(item: Item) -> None:
    """Closes what was not sent of *item*."""
    if isinstance(item[0], Outgoing):
        item[0].close()


def _independent(message: Encoded) -> bytes | Outgoing:
    """*message*, with duplicates: what was pickled may be closed. Raises: DescriptorLimit."""
    if type(message) is bytes and len(message) <= JOINED:
        return message
    outgoing = Outgoing(message)
    outgoing.own()
    return outgoing
