"""Buffers: the memory that clients make the server keep for them.

It is half a request, requests that wait to be served or for a name, and answers that are not read.
A user who has too much of it is refused: no request is served before some of it is gone.
"""

from __future__ import annotations

from typing import Final

from fdshare.errors import QuotaExceeded
from fdshare.server.core.users import User, allowance
from fdshare.server.limits import Limits
from fdshare.server.loop.connection import Connection

__all__ = ["Buffers"]

_EACH: Final = 256  # bytes that a frame or a wait takes beside its body, about


class Buffers:
    """Counts bytes. *total*: of all users."""

    def __init__(self, limits: Limits) -> None:
        self.total = 0
        self._limits = limits

    def recount(self, connection: Connection) -> None:
        """Counts what is kept for *connection*, which has changed."""
        output, session = connection.output, connection.session
        count = connection.output_bytes + connection.receiver.held + connection.reserved
        for frame in connection.pending:
            count += len(frame.body) + _EACH
        count += (len(output) + len(session.waiting) + len(session.watches)) * _EACH
        self._add(connection, count - connection.buffered)

    def forget(self, connection: Connection) -> None:
        """Nothing is kept for *connection* any more."""
        self._add(connection, -connection.buffered)

    def refusal(self, user: User) -> QuotaExceeded | None:
        """The error if more is kept for *user* than its share."""
        if user.trusted or not user.buffered:
            return None
        limits = self._limits
        others = self.total - user.buffered
        share = allowance(limits.max_buffered_per_uid, limits.max_buffered, others)
        if user.buffered <= share:
            return None
        return QuotaExceeded("max_buffered_per_uid", share, user.buffered)

    def _add(self, connection: Connection, count: int) -> None:
        connection.buffered += count
        connection.session.user.buffered += count
        self.total += count
