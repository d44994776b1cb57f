"""Acceptor: accepts connections, within the limits, and checks the greeting of each.

Where accept(2) fails because no descriptor is free, accepting pauses: that neither ends the server
nor makes it spin. Where the limit of connections is reached, the longest idle client of the same
uid is closed: one user cannot keep another out, and an idle client loses nothing, for it
reconnects.
"""

from __future__ import annotations

import errno
import hmac
import logging
import os
import socket
import time
from itertools import count
from typing import Final

from fdshare.errors import (
    AuthenticationFailed,
    BadRequest,
    ProtocolError,
    QuotaExceeded,
    VersionMismatch,
)
from fdshare.kernel.ancillary import MAX_DESCRIPTORS, send_message
from fdshare.kernel.credentials import Credentials, is_overflow_uid, peer_credentials
from fdshare.protocol import messages as m
from fdshare.protocol.auth import NONCE_SIZE, prove
from fdshare.protocol.framing import MAX_REQUEST, Frame, header
from fdshare.protocol.names import MAX_SESSION
from fdshare.server.core.policy import Subject
from fdshare.server.core.ports import Session
from fdshare.server.core.users import User, allowance
from fdshare.server.loop.closing import UNKNOWN, Handle
from fdshare.server.loop.connection import Connection
from fdshare.server.loop.output import Output
from fdshare.server.loop.poller import READ

__all__ = ["Acceptor"]

log = logging.getLogger("fdshare.server")

SLICE: Final = 0.00025  # seconds in which one turn of the loop accepts connections
_PAUSE: Final = 0.1  # seconds without accepting, after no descriptor was free for it
# accept(2): errors of the connection that was to be accepted, not of the listener.
_TRY_NEXT: Final = (errno.ECONNABORTED, errno.EPROTO, errno.EINTR)
_NO_ROOM: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Acceptor:
    """Accepts on *listener*, which stays the caller's, for *output*."""

    def __init__(
        self, output: Output, listener: socket.socket, epoch: str, authkey: bytes | None
    ) -> None:
        self._output = output
        self._epoch = epoch
        self._authkey = authkey
        self.accepted = 0
        self.evicted = 0
        self.paused_until: float | None = None  # None: it accepts
        self.is_called = False  # somebody connects, and is to be accepted
        self._connections = 0  # how many there were when it paused
        self._crowded = False  # no connection was accepted since the last pause
        self.accept_at(listener)

    def accept_at(self, listener: socket.socket) -> None:
        """Accepts at *listener*, after `close`."""
        self._listener = listener
        self.paused_until = None
        listener.setblocking(False)
        self._output.poller.register(listener.fileno(), READ, self._on_connect)

    def close(self) -> None:
        """Accepts no more."""
        if self.paused_until is None:
            self._output.poller.unregister(self._listener.fileno())

    @property
    def due(self) -> float:
        """When a pause ends: at once if a connection was closed since, for that freed a
        descriptor."""
        closed = len(self._output.connections) < self._connections
        return 0.0 if closed else self.paused_until or 0.0

    def resume(self, now: float) -> None:
        """Accepts again if a pause is over."""
        if self.paused_until is not None and now >= self.due:
            self.paused_until = None
            self._output.poller.register(self._listener.fileno(), READ, self._on_connect)

    # Accepting.

    def _on_connect(self, events: int, now: float) -> None:
        self.is_called = True

    def accept(self, now: float) -> None:
        """Accepts those who connect, as long as there is time."""
        self.is_called = False
        for number in count():
            # Who knocks without end must not slow down the others.
            if number and time.monotonic() - now > SLICE:
                return
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _TRY_NEXT:
                    continue
                if error.errno not in _NO_ROOM:
                    log.error("accept failed: %s", error)
                elif number:
                    # accept4(2) reserves a number before it looks at the queue, and reports EMFILE
                    # even if that is empty: the poller will tell.
                    return
                self._pause(now)
                return
            uid = UNKNOWN
            try:
                who = peer_credentials(sock)
                uid = who.uid
                self._admit(sock, who, now)
            except OSError as error:  # the client has gone already, or there is no room for it
                log.info("a connection was lost while it was accepted: %s", error)
                self._output.disconnector.disconnect(sock, uid)

    def _pause(self, now: float) -> None:
        """Stops accepting for a moment, and closes an idle connection, if there is one."""
        if not self._crowded:
            log.warning("no descriptor is free for a new connection; accepting pauses")
        self._crowded = True
        self._output.poller.unregister(self._listener.fileno())
        self.paused_until = now + _PAUSE
        self._connections = len(self._output.connections)
        idle = self._longest_idle()
        if idle is not None:
            self._evict(idle)

    def _admit(self, sock: socket.socket, who: Credentials, now: float) -> None:
        self._crowded = False
        sock.setblocking(False)
        overflow = is_overflow_uid(who.uid)
        subject = Subject(who.uid, who.gid, who.groups, who.all_groups, overflow)
        trusted = self._output.service.policy.trusts(subject)
        user = self._output.users.get(who.uid) or User(who.uid, trusted)
        session = Session(subject, who.pid, user)
        refusal = self._make_room(user)
        if refusal is not None:
            self._output.service.refused(session, None, refusal)
            self._turn_away(sock, refusal)
            self._output.disconnector.disconnect(sock, who.uid)
            return
        connection = session.route = Connection(sock, session, now)
        self.accepted += 1
        self._output.add(connection)

    def _refusal(self, user: User) -> QuotaExceeded | None:
        """Why *user* may have no connection more."""
        limits = self._output.service.limits
        used, most = len(self._output.connections), limits.max_connections
        # The last place is the administrator's, who can still ask a full server for its state.
        if used >= most - (not user.trusted):
            return QuotaExceeded("max_connections", most, used)
        if user.trusted or not user.connections:  # with one it can remove what it has
            return None
        share = allowance(limits.max_connections_per_uid, most - 1, used - user.connections)
        if user.connections >= share:
            return QuotaExceeded("max_connections_per_uid", share, user.connections)
        return self._output.intake.refusal(user)

    def _make_room(self, user: User) -> QuotaExceeded | None:
        """Closes an idle connection where *user* may have none more; the refusal where none is
        idle."""
        refusal = self._refusal(user)
        if refusal is None:
            return None
        idle = None
        if (mine := self._output.idle.get(user)) is not None:
            idle = mine.longest() or mine.longest_engaged()
        if idle is None and user.trusted:
            idle = self._longest_idle()
        if idle is None:
            return refusal
        self._evict(idle)
        return None

    def _longest_idle(self) -> Connection | None:
        """Of the user who has the most connections, if one of them is idle, or of the next."""
        users = self._output.users.values()
        for user in sorted(users, key=lambda user: user.connections, reverse=True):
            if (idle := self._output.idle[user].longest()) is not None:
                return idle
        return None

    def _evict(self, connection: Connection) -> None:
        self.evicted += 1
        why = "closed: it was idle, and there were too many connections"
        self._output.service.effects.audit_refusal("connect", "", connection.session, why)
        self._output.drop(connection)

    @staticmethod
    def _turn_away(sock: socket.socket, refusal: QuotaExceeded) -> None:
        body = m.encode(m.refusal(refusal))
        try:
            send_message(sock, (header(len(body), 0, 0), body))
        except OSError:
            pass  # it has gone before it was told to go

    # The greeting.

    def greet(self, connection: Connection, frame: Frame[Handle]) -> None:
        """Answers the Hello, or the proof of an authkey. Raises: ProtocolError, VersionMismatch,
        AuthenticationFailed."""
        try:
            request = m.decode_request(frame.body)
        except BadRequest as error:
            raise ProtocolError(f"the greeting cannot be read: {error.reason}") from None
        if connection.proof is not None:
            self._check_proof(connection, frame, request)
            return
        if type(request) is not m.Hello or request.magic != m.MAGIC:
            raise ProtocolError("the first frame must be a Hello")
        if request.version != m.VERSION:
            raise VersionMismatch(request.version, m.VERSION)
        if len(request.session.encode()) > MAX_SESSION:
            raise ProtocolError(f"a connection id has at most {MAX_SESSION} bytes")
        nonce = b""
        if self._authkey is not None:
            nonce = os.urandom(NONCE_SIZE)
            connection.proof = prove(self._authkey, "client", request.nonce, nonce)
            connection.counterproof = prove(self._authkey, "server", request.nonce, nonce)
        else:
            connection.greeted = True
        connection.session.name = request.session
        self._output.service.greeted(connection.session)
        welcome = m.Welcome(
            m.MAGIC,
            m.VERSION,
            os.getpid(),
            self._epoch,
            MAX_REQUEST,
            MAX_DESCRIPTORS,
            self._output.service.limits.in_flight_per_connection,
            nonce,
        )
        self._output.answer(connection.session, frame.id, m.encode(welcome))

    def _check_proof(
        self, connection: Connection, frame: Frame[Handle], request: m.AnyRequest
    ) -> None:
        if type(request) is not m.Prove:
            raise AuthenticationFailed("this server asks for an authkey; pass authkey=...")
        assert connection.proof is not None
        if not hmac.compare_digest(request.mac, connection.proof):
            connection.draining = True
            raise AuthenticationFailed("the authkeys differ")
        connection.proof = None
        connection.greeted = True
        proved = m.Proved(connection.counterproof)
        self._output.answer(connection.session, frame.id, m.encode(proved))
