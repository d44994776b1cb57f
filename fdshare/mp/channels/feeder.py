"""Sends what is put into a queue: at once where that does not block, else in a thread.

After multiprocessing/queues.py of CPython 3.11 to 3.13 (`Queue.put`, `_feed`, `_start_thread`).
What changes: it is given pickles. The thread that calls `put` sends, without waiting, if the pipe
has room, no other process writes and nothing is waiting: what it has sent survives even kill -9 of
its process. Only what does not fit is left to the feeder thread, with duplicated descriptors.
"""

from __future__ import annotations

import errno
import select
import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from fdshare.kernel.ancillary import NOSIGNAL
from fdshare.mp.channels.framing import JOINED, headed
from fdshare.mp.channels.sending import Outgoing, send_now
from fdshare.mp.pickling.bundle import Encoded

if TYPE_CHECKING:
    from multiprocessing.synchronize import Lock

__all__ = ["READER_GONE", "Feeder"]

_DONTWAIT: Final = int(socket.MSG_DONTWAIT)  # an operation on an IntFlag takes a microsecond
_MOMENT: Final = 5  # milliseconds
# ECONNRESET where a socket's reader left something unread (unix_release_sock, net/unix/af_unix.c).
READER_GONE: Final = frozenset({errno.EPIPE, errno.ECONNRESET})


# A message, what `failed` is told of it, and whether the write lock goes on with it; None: stop.
Item: TypeAlias = tuple[bytes | Outgoing, Any, bool]


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
    ) -> None:
        """`stop` calls *closing* at once, and *ended* when all is sent. *failed* is called with the
        error and the object of a message that was not sent. *level* is that of peek_level.py."""
        self._sock = sock
        self._acquire = write_lock.acquire
        self._release = write_lock.release
        self._closing = closing
        self._ended = ended
        self._stopping = False
        self._failed = failed
        self._level = level
        self._waiting: deque[Item | None] = deque()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        # True while a message that is no longer in _waiting is being sent.
        self._busy = False
        self.thread: threading.Thread | None = None
        self._room = select.poll()
        self._room.register(sock, select.POLLOUT)
        # False after a full pipe did not drain in a moment, until nothing is waiting any more.
        self._drains = True
        self.begun = False  # whether the last put() had begun to send when it raised

    def put(self, message: Encoded, obj: Any = None) -> bool:
        """Sends *message*, or keeps it for the thread. True if the thread was started for it.

        It is safe to close what was pickled after this call. *obj* is for `failed`.
        Raises: DescriptorLimit, or any OSError of sendmsg(2): then it was not accepted.
        """
        self.begun = False
        with self._lock:
            if self._waiting or self._busy or not self._acquire(False):
                self.begun = True
                return self._enqueue(_independent(message), obj, False)
            # From here this thread has the write lock, until it releases it or hands it over with
            # the message; a signal handler may raise on any line.
            goes_on = False
            try:
                self.begun = True
                rest = send_now(self._sock, message, _DONTWAIT, self._level)
                if rest is not None and self._drains and rest.parts[-1][1]:
                    rest = self._wait_a_moment(rest)
                if rest is None:
                    return False
                goes_on = True
                if _can_wait(rest):
                    return self._enqueue(rest, obj, True)
                self._busy = True
            finally:
                if not goes_on:
                    self._release()
        self._finish(rest)
        return False

    def _wait_a_moment(self, rest: Outgoing) -> Outgoing | None:
        """What is left of *rest* after a moment in which a reader may make room: keeping it for the
        thread would need a duplicate of each descriptor."""
        self._room.poll(_MOMENT)
        if not rest.refused and rest.push_now(self._sock, _DONTWAIT):
            return None
        self._drains = False
        return rest

    def stop(self) -> None:
        """Calls `ended` when all that was accepted is sent: at once if there is no thread.

        What no process can receive any more is dropped.
        """
        self._stopping = True
        self._closing()
        with self._lock:
            if self.thread is not None:
                self._waiting.append(None)
                self._changed.notify()
                return
        self._ended()

    def _finish(self, message: Outgoing) -> None:
        """Sends the rest in this thread: it cannot be kept, or its error is the caller's."""
        try:
            message.push_patiently(self._sock)
        finally:
            self._release()
            message.close()
            with self._lock:
                self._busy = False
                self._changed.notify()

    def _enqueue(self, message: bytes | Outgoing, obj: Any, holds_lock: bool) -> bool:
        item = (message, obj, holds_lock)
        self._waiting.append(item)
        if self.thread is not None:
            self._changed.notify()
            return False
        self.thread = threading.Thread(target=self._run, name="QueueFeederThread", daemon=True)
        try:
            self.thread.start()
        except BaseException:  # 3.12 and later start none while the interpreter ends
            self.thread = None
            self._waiting.remove(item)
            if type(message) is Outgoing:
                if holds_lock:
                    message.push_patiently(self._sock)
                    self._release()
                    return False
                message.close()
            raise
        return True

    def _run(self) -> None:
        while True:
            with self._lock:
                self._busy = False
                while not self._waiting:
                    self._drains = True
                    self._changed.wait()
                batch = self._next_batch()
                self._busy = True
            if not batch:
                self._ended()
                return
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

    def _deliver(self, batch: list[Item]) -> None:
        first, _, holds_lock = batch[0]
        try:
            if not holds_lock:
                self._acquire()
            try:
                if isinstance(first, bytes):
                    small = [headed(data) for data, _, _ in batch if isinstance(data, bytes)]
                    self._sock.sendall(b"".join(small), NOSIGNAL)
                else:
                    first.push_patiently(self._sock)
            finally:
                self._release()
        except Exception as error:
            unwanted = self._stopping and getattr(error, "errno", 0) in READER_GONE
            for _, obj, _ in () if unwanted else batch:
                self._failed(error, obj)
        finally:
            if type(first) is Outgoing:
                first.close()


def _independent(message: Encoded) -> bytes | Outgoing:
    """*message*, with duplicates: what was pickled may be closed. Raises: OSError (EMFILE)."""
    if type(message) is bytes and len(message) <= JOINED:
        return message
    outgoing = Outgoing.of(message)
    outgoing.own()
    return outgoing


def _can_wait(message: Outgoing) -> bool:
    """True if *message* now has duplicates, and may be sent after what was pickled is closed."""
    if message.refused:
        return False
    try:
        message.own()
    except OSError:  # EMFILE
        return False
    return True
