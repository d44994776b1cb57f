"""Loop: the event loop, in one thread. It reads, serves and writes, and never blocks.

A turn waits once, handles each ready descriptor (a new connection, a request, room for output), or
as many as there is time for, and then does what is due. What it has no time for waits in the run
queue (run_queue.py). A slow client is closed after a while, an idle one only where the limit of
connections is reached.
"""

from __future__ import annotations

import heapq
import logging
import math
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count
from typing import Final

from fdshare.errors import (
    FdshareError,
    KeeperUnavailable,
)
from fdshare.server.core.ports import JournalBusy
from fdshare.server.core.service import Service
from fdshare.server.loop.acceptor import Acceptor
from fdshare.server.loop.closing import Closer, Handle, close_quietly
from fdshare.server.loop.connection import Connection
from fdshare.server.loop.input import Input
from fdshare.server.loop.output import SLICE
from fdshare.server.loop.poller import FEW, MANY, READ

__all__ = ["Loop"]

log = logging.getLogger("fdshare.server")

_BUFFER: Final = 1 << 16  # bytes that one read takes at most, so that others get their turn, too
_RETRY: Final = 0.005  # seconds until a throttled connection is tried again


class Loop(Input):
    """Waits for readiness and for deadlines, and makes the calls that these ask for."""

    def __init__(
        self,
        service: Service,
        closer: Closer,
        listener: socket.socket,
        epoch: str,
        authkey: bytes | None,
        nofile: int,
    ) -> None:
        """*listener* stays the caller's. *nofile*: the limit of numbers of this process."""
        super().__init__(service, closer, nofile)
        self.acceptor = Acceptor(self, listener, epoch, authkey)
        self._timers: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()
        # Without a lock, which a signal's handler would wait for that came while it was held.
        self._posted: deque[Callable[[], None]] = deque()
        self._tick_again = 0.0  # no tick before: the keeper could not take what was due
        self._retry_at = 0.0  # when throttled and stalled connections are tried again; 0: not set
        self._stopping = False
        self._interrupted = False
        self._wake, self._waker = socket.socketpair()
        for end in (self._wake, self._waker):
            end.setblocking(False)
        self.poller.register(self._wake.fileno(), READ, self._on_wake)

    # Running and stopping.

    def run(self) -> bool:
        """Serves until `stop()`, and closes the connections; False then. True after `interrupt()`:
        to be called again."""
        try:
            while not self._stopping:
                self.turn()
                if self._interrupted:
                    self._interrupted = False
                    return True
            self._finish()
        except BaseException:
            self._leave()
            raise
        self._leave()
        return False

    def _leave(self) -> None:
        self.service.leaving = True
        for connection in list(self.connections):
            self.drop(connection)

    def turn(self) -> None:
        """Waits once, handles what is ready, and does what is due."""
        due = self._next_due()
        timeout = None if due is None else max(due - time.monotonic(), 0.0)
        ready = self.poller.wait(0.0 if self.queue else timeout)
        now = time.monotonic()
        crowd = len(ready) >= FEW and len(self.users) > 1
        if crowd:  # all of them are reported again, with those that come behind
            ready = self.poller.wait(0.0, MANY)
        if crowd or self.queue:
            self._handle_in_turn(ready, now)
        else:
            self._handle_all(iter(ready), now)
        if self.acceptor.is_called:  # after those who are here already
            self.acceptor.accept(time.monotonic())
        if due is not None and due <= now:
            self._do_due(now)

    def _handle_all(self, ready: Iterator[tuple[object, int]], now: float) -> None:
        """As nearly always: there is time for all of it. If not, the rest waits for its turn."""
        for key, events in ready:
            if type(key) is Connection:
                if events == READ and not key.closed:
                    self._read(key, now)
                else:
                    self._on_connection(key, events, now)
            else:
                key(events, now)  # type: ignore[operator]
            if time.monotonic() - now > SLICE:
                for other, its in ready:  # what is no connection is reported again
                    if type(other) is Connection:
                        self._put_off(other, its)
                        self._unwatch(other)

    def _handle_in_turn(self, ready: list[tuple[object, int]], now: float) -> None:
        """First what is no connection; then those of the users who have had least, as long as there
        is time."""
        for key, events in ready:
            if type(key) is Connection:
                self._put_off(key, events)
            else:
                key(events, now)  # type: ignore[operator]
        now = time.monotonic()
        before = time.thread_time()
        while (connection := self.queue.next()) is not None:
            self._serve_next(connection, now)
            worked = time.thread_time()
            self.queue.served(connection, worked - before)
            before = worked
            if time.monotonic() - now > SLICE:
                break
        if self.queue:
            for key, _ in ready:
                if type(key) is Connection:
                    self._unwatch(key)

    def stop(self) -> None:
        """Makes `run` return soon. May be called from any thread, and from a signal handler."""
        self._stopping = True
        self._wake_up()

    def interrupt(self) -> None:
        """Makes `run` return after this turn, with all connections open. Only in the loop's
        thread."""
        self._interrupted = True

    def post(self, call: Callable[[], None]) -> None:
        """Has the loop's thread make *call*. May be called from any thread, and from a signal
        handler."""
        self._posted.append(call)
        self._wake_up()

    def wake_on_signals(self) -> int:
        """Makes every signal end the wait for events. The result is to be given to
        signal.set_wakeup_fd() before `close`. Both only in the main thread."""
        return signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)

    def abandon(self) -> None:
        """In a forked child: the connections are the parent's."""
        self.poller.close()
        for connection in self.connections:
            connection.sock.detach()
        self.disconnector.abandon()
        self._wake.detach()
        self._waker.detach()

    def held(self) -> list[Handle]:
        """The descriptors that clients sent, and that are in no entry."""
        found = []
        for connection in self.connections:
            found += connection.receiver.waiting()
            for frame in connection.pending:
                found += frame.descriptors
        return found

    def close(self) -> None:
        self.disconnector.close()
        close_quietly(self.poller, self._wake, self._waker)

    def _wake_up(self) -> None:
        try:
            self._waker.send(b"\0")
        except (BlockingIOError, OSError):
            pass  # full: it wakes in any case; closed: the loop has ended

    def _on_wake(self, events: int, now: float) -> None:
        try:
            self._wake.recv(4096)
        except BlockingIOError:
            pass
        for _ in range(len(self._posted)):  # what these calls post comes in the next turn
            self._posted.popleft()()

    def _finish(self) -> None:
        """Sends what is queued, for at most a second."""
        self.closer.collect(math.inf)
        deadline = time.monotonic() + 1.0
        while any(c.output for c in self.connections) and time.monotonic() < deadline:
            for connection in list(self.connections):
                self.flush(connection, time.monotonic())
            self.poller.wait(_RETRY)

    # Time.

    def _next_due(self) -> float | None:
        """When `_do_due` has something to do; None if nothing is planned."""
        if self._throttled or self._stalled:
            # Set once and not in each turn: a busy loop must not postpone it.
            self._retry_at = self._retry_at or time.monotonic() + _RETRY
            return self._retry_at
        due = self.service.next_deadline()
        if due is not None and due < self._tick_again:
            due = self._tick_again
        if self._timers:
            due = self._timers[0][0] if due is None else min(due, self._timers[0][0])
        if self._slow:
            oldest = next(iter(self._slow))
            since = oldest.slow_since or 0.0
            slow = since + self.service.limits.request_timeout
            due = slow if due is None else min(due, slow)
        flying, closer = self.in_flight, self.closer
        if flying.total or flying.silent:
            look = flying.next_look()
            due = look if due is None else min(due, look)
        if (closer.waiting or closer.lanes.waiting) and (closed := closer.due) is not None:
            due = closed if due is None else min(due, closed)
        if self.acceptor.paused_until is not None:
            resume = self.acceptor.due
            due = resume if due is None else min(due, resume)
        return due

    def _do_due(self, now: float) -> None:
        self._retry_at = 0.0
        self.closer.collect(now)
        self._retry_throttled(now)
        self._retry_stalled(now)
        while self._timers and self._timers[0][0] <= now:
            self.attempt(heapq.heappop(self._timers)[2], now)
        try:
            self.service.tick(now)
        except (JournalBusy, KeeperUnavailable):
            self._tick_again = now + _RETRY
        self._drop_slow(now)
        self.acceptor.resume(now)

    def _drop_slow(self, now: float) -> None:
        """Closes the connections whose time to ask, or to read, is over."""
        for connection in self.in_flight.deaf(now):
            log.warning("pid %d does not read its answers, dropped", connection.session.pid)
            self.drop(connection)
        while self._slow:
            oldest = next(iter(self._slow))
            if now < (oldest.slow_since or 0.0) + self.service.limits.request_timeout:
                break
            if self._is_held_up(oldest):
                self._end_slow(oldest)
                self._take_stock(oldest, now)
                continue
            log.warning("pid %d is too slow, dropped", oldest.session.pid)
            self.drop(oldest)

    def _is_held_up(self, connection: Connection) -> bool:
        """True if the client has read all that it was sent, and waits only because the descriptors
        in flight to others leave no room."""
        return (
            connection.throttled
            and connection.receiver.idle
            and self.in_flight.has_read(connection)
        )

    def attempt(self, change: Callable[[float], None], now: float) -> None:
        """Makes a change that no request asked for; later again if the keeper cannot take it
        now."""
        try:
            change(now)
        except (JournalBusy, KeeperUnavailable):
            self.later(_RETRY, change)
        except FdshareError:
            log.exception("a change failed")

    def later(self, delay: float, change: Callable[[float], None]) -> None:
        """Attempts *change* in *delay* seconds. Only in the loop's thread."""
        heapq.heappush(self._timers, (time.monotonic() + delay, next(self._order), change))
