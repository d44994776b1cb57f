"""Output: sends to the connections, and limits what a client can leave unread.

A frame is sent at once if the socket takes it, or waits in its connection's queue. Descriptors sent
and not yet read are counted, for each connection and in all: the kernel counts them against the
whole user. A connection is *slow* while a request is half sent, an answer unread or the Hello
missing.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Final

from fdshare.errors import DescriptorLimit
from fdshare.kernel.ancillary import Rights, rights, send_rights
from fdshare.protocol import messages as m
from fdshare.protocol.framing import header
from fdshare.server.core.ports import Session
from fdshare.server.core.service import Service
from fdshare.server.core.users import User
from fdshare.server.loop.buffers import Buffers
from fdshare.server.loop.closing import Closer, Handle
from fdshare.server.loop.connection import NO_MEMORY, Connection
from fdshare.server.loop.disconnecting import Disconnector
from fdshare.server.loop.idle import Idle
from fdshare.server.loop.in_flight import InFlight
from fdshare.server.loop.intake import Intake
from fdshare.server.loop.keeper_closes import KeeperCloses
from fdshare.server.loop.poller import READ, WRITE, Poller
from fdshare.server.loop.run_queue import RunQueue

__all__ = ["SLICE", "Output"]

log = logging.getLogger("fdshare.server")

_OUTPUT_FOR_EVENTS: Final = 1 << 20  # bytes queued above which a watcher is sent no more events
_BACKPRESSURE: Final = 1 << 16  # bytes of unread answers above which a client is not served
# An answer that is not written yet counts no bytes, and a request of a few bytes asks for
# megabytes.
_INSPECTIONS: Final = 4  # `info` requests of one client under way: with so many it is not served

# Seconds in which one turn of the loop serves those that are ready; then it accepts connections
# (acceptor.py). What was begun then is done: one request, or the end of a connection. After that
# the poller is asked again, so this is how long nobody looks at a request that comes.
SLICE: Final = 0.0005
_RETRIED: Final = 16  # waiting connections of one user that are sent to in one turn


class Output:
    """Every connection: what is sent on it, and how it ends."""

    def __init__(self, service: Service, closer: Closer, nofile: int) -> None:
        self.service = service
        self.closer = closer
        self.poller = Poller()
        self.disconnector = Disconnector(closer, self.poller, nofile // 4)
        self.connections: dict[Connection, None] = {}
        self.keeper_closes = KeeperCloses()
        self.intake = Intake(
            service.table, service.limits, nofile, closer, self.keeper_closes, self.connections
        )
        self.users: dict[int, User] = {}  # those who have connections
        self.idle: dict[User, Idle] = {}
        self.buffers = Buffers(service.limits)
        self.in_flight = InFlight(service.limits)
        self._slow: dict[Connection, None] = {}
        # Who waits until others have read, each user's in their order.
        self._throttled: dict[User, OrderedDict[Connection, None]] = {}
        self._stalled: OrderedDict[Connection, None] = OrderedDict()
        self.queue = RunQueue()

    def add(self, connection: Connection) -> None:
        """Raises: OSError of epoll_ctl(2): nothing has changed then."""
        self.poller.register(connection.fileno(), READ, connection)
        connection.interest = READ
        self.connections[connection] = None
        user = connection.session.user
        user.connections += 1
        self.users[user.uid] = user
        self.idle.setdefault(user, Idle())[connection] = None
        self._slow[connection] = None

    def drop(self, connection: Connection) -> None:
        """Closes it, and ends all that was done for it."""
        if connection.closed:
            return
        connection.closed = True
        self.connections.pop(connection, None)
        self.idle[connection.session.user].forget(connection)
        self._count_out(connection.session.user)
        self._slow.pop(connection, None)
        self._unthrottle(connection)
        self._stalled.pop(connection, None)
        self.queue.forget(connection)
        self.poller.unregister(connection.fileno())
        self.disconnector.disconnect(connection.sock, connection.session.user.uid)
        self.in_flight.forget(connection)
        self.intake.forget(connection)
        self.buffers.forget(connection)
        unanswered = bool(connection.output or connection.session.owed)
        for output in connection.output:
            connection.not_unsent(output.handles)
            self.unpin(output.handles)
        connection.output.clear()
        self.closer.close(connection.receiver.drain())
        for frame in connection.pending:
            self.closer.close(frame.descriptors)
        connection.pending.clear()
        self.service.disconnected(connection.session, time.monotonic(), unanswered=unanswered)
        # What it has received and not sent is free now, and not at the next garbage collection.
        connection.session.route = None

    def _count_out(self, user: User) -> None:
        user.connections -= 1
        if not user.connections:
            del self.users[user.uid], self.idle[user]

    # Sending.

    def answer(
        self,
        session: Session,
        id: int,
        body: bytes,
        handles: Sequence[Handle] = (),
        *,
        further: bool = False,
    ) -> None:
        """Queues a frame and sends what can be sent now. Beyond `max_output` the connection is
        closed, unless the frame is a *further* part of an answer, which is sent whole."""
        connection: Connection | None = session.route
        if connection is None:
            return
        if connection.aside:
            self.idle[session.user].restore(connection)
        frame = header(len(body), len(handles), id) + body
        fds = rights([handle.fd for handle in handles]) if handles else ()
        if not connection.output and self._sent_at_once(connection, frame, fds, len(handles)):
            return
        connection.queue(frame, tuple(handles))
        self.buffers.recount(connection)
        if len(connection.output) == 1:
            self.flush(connection, time.monotonic())
        elif connection.output_bytes > self.service.limits.max_output and not further:
            log.warning("pid %d does not read its answers, dropped", session.pid)
            self.drop(connection)

    def answer_in_parts(self, session: Session, id: int, bodies: Sequence[bytes]) -> None:
        """Sends all of *bodies*, however long they are together."""
        for number, body in enumerate(bodies):
            self.answer(session, id, body, further=number > 0)

    def publish(self, sessions: Sequence[Session], body: bytes) -> None:
        """Sends an event; a client that does not read is sent fresh snapshots later instead."""
        for session in sessions:
            connection: Connection | None = session.route
            if connection is None:
                continue
            full = connection.output and self.buffers.refusal(session.user) is not None
            if connection.overflowed or full or connection.output_bytes > _OUTPUT_FOR_EVENTS:
                connection.overflowed = True
            else:
                self.answer(session, 0, body)

    def _sent_at_once(self, connection: Connection, frame: bytes, fds: Rights, count: int) -> bool:
        """The common case, without a queue: True where the whole frame has gone, and its *count*
        descriptors *fds*."""
        if connection.draining or (count and not self.in_flight.fits(connection, count)):
            return False
        try:
            sent = send_rights(connection.sock, (frame,), fds)
        except OSError:
            return False  # flush() tries again with the frame in the queue, and handles the error
        if count:
            self.in_flight.sent(connection, count)
        if sent < len(frame):
            connection.queue(frame[sent:], ())
            self._take_stock(connection, time.monotonic())
            self._update(connection)
        return True

    def flush(self, connection: Connection, now: float) -> None:
        """Sends from the queue until it is empty, the socket full, or too much in flight."""
        before = connection.output_bytes
        try:
            while connection.output and not connection.closed:
                count = len(connection.output[0].handles)
                if count and not self.in_flight.makes_room(connection, count, now):
                    self._throttle(connection)
                    break
                gone = connection.send_next()
                if gone is None:
                    break
                if gone:
                    self.in_flight.sent(connection, len(gone))
                    self.unpin(gone)
        except OSError as error:
            if not isinstance(error, DescriptorLimit) and error.errno not in NO_MEMORY:
                self.drop(connection)
                return
            self._throttle(connection)
        if connection.closed:
            return
        if connection.output_bytes < before and connection.greeted:
            self._end_slow(connection)  # the client reads
        if not connection.output:
            self._emptied(connection)
        self._take_stock(connection, now)
        self._update(connection)

    def _emptied(self, connection: Connection) -> None:
        if connection.draining:
            self.drop(connection)
            return
        if connection.aside:
            self.idle[connection.session.user].restore(connection)
        if connection.overflowed:
            if self.buffers.refusal(connection.session.user) is not None:
                log.warning("uid %d does not read its events", connection.session.user.uid)
                self.drop(connection)
                return
            connection.overflowed = False
            connection.stale = list(connection.session.watches)
            self.answer(connection.session, 0, m.encode(m.Overflowed()))
        # No more than the client reads: thousands of watches with thousands of names each would
        # overflow again.
        stale, connection.stale = connection.stale, []
        while stale and not connection.closed and connection.output_bytes <= _BACKPRESSURE:
            watch = stale.pop()
            if watch in connection.session.watches:
                self.service.snapshot(connection.session, watch)
        connection.stale += stale

    # Waiting until others have read.

    def _throttle(self, connection: Connection) -> None:
        connection.throttled = True
        self._throttled.setdefault(connection.session.user, OrderedDict())[connection] = None

    def _unthrottle(self, connection: Connection) -> None:
        connection.throttled = False
        waiting = self._throttled.get(connection.session.user)
        if waiting is not None and connection in waiting:
            del waiting[connection]
            if not waiting:
                del self._throttled[connection.session.user]

    def _retry_throttled(self, now: float) -> None:
        """Sends to some of those who waited, of each user, as long as the budgets have room."""
        if self._throttled:
            self.in_flight.look(now)
        for user, waiting in list(self._throttled.items()):
            self.in_flight.look(now, user)
            for connection in list(islice(waiting, _RETRIED)):
                if not self.in_flight.has_room(user):
                    break
                self._unthrottle(connection)
                self.flush(connection, now)  # who has to wait again is the last one then
                self._resume(connection, now)

    def _resume(self, connection: Connection, now: float) -> None:
        """Goes on with the requests that had to wait."""
        raise NotImplementedError

    # What the poller and the clock are asked for.

    def _busy(self, connection: Connection) -> bool:
        """True where no request of the client is served now: it has to read its answers first, or
        its inspections have to end."""
        return connection.inspecting >= _INSPECTIONS or (
            bool(connection.output)
            and (connection.output_bytes > _BACKPRESSURE or connection.throttled)
        )

    def _update(self, connection: Connection) -> None:
        """Tells the poller what to report: nothing to read while a request waits to be served."""
        if connection.closed:
            return
        interest = 0
        if not (
            connection.pending or connection.draining or connection.paused or self._busy(connection)
        ):
            interest |= READ
        if connection.output and not connection.throttled:
            interest |= WRITE
        if interest != connection.interest:
            connection.interest = interest
            if connection.watched:
                self.poller.modify(connection.fileno(), interest)

    def _take_stock(self, connection: Connection, now: float) -> None:
        """Counts what is kept for the client, and starts or ends the clock for half-sent requests
        and unread answers."""
        if connection.closed:
            return
        self.buffers.recount(connection)
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

    def drop_unsent(self, handles: Iterable[Handle]) -> None:
        """Drops who has not read an answer with one of *handles*, which are let go of: a client
        that comes back asks again. Else they would be open as long as it does not read."""
        for handle in handles:
            for connection in list(handle.unsent or ()):
                assert isinstance(connection, Connection)
                pid = connection.session.pid
                log.warning("pid %d did not read an answer before that was out of date", pid)
                self.drop(connection)

    def unpin(self, handles: tuple[Handle, ...]) -> None:
        for handle in handles:
            handle.pins -= 1
            if handle.closing and not handle.pins:
                self.closer.close((handle,))
