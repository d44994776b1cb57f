"""Input: receives from the connections, and has their requests served.

A request that cannot be served now is kept, with those behind it: its client has to read its
answers first, or the keeper to take the change, or inspections to end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from fdshare.errors import (
    DescriptorLimit,
    DescriptorRefused,
    FdshareError,
    KeeperUnavailable,
    ProtocolError,
    QuotaExceeded,
)
from fdshare.kernel.descriptor_limit import descriptor_limit
from fdshare.protocol import messages as m
from fdshare.protocol.framing import Frame
from fdshare.server.core.ports import JournalBusy
from fdshare.server.core.service import Service
from fdshare.server.loop.acceptor import Acceptor
from fdshare.server.loop.closing import Closer, Handle
from fdshare.server.loop.connection import Connection
from fdshare.server.loop.fast_path import FetchFrames, reply_frame
from fdshare.server.loop.intake import NotNow
from fdshare.server.loop.output import SLICE, Output
from fdshare.server.loop.poller import ERROR, HANGUP, READ, WRITE

__all__ = ["Input"]

log = logging.getLogger("fdshare.server")

_PAUSE: Final = 0.05  # seconds until a connection is read again whose user has too many numbers
_BUFFER: Final = 1 << 16  # bytes that one read takes at most, so that others get their turn, too


class Input(Output):
    """Turns what is readable into requests, and these into calls of the service."""

    acceptor: Acceptor

    def __init__(self, service: Service, closer: Closer, nofile: int) -> None:
        super().__init__(service, closer, nofile)
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._fetch_frames = FetchFrames()

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
            count, handles, lost = self.intake.receive(connection, self._buffer)
        except BlockingIOError:
            return
        except NotNow:
            self._pause(connection)
            return
        except (DescriptorLimit, QuotaExceeded) as error:
            mine = self.intake.open_of(connection.session.user)
            if self._make_numbers(connection, mine):
                self._pause(connection)
            else:
                self.expel(connection, error)
            return
        except OSError:
            self.drop(connection)
            return
        if not count:
            self.drop(connection)
            return
        if self.intake.is_short:
            self._make_numbers(connection)
        if (
            not handles
            and lost is None
            and connection.receiver.idle
            and connection.greeted
            and not (connection.output or connection.pending or connection.draining)
            and self._answered_at_once(connection, self._view[:count].tobytes(), now)
        ):
            return
        if lost is not None:
            self.closer.close(handles)  # those that found a number
            handles = []
            if isinstance(lost, DescriptorLimit):  # to the sender, the receiver is the server
                lost = descriptor_limit(lost.errno, "server")
            elif isinstance(lost, DescriptorRefused):
                lost = DescriptorRefused("server")
        receiver = connection.receiver
        frames = receiver.feed(self._view[:count], handles, lost)
        if frames:
            if connection.slow_since is not None:
                self._end_slow(connection)  # a whole request has come: its time starts anew
            if not connection.aside:
                self.idle[connection.session.user].move_to_end(connection)
            self._serve(connection, frames, now)
        if receiver.failure is not None and not connection.closed:
            self.expel(connection, receiver.failure)
        if connection.received or connection.pending or not receiver.idle or receiver.failure:
            self.intake.recount(connection)
        if (
            connection.output
            or not receiver.idle
            or connection.slow_since is not None
            or connection.session.waiting
            or connection.session.watches
        ):
            self._take_stock(connection, now)
            if connection.pending or not receiver.idle:
                self._check_buffers(connection)

    def _make_numbers(self, reader: Connection, least: int | None = None) -> bool:
        """Drops the connection that `gives_way`, so that others get numbers. False if there is
        none but *reader*."""
        connection = self.intake.gives_way(least)
        if connection is None or connection is reader:
            return False
        if (refusal := self.intake.refusal(connection.session.user)) is not None:
            self.expel(connection, refusal)
        self.drop(connection)
        return True

    def _pause(self, connection: Connection) -> None:
        """Reads nothing from the connection for a moment."""
        connection.paused = True
        self._update(connection)
        self.later(_PAUSE, lambda now: self._go_on(connection))

    def _go_on(self, connection: Connection) -> None:
        connection.paused = False
        self._update(connection)

    def later(self, delay: float, change: Callable[[float], None]) -> None:
        """Attempts *change* in *delay* seconds."""
        raise NotImplementedError

    def _check_buffers(self, connection: Connection) -> None:
        """Hears the connection no more if too much is kept for its user, some of it for this
        one."""
        refusal = self.buffers.refusal(connection.session.user)
        if refusal is not None and not connection.closed:
            self.expel(connection, refusal)
            self.drop(connection)

    def _answered_at_once(self, connection: Connection, data: bytes, now: float) -> bool:
        """The fast path (fast_path.py): True if *data* was one fetch, which is answered now. The
        usual path does all of this, too."""
        names = self._fetch_frames.names_in(data)
        if names is None:
            return False
        entry = self.service.fetch_again(connection.session, names)
        if entry is None:
            return False
        if not connection.aside:
            self.idle[connection.session.user].move_to_end(connection)
        frame, fds, count = reply_frame(entry, data)
        if not self._sent_at_once(connection, frame, fds, count):
            connection.queue(frame, entry.handles)
            self.flush(connection, now)
        return True

    def _serve(self, connection: Connection, frames: list[Frame[Handle]], now: float) -> None:
        """Handles *frames* in order, and keeps those that have to wait."""
        for index, frame in enumerate(frames):
            late = index > 0 and time.monotonic() - now > SLICE
            busy = late or ((connection.output or connection.inspecting) and self._busy(connection))
            if connection.closed or connection.draining:
                self.closer.close(frame.descriptors)
            elif busy or not self._handle(connection, frame, now):
                if late:
                    self.queue.put(connection)
                connection.pending.extend(frames[index:])
                self._update(connection)
                return

    def _resume(self, connection: Connection, now: float) -> None:
        """Handles the frames that had to wait, as far as possible."""
        while connection.pending and not connection.closed and not self._busy(connection):
            # Removed first: a drop while it is served must not close its descriptors again.
            frame = connection.pending.popleft()
            self.intake.take(connection, len(frame.descriptors))
            if not self._handle(connection, frame, now):
                connection.pending.appendleft(frame)
                break
            if connection.pending and time.monotonic() - now > SLICE:
                self.queue.put(connection)
                break
        if not connection.closed:
            self.intake.recount(connection)
            self.buffers.recount(connection)
            self._update(connection)

    def inspected(self, connection: Connection, reserved: int) -> None:
        """An `info` of this client has been answered, for which so much was *reserved*."""
        connection.inspecting -= 1
        connection.reserved -= reserved
        self._resume(connection, time.monotonic())

    def _handle(self, connection: Connection, frame: Frame[Handle], now: float) -> bool:
        """Carries out one request. False if it must be tried again: nothing has happened then."""
        handles = frame.descriptors
        request: m.AnyRequest | None = None
        try:
            if not connection.greeted:
                self.acceptor.greet(connection, frame)
                kept = False
            elif frame.lost is not None:  # not raised: it would keep the frame, which has it
                self._refuse(connection, frame.id, frame.lost, None)
                kept = False
            else:
                request = m.decode_request(frame.body)
                user = connection.session.user
                if user.buffered and (full := self.buffers.refusal(user)) is not None:
                    raise full
                kept = self.service.handle(connection.session, frame.id, request, handles, now)
        except JournalBusy as busy:
            if self._may_stall(connection, now, busy.wait):
                return False
            self._refuse(connection, frame.id, KeeperUnavailable(busy.reason), request)
            kept = False
        except ProtocolError as error:
            self.expel(connection, error)
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
            self.closer.close(handles)
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
        self.answer(connection.session, id, m.encode(m.refusal(error)))

    def expel(self, connection: Connection, error: FdshareError) -> None:
        """Sends one error frame, and closes the connection after it."""
        self.service.refused(connection.session, None, error)
        connection.draining = True
        self.answer(connection.session, 0, m.encode(m.refusal(error)))

    # What would have made an earlier turn too long.

    def _put_off(self, connection: Connection, events: int) -> None:
        """Handles *events* when it is the turn of its user."""
        if not connection.closed:
            connection.reported = events
            self.queue.put(connection)

    def _unwatch(self, connection: Connection) -> None:
        """Has no more events reported until those that were put off are handled."""
        if connection.reported and connection.watched and not connection.closed:
            self.poller.unregister(connection.fileno())
            connection.watched = False

    def _serve_next(self, connection: Connection, now: float) -> None:
        """Goes on with its requests, and handles what was reported of it."""
        if connection.pending:
            self._resume(connection, now)
        events, connection.reported = connection.reported, 0
        if events:
            self._on_connection(connection, events, now)
        if connection.watched or connection.closed:
            return
        try:
            self.poller.register(connection.fileno(), connection.interest, connection)
            connection.watched = True
        except OSError as error:  # ENOSPC, epoll_ctl(2)
            log.error("a connection cannot be watched: %s", error)
            self.drop(connection)

    def _retry_stalled(self, now: float) -> None:
        """Repeats the requests that wait for the keeper, until one of them has to wait again: it
        stays the first, and those behind it cost nothing."""
        while self._stalled:
            connection = next(iter(self._stalled))
            del self._stalled[connection]
            self._resume(connection, now)
            if connection in self._stalled:
                self._stalled.move_to_end(connection, last=False)
                break
