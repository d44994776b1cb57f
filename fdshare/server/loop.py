"""Server: the event loop. One thread; accepts, reads, writes, keeps time, and never blocks.

The loop is the `World` of a `Service` (see world.py) and the owner of every connection. The order
of one turn: wait, accept, read and serve, write, then what is due. A connection is *slow* while a
request is half sent, an answer unread or the Hello missing, and slow ones are dropped in time; an
idle one never is, until the door is full.
"""

from __future__ import annotations

import array
import fcntl
import heapq
import logging
import socket
import termios
import threading
import time
from collections.abc import Callable
from itertools import count
from typing import Final

from fdshare.errors import (
    DescriptorLimit,
    FdshareError,
    KeeperUnavailable,
    ProtocolError,
)
from fdshare.kernel.ancillary import Rights, receive_into, rights, send_rights
from fdshare.kernel.descriptor import Descriptor
from fdshare.protocol import messages as m
from fdshare.protocol.wire import Frame, header
from fdshare.server.connection import Connection
from fdshare.server.contract import JournalBusy
from fdshare.server.door import Door
from fdshare.server.handles import Handle
from fdshare.server.poller import ERROR, HANGUP, READ, WRITE, Poller
from fdshare.server.quick import Asked, answer
from fdshare.server.service import Service

__all__ = ["Loop"]

log = logging.getLogger("fdshare.server")

_BUFFER: Final = 1 << 16  # bytes a read takes at most, so that one client cannot fill a turn
_BACKPRESSURE: Final = 1 << 16  # bytes of unread answers above which a client is not served
_RETRY: Final = 0.005  # seconds until a throttled connection is looked at again


class Loop:
    """Turns readiness into calls. `service`, `door` and `closer` are set by who builds it."""

    service: Service
    door: Door

    def __init__(self, close_handle: Callable[[Handle], None]) -> None:
        self.poller = Poller()
        self.connections: dict[Connection, None] = {}  # in the order of their last request
        self.in_flight = 0
        self._close_handle = close_handle
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._slow: dict[Connection, None] = {}
        self._asked = Asked()
        self._throttled: set[Connection] = set()
        self._stalled: dict[Connection, None] = {}
        self._timers: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()
        self._posted: list[Callable[[], None]] = []
        self._post_lock = threading.Lock()
        self._tick_again = 0.0  # not before, for the keeper could not take what was due
        self._retry_at = 0.0  # when the throttled and the stalled are looked at; 0: not set
        self._stopping = False
        self._interrupted = False
        self._wake, self._waker = socket.socketpair()
        for end in (self._wake, self._waker):
            end.setblocking(False)
        self.poller.register(self._wake.fileno(), READ, self._on_wake)

    # Running and stopping.

    def run(self) -> bool:
        """Serves until `stop()`, the connections are closed then; or until `interrupt()`: True, and
        it is to be called again."""
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
        """Waits once, and does all that came of it."""
        due = self._next_due()
        timeout = None if due is None else max(due - time.monotonic(), 0.0)
        ready = self.poller.wait(timeout)
        now = time.monotonic()
        for key, events in ready:
            if type(key) is Connection:
                if events == READ and not key.closed:
                    self._read(key, now)
                else:
                    self._on_connection(key, events, now)
            else:
                key(events, now)  # type: ignore[operator]
        if due is not None and due <= now:
            self._do_due(now)

    def stop(self) -> None:
        """Makes `run` return soon; from any thread, or a signal handler."""
        self._stopping = True
        self._wake_up()

    def interrupt(self) -> None:
        """Makes `run` return after this turn, with everything as it is; from the loop's thread."""
        self._interrupted = True

    def post(self, call: Callable[[], None]) -> None:
        """Has *call* made by the loop's thread; from any thread."""
        with self._post_lock:
            self._posted.append(call)
        self._wake_up()

    def abandon(self) -> None:
        """In a forked child: the connections are the parent's."""
        self.poller.close()
        for connection in self.connections:
            connection.sock.detach()
        self._wake.detach()
        self._waker.detach()

    def close(self) -> None:
        self.poller.close()
        self._wake.close()
        self._waker.close()

    def _wake_up(self) -> None:
        try:
            self._waker.send(b"\0")
        except (BlockingIOError, OSError):
            pass  # full: it will wake anyway; closed: nobody is there to wake

    def _on_wake(self, events: int, now: float) -> None:
        try:
            self._wake.recv(4096)
        except BlockingIOError:
            pass
        with self._post_lock:
            calls, self._posted = self._posted, []
        for call in calls:
            call()

    def _finish(self) -> None:
        """Gives the last answers a moment to leave."""
        deadline = time.monotonic() + 1.0
        while any(c.output for c in self.connections) and time.monotonic() < deadline:
            for connection in list(self.connections):
                self.flush(connection, time.monotonic())
            self.poller.wait(_RETRY)

    # Time.

    def _next_due(self) -> float | None:
        """When `_do_due` has something to do; None: not before something else happens."""
        if self._throttled or self._stalled:
            # Set once and not anew in each turn: others who keep us busy must not put it off.
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
        if (paused := self.door.paused_until) is not None:
            due = paused if due is None else min(due, paused)
        return due

    def _do_due(self, now: float) -> None:
        self._retry_at = 0.0
        for connection in list(self._throttled):
            self._throttled.discard(connection)
            self.flush(connection, now)
            self._resume(connection, now)
        for connection in list(self._stalled):
            self._stalled.pop(connection, None)
            self._resume(connection, now)
        while self._timers and self._timers[0][0] <= now:
            self.attempt(heapq.heappop(self._timers)[2], now)
        try:
            self.service.tick(now)
        except (JournalBusy, KeeperUnavailable):
            self._tick_again = now + _RETRY
        while self._slow:
            oldest = next(iter(self._slow))
            if now < (oldest.slow_since or 0.0) + self.service.limits.request_timeout:
                break
            if self._is_held_up(oldest):
                self._end_slow(oldest)
                self._mark_slow(oldest, now)
                continue
            log.warning("pid %d is too slow, dropped", oldest.session.pid)
            self.drop(oldest)
        self.door.reopen(now)

    def _is_held_up(self, connection: Connection) -> bool:
        """True where it has read all that it was sent, and waits for us because of others: what is
        in flight to them leaves no room."""
        if connection not in self._throttled or not connection.receiver.idle:
            return False
        self._measure(connection)
        return not connection.in_flight

    def attempt(self, change: Callable[[float], None], now: float) -> None:
        """Makes a change that nobody asked for; again later if the keeper cannot take it now."""
        try:
            change(now)
        except (JournalBusy, KeeperUnavailable):
            self.later(_RETRY, change)
        except FdshareError:
            log.exception("a change failed")

    def later(self, delay: float, change: Callable[[float], None]) -> None:
        """Attempts *change* in *delay* seconds; from the loop's thread."""
        heapq.heappush(self._timers, (time.monotonic() + delay, next(self._order), change))

    # One connection.

    def add(self, connection: Connection) -> None:
        self.connections[connection] = None
        connection.interest = READ
        self.poller.register(connection.fileno(), READ, connection)
        self._slow[connection] = None

    def drop(self, connection: Connection) -> None:
        """Closes it and forgets all that waited for it."""
        if connection.closed:
            return
        connection.closed = True
        self.connections.pop(connection, None)
        self._slow.pop(connection, None)
        self._throttled.discard(connection)
        self._stalled.pop(connection, None)
        self.poller.unregister(connection.fileno())
        self._hang_up(connection.sock)
        self.in_flight -= connection.in_flight
        unanswered = bool(connection.output)
        for output in connection.output:
            self.unpin(output.handles)
        connection.output.clear()
        for handle in connection.receiver.drain():
            self._close_handle(handle)
        for frame in connection.pending:
            self._close_all(frame.descriptors)
        connection.pending.clear()
        self.service.disconnected(connection.session, time.monotonic(), unanswered=unanswered)
        self.door.left(connection)

    def _hang_up(self, sock: socket.socket) -> None:
        """Closes *sock*; elsewhere if something is unread, for a descriptor in it may be the last
        of a file whose close blocks."""
        try:
            sock.shutdown(socket.SHUT_RD)  # nothing comes after we have looked
            unread = array.array("i", [0])
            fcntl.ioctl(sock, termios.FIONREAD, unread)
        except OSError:  # the peer is gone: look no further
            unread = array.array("i", [1])
        if unread[0]:
            self._close_handle(Handle(Descriptor(sock.detach())))
        else:
            sock.close()

    def _on_connection(self, connection: Connection, events: int, now: float) -> None:
        if connection.closed:
            return
        if events & WRITE:
            self.flush(connection, now)
            if connection.pending:
                self._resume(connection, now)
        if events & (READ | HANGUP | ERROR) and not connection.closed:
            if connection.interest & READ:
                self._read(connection, now)
            elif events & (HANGUP | ERROR):
                self.drop(connection)

    def _read(self, connection: Connection, now: float) -> None:
        try:
            count, descriptors, lost = receive_into(connection.sock, self._buffer)
        except BlockingIOError:
            return
        except OSError:
            self.drop(connection)
            return
        if not count:
            self.drop(connection)
            return
        if (
            not descriptors
            and lost is None
            and connection.receiver.idle
            and connection.greeted
            and not (connection.output or connection.pending or connection.draining)
            and self._answered_at_once(connection, self._view[:count].tobytes(), now)
        ):
            return
        if lost is not None:
            lost = self._own_limit(lost)
        handles = [Handle(d) for d in descriptors] if descriptors else []
        receiver = connection.receiver
        frames = receiver.feed(self._view[:count], handles, lost)
        connection.last_active = now
        if frames:
            self._end_slow(connection)  # a request was complete: the clock starts anew
            # To the end of the order: the front is who has been idle longest.
            self.connections.pop(connection, None)
            self.connections[connection] = None
            self._serve(connection, frames, now)
        if receiver.failure is not None and not connection.closed:
            self.expel(connection, receiver.failure, now)
        if connection.output or not receiver.idle or connection.slow_since is not None:
            self._mark_slow(connection, now)

    def _answered_at_once(self, connection: Connection, data: bytes, now: float) -> bool:
        """The shortest way through the server (see quick.py), for a read that is one fetch: True
        where it was. Everything here is also done, more generally, on the long way round."""
        name = self._asked.name_in(data)
        if name is None:
            return False
        entry = self.service.quick_fetch(connection.session, name)
        if entry is None:
            return False
        connection.last_active = now
        del self.connections[connection]
        self.connections[connection] = None
        frame, fds, count = answer(entry, data)
        if not self._sent_at_once(connection, frame, fds, count):
            connection.queue(frame, entry.handles)
            self.flush(connection, now)
        return True

    def _serve(self, connection: Connection, frames: list[Frame[Handle]], now: float) -> None:
        """Handles *frames* in order, or keeps those that have to wait."""
        for index, frame in enumerate(frames):
            if connection.closed or connection.draining:
                self._close_all(frame.descriptors)
            elif self._busy(connection) or not self._handle(connection, frame, now):
                connection.pending.extend(frames[index:])
                self._update(connection)
                return

    def _resume(self, connection: Connection, now: float) -> None:
        """Goes on with the frames that had to wait."""
        while connection.pending and not connection.closed and not self._busy(connection):
            # Taken off first: a drop while it is served must not close its descriptors again.
            frame = connection.pending.popleft()
            if not self._handle(connection, frame, now):
                connection.pending.appendleft(frame)
                break
        if not connection.closed:
            self._update(connection)

    def _busy(self, connection: Connection) -> bool:
        """True where the client has to read before more is done for it."""
        return bool(connection.output) and (
            connection.output_bytes > _BACKPRESSURE or connection in self._throttled
        )

    def _handle(self, connection: Connection, frame: Frame[Handle], now: float) -> bool:
        """Carries out one frame. False where it must be tried again: nothing has happened then."""
        handles = frame.descriptors
        request: m.AnyRequest | None = None
        try:
            if not connection.greeted:
                self.door.greet(connection, frame, now)
                kept = False
            elif frame.lost is not None:
                raise frame.lost
            else:
                request = m.decode_request(frame.body)
                kept = self.service.handle(connection.session, frame.id, request, handles, now)
        except JournalBusy as busy:
            if self._may_stall(connection, now, busy.wait):
                return False
            self._refuse(connection, frame.id, KeeperUnavailable(busy.reason), request)
            kept = False
        except ProtocolError as error:
            self.expel(connection, error, now)
            kept = False
        except FdshareError as error:
            self._refuse(connection, frame.id, error, request)
            kept = False
        except Exception as error:
            log.exception("a request could not be handled")
            failure = FdshareError(f"the server failed: {error!r}")
            self._refuse(connection, frame.id, failure, request)
            kept = False
        connection.stalled_since = None
        if not kept:
            self._close_all(handles)
        return True

    def _may_stall(self, connection: Connection, now: float, wait: float) -> bool:
        since = connection.stalled_since
        if since is None:
            connection.stalled_since = now
        elif now - since > self.service.limits.journal_timeout + wait:
            return False
        self._stalled[connection] = None
        return True

    def _refuse(
        self,
        connection: Connection,
        id: int,
        error: FdshareError,
        request: m.AnyRequest | None,
    ) -> None:
        self.service.refused(connection.session, request, error)
        self.send(connection, id, m.encode(m.refusal(error)), ())

    def expel(self, connection: Connection, error: FdshareError, now: float) -> None:
        """One error frame, and the door."""
        self.service.refused(connection.session, None, error)
        connection.draining = True
        self.send(connection, 0, m.encode(m.refusal(error)), ())

    @staticmethod
    def _own_limit(lost: FdshareError) -> FdshareError:
        """What receiving failed on, as the sender has to be told it."""
        if isinstance(lost, DescriptorLimit):
            fields = {**lost.fields, "whose": "server", "advice": "unregister some or raise it"}
            return DescriptorLimit(**fields)
        return lost

    # Sending.

    def send(
        self,
        connection: Connection,
        id: int,
        body: bytes,
        handles: tuple[Handle, ...],
        *,
        further: bool = False,
    ) -> None:
        """Queues a frame and sends what can be sent now. One too many ends the connection, unless
        it is a *further* part of an answer: what was asked for is sent whole."""
        if connection.closed:
            return
        frame = header(len(body), len(handles), id) + body
        fds = rights([handle.fd for handle in handles]) if handles else ()
        if not connection.output and self._sent_at_once(connection, frame, fds, len(handles)):
            return
        connection.queue(frame, handles)
        if len(connection.output) == 1:
            self.flush(connection, connection.last_active)
        elif connection.output_bytes > self.service.limits.max_output and not further:
            log.warning("pid %d does not read its answers, dropped", connection.session.pid)
            self.drop(connection)

    def _sent_at_once(self, connection: Connection, frame: bytes, fds: Rights, count: int) -> bool:
        """The common case, without a queue: True where the whole frame has gone, and its *count*
        descriptors *fds*."""
        limits = self.service.limits
        if connection.draining or (
            count
            and (
                connection.in_flight + count > limits.in_flight_per_connection
                or self.in_flight + count > limits.in_flight
            )
        ):
            return False
        try:
            sent = send_rights(connection.sock, (frame,), fds)
        except (BlockingIOError, DescriptorLimit):
            return False
        except OSError:
            self.drop(connection)
            return True
        connection.in_flight += count
        self.in_flight += count
        if sent < len(frame):
            connection.queue(frame[sent:], ())
            self._mark_slow(connection, connection.last_active)
            self._update(connection)
        return True

    def flush(self, connection: Connection, now: float) -> None:
        """Sends from the queue until it is empty, the socket full, or too much in flight."""
        before = connection.output_bytes
        try:
            while connection.output and not connection.closed:
                count = len(connection.output[0].handles)
                if count and not self._may_fly(connection, count):
                    self._throttled.add(connection)
                    break
                gone = connection.send_next()
                if gone is None:
                    break
                if gone:
                    self.in_flight += len(gone)
                    self.unpin(gone)
        except DescriptorLimit:
            self._throttled.add(connection)
        except OSError:
            self.drop(connection)
            return
        if connection.closed:
            return
        if connection.output_bytes < before and connection.greeted:
            self._end_slow(connection)  # the client reads, however slowly
        if not connection.output:
            self._emptied(connection, now)
        self._mark_slow(connection, now)
        self._update(connection)

    def _emptied(self, connection: Connection, now: float) -> None:
        if connection.draining:
            self.drop(connection)
            return
        if connection.overflowed:
            connection.overflowed = False
            connection.stale = list(connection.session.watches)
            self.send(connection, 0, m.encode(m.Overflowed()), ())
        # No more than the client reads: thousands of watches times thousands of names would be a
        # second overflow.
        stale, connection.stale = connection.stale, []
        while stale and not connection.closed and connection.output_bytes <= _BACKPRESSURE:
            watch = stale.pop()
            if watch in connection.session.watches:
                self.service.snapshot(connection.session, watch)
        connection.stale += stale

    def _may_fly(self, connection: Connection, count: int) -> bool:
        """True where *count* more descriptors unread keep within both budgets."""
        limits = self.service.limits
        if connection.in_flight + count > limits.in_flight_per_connection:
            self._measure(connection)
            if connection.in_flight and (
                connection.in_flight + count > limits.in_flight_per_connection
            ):
                return False
        if self.in_flight + count > limits.in_flight:
            for other in self.connections:
                self._measure(other)
            return not self.in_flight or self.in_flight + count <= limits.in_flight
        return True

    def measure(self) -> int:
        """How many descriptors were sent and not yet read."""
        for connection in self.connections:
            self._measure(connection)
        return self.in_flight

    def _measure(self, connection: Connection) -> None:
        before = connection.in_flight
        if before and not connection.unread():
            self.in_flight -= before

    def _update(self, connection: Connection) -> None:
        """Asks the poller for what can be used: no reading while something waits to be served."""
        if connection.closed:
            return
        interest = 0
        if not connection.pending and not connection.draining and not self._busy(connection):
            interest |= READ
        if connection.output and connection not in self._throttled:
            interest |= WRITE
        if interest != connection.interest:
            connection.interest = interest
            self.poller.modify(connection.fileno(), interest)

    def _mark_slow(self, connection: Connection, now: float) -> None:
        """Starts or ends the clock for half-sent requests and unread answers."""
        if connection.closed:
            return
        slow = not connection.greeted or not connection.receiver.idle or bool(connection.output)
        if not slow:
            self._end_slow(connection)
        elif connection.slow_since is None:
            connection.slow_since = now
            self._slow[connection] = None

    def _end_slow(self, connection: Connection) -> None:
        if connection.slow_since is not None:
            connection.slow_since = None
            self._slow.pop(connection, None)

    def unpin(self, handles: tuple[Handle, ...]) -> None:
        for handle in handles:
            handle.pins -= 1
            if handle.closing and not handle.pins:
                self._close_handle(handle)

    def _close_all(self, handles: list[Handle]) -> None:
        for handle in handles:
            self._close_handle(handle)
