"""What a queue has accepted and not yet written: sent at once if possible, by a thread if not.

After multiprocessing/queues.py of CPython 3.11 to 3.13 (`Queue.put`, `_feed`, `_start_thread`).
What changes: messages arrive pickled. The caller's own thread sends, without waiting, where the
pipe has room, nobody writes and nothing is queued before: what it has sent survives it, kill -9
included. Only what does not fit goes to the feeder thread, with duplicates of its descriptors.
"""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from fdshare.errors import DescriptorLimit
from fdshare.mp.frames import JOINED, Outgoing, headed
from fdshare.mp.transit import Bundle

__all__ = ["Outbox"]

_STOP: Final = object()
_DONTWAIT: Final = socket.MSG_DONTWAIT


class Outbox:
    """Sends the messages of one process, in order, to the writing end of one queue.

    It knows nothing of the queue but what it is given, so that a dropped queue is collected.
    """

    def __init__(
        self,
        sock: socket.socket,
        write_lock: Any,
        ended: Callable[[], None],
        failed: Callable[[BaseException, Any], None],
    ) -> None:
        """*ended* is called when `stop` has been obeyed, *failed* when a message was not sent."""
        self._sock = sock
        self._acquire = write_lock.acquire
        self._release = write_lock.release
        self._ended = ended
        self._failed = failed
        self._waiting: deque[Any] = deque()
        self._changed = threading.Condition(threading.Lock())
        # True while a message that is no longer in _waiting is on its way.
        self._busy = False
        self.thread: threading.Thread | None = None

    def put(self, bundle: Bundle, obj: Any = None) -> bool:
        """Send *bundle*, or keep it for the thread. True if that was started for it.

        It is safe to close what was pickled after this call. *obj* is what `failed` is told.
        Raises: DescriptorLimit, or any OSError of sendmsg(2): then it was not accepted.
        """
        with self._changed:
            if self._waiting or self._busy or not self._acquire(False):
                message = Outgoing(bundle)
                message.own()
                return self._enqueue(message, obj, False)
            # From here the write lock is ours, until it is released or goes on with the message.
            rest = self._send_now(bundle)
            if rest is None:
                return False
            if _can_wait(rest):
                return self._enqueue(rest, obj, True)
            self._busy = True
        self._finish(rest)
        return False

    def stop(self) -> None:
        """Call `ended` when all that was accepted is sent: at once, where no thread was needed."""
        with self._changed:
            if self.thread is not None:
                self._waiting.append(_STOP)
                self._changed.notify()
                return
        self._ended()

    def _send_now(self, bundle: Bundle) -> Outgoing | None:
        """What is left of *bundle*, and the lock is kept; None if all is gone, and it is free.

        Raises: OSError; the lock is free.
        """
        message = None
        try:
            if not bundle.fds and len(bundle.data) <= JOINED:
                data = headed(bundle.data)
                sent = _send(self._sock, data)
                if sent < len(data):
                    message = Outgoing(bundle, [memoryview(data)[sent:]])
            else:
                message = Outgoing(bundle)
                if _push(self._sock, message):
                    message = None
        except BaseException:
            self._release()
            if message is not None:
                message.close()
            raise
        if message is None:
            self._release()
        return message

    def _finish(self, message: Outgoing) -> None:
        """Send the rest here: it cannot be kept, or the caller must hear of its failure."""
        try:
            message.push_patiently(self._sock)
        finally:
            self._release()
            message.close()
            with self._changed:
                self._busy = False
                self._changed.notify()

    def _enqueue(self, message: Outgoing, obj: Any, holds_lock: bool) -> bool:
        item = (message, obj, holds_lock)
        self._waiting.append(item)
        if self.thread is not None:
            self._changed.notify()
            return False
        self.thread = threading.Thread(target=self._run, name="QueueFeederThread", daemon=True)
        try:
            self.thread.start()
        except BaseException:  # 3.12 starts none once the interpreter ends
            self.thread = None
            self._waiting.remove(item)
            if holds_lock:
                message.push_patiently(self._sock)
                self._release()
                return False
            message.close()
            raise
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                while not self._waiting:
                    self._changed.wait()
                item = self._waiting.popleft()
                self._busy = True
            if item is _STOP:
                self._ended()
                return
            self._deliver(*item)
            del item

    def _deliver(self, message: Outgoing, obj: Any, holds_lock: bool) -> None:
        try:
            if not holds_lock:
                self._acquire()
            try:
                message.push_patiently(self._sock)
            finally:
                self._release()
        except Exception as error:
            self._failed(error, obj)
        finally:
            message.close()


def _send(sock: socket.socket, data: bytes) -> int:
    try:
        return sock.send(data, _DONTWAIT)
    except BlockingIOError:
        return 0


def _push(sock: socket.socket, message: Outgoing) -> bool:
    try:
        return message.push(sock, _DONTWAIT)
    except DescriptorLimit:  # in flight: the caller waits, and hears of it if that does not help
        return False


def _can_wait(message: Outgoing) -> bool:
    """Whether *message* was made independent of what was pickled."""
    if message.refused:
        return False
    try:
        message.own()
    except OSError:  # EMFILE
        return False
    return True
